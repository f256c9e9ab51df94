#include "common/launch.h"
#include "common/math.h"
#include "embed/embedding_backward.cuh"
#include "embed/rope.cuh"

namespace dsv3rt {

const char* rope(const RopeParams& params, void* stream) {
  const int64_t num_octets = params.num_tokens * params.num_heads * (params.num_columns / 8);
  if (num_octets == 0) return nullptr;
  if (num_octets >= int64_t(1) << 31) return "x has 2^34 elements or more";
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    const auto octets = static_cast<unsigned>(num_octets);
    const unsigned blocks = ceil_div(octets, unsigned(kRopeThreads * kRopeSteps));
    rope_kernel<<<blocks, kRopeThreads, 0, cuda_stream>>>(params, octets);
    return nullptr;
  });
}

const char* embedding_backward(const EmbeddingBackwardParams& params, void* stream) {
  if (params.num_rows == 0 || params.num_columns == 0) return nullptr;
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    const EmbeddingBlocks blocks(params);
    const int64_t grid = blocks.long_runs + blocks.table;
    if (grid >= int64_t(1) << 31) return "grad and weight_grad have 2^31 rows or more";
    embedding_backward_kernel<<<static_cast<unsigned>(grid), kEmbeddingThreads, 0, cuda_stream>>>(params, blocks);
    return nullptr;
  });
}

}  // namespace dsv3rt
