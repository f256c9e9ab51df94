#include "common/launch.h"
#include "quant/quantize_1x128.cuh"

namespace dsv3rt {
namespace {

unsigned num_blocks(const Quantize1x128Params& params, int block_rows, int block_columns) {
  return ceil_div(params.num_rows, int64_t(block_rows)) * ceil_div(params.num_columns, block_columns);
}

template <typename Element>
void launch(const Quantize1x128Params& params, cudaStream_t stream) {
  if (params.data_t != nullptr) {
    quantize_both_kernel<Element><<<num_blocks(params, kTile, kTile), kQuantThreads, 0, stream>>>(params);
  } else {
    using Form = RowForm<Element>;
    quantize_rows_kernel<Element>
        <<<num_blocks(params, Form::kBlockRows, Form::kBlockColumns), kQuantThreads, 0, stream>>>(params);
  }
}

}  // namespace

const char* quantize_1x128(const Quantize1x128Params& params, void* stream) {
  if (params.num_rows == 0 || params.num_columns == 0) return nullptr;
  const DeviceGuard guard(params.device);
  DSV3RT_CUDA_CHECK(guard.status());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.input == QuantInput::kBFloat16) {
    launch<__nv_bfloat16>(params, cuda_stream);
  } else {
    launch<float>(params, cuda_stream);
  }
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace dsv3rt
