// Contract of the kernel that writes new tokens into the latent cache; no CUDA headers.
#pragma once

#include <cstdint>

#include "mla/decode_params.h"

namespace dsv3rt {

struct AppendParams {
  const void* rows;  // (T, 576) BF16, rows of row_stride: latents before their norm, rope keys before their turn
  const void* weight;  // (512,) BF16, of the norm
  const float* cosines;  // (T, 32)
  const float* sines;  // (T, 32)
  const int64_t* slots;  // (T,): page * 64 + place; a token whose slot is outside the cache is not written
  void* cache;  // (pages, 64, 576) BF16 or (pages, 64, 656) bytes
  int64_t row_stride, num_slots;
  int num_tokens;
  float eps;
  bool fp8;
  int device;
};

// Returns null, or what went wrong.
const char* append_latents(const AppendParams& params, void* stream);

}  // namespace dsv3rt
