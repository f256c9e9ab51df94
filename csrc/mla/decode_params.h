// Contract of the decoding kernels; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

constexpr int kLatentDim = 512, kCachedDim = kLatentDim + 64;  // C; C + R
constexpr int kPageTokens = 64;
constexpr int kDecodeRows = 64;  // queries x heads of one block
constexpr int kFp8Rows = 16;     // the same over the FP8 cache where they are few

// A token of the FP8 cache: 512 E4M3 numbers, an FP32 scale for each 128 of them, 64 rope keys in BF16.
constexpr int kFp8RopeOffset = kLatentDim + 4 * 4;
constexpr int kFp8TokenBytes = kFp8RopeOffset + 64 * 2;

// Every block of rows takes the pages of all requests in `parts` equal parts. The grid depends on shapes alone, so that
// a captured launch stays right when lengths change.
struct DecodeGrid {
  int row_blocks, parts;
  int block_rows;  // kDecodeRows, or, over the FP8 cache alone, kFp8Rows
};

// Partial results of `parts` parts: each starts inside one request and ends inside another at most.
constexpr int kPartialsAPart = 2;

// out = softmax(scale * q k^T) k[:, :512] of the last L of each sequence's tokens over its pages
struct MlaDecodeParams {
  const void* q;  // (B, L, H, 576) BF16, contiguous, 16-byte aligned
  const void* cache;           // (pages, 64, 576) BF16 or (pages, 64, 656) bytes, contiguous, 16-byte aligned
  const int32_t* block_table;  // (B, max_pages), rows of block_table_stride
  const int32_t* lengths;  // (B,) on the device
  void* out;  // (B, L, H, 512) BF16, contiguous
  float* lse;  // (B, L, H)
  float* partial_out;  // scratch (row_blocks, 2 * parts, block_rows, 512)
  float* partial_lse;  // scratch (row_blocks, 2 * parts, block_rows), base 2
  int64_t block_table_stride;
  int num_requests, num_queries, num_heads;  // B, L, H
  int num_pages, max_pages;  // in the cache, of one request
  bool fp8_cache;
  DecodeGrid grid;
  float scale_log2;  // positive; of the scores, times log2(e)
  int device;
};

// Returns null, or what went wrong.
const char* mla_decode(const MlaDecodeParams& params, void* stream);

}  // namespace dsv3rt
