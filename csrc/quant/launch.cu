#include <algorithm>

#include "common/launch.h"
#include "quant/quantize_128x128.cuh"
#include "quant/swiglu_fp8.cuh"
#include "quant/swiglu_fp8_backward.cuh"
#include "quant/transpose.cuh"

namespace dsv3rt {
namespace {

unsigned num_blocks(int64_t rows, int columns, int block_rows, int block_columns) {
  return ceil_div(rows, int64_t(block_rows)) * ceil_div(columns, block_columns);
}

// Of bands, see tile_of_block.
dim3 tile_grid(int64_t rows, int columns) {
  constexpr int64_t kMostBlocks = 65535;  // along y
  const int64_t bands = ceil_div(rows, int64_t(kBandTiles) * kTile), y = std::min(bands, kMostBlocks);
  return dim3(kBandTiles * ceil_div(columns, kTile), y, ceil_div(bands, y));
}

template <class Source>
const char* launch_1x128(const typename Source::Params& in, const RowGroups& groups, const QuantOutput& out,
                         cudaStream_t stream) {
  if (out.data_t != nullptr) {
    const dim3 grid = tile_grid(out.num_rows, out.num_columns);
    quantize_both_kernel<Source><<<grid, kTileThreads, 0, stream>>>(in, groups, out);
  } else {
    const unsigned blocks = num_blocks(out.num_rows, out.num_columns, kRowBlockRows, kRowBlockColumns);
    quantize_rows_kernel<Source><<<blocks, kRowThreads, 0, stream>>>(in, groups, out);
  }
  return nullptr;
}

template <typename Element>
const char* launch_128x128(const Quantize128x128Params& params, cudaStream_t stream) {
  const unsigned blocks = params.num_matrices * num_blocks(params.num_rows, params.num_columns, kTile, kTile);
  if (params.vectorised) {
    quantize_blocks_kernel<Element, true><<<blocks, kTileThreads, 0, stream>>>(params);
  } else {
    quantize_blocks_kernel<Element, false><<<blocks, kTileThreads, 0, stream>>>(params);
  }
  return nullptr;
}

// Of the 228 KB of an SM, 1 KB of each block is taken.
constexpr bool blocks_fit(int blocks, int shared_bytes) { return blocks * (shared_bytes + 1024) <= 233472; }

// A block a tile, in as much shared memory as there is.
template <class... Parameters>
const char* launch_tiles(void (*kernel)(Parameters...), dim3 grid, unsigned threads, int shared_bytes,
                         cudaStream_t stream, const Parameters&... parameters) {
  DSV3RT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  DSV3RT_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  kernel<<<grid, threads, shared_bytes, stream>>>(parameters...);
  return nullptr;
}

template <bool kWeighted>
const char* launch_swiglu(const SwigluParams& params, cudaStream_t stream) {
  const QuantOutput& out = params.out;
  if (params.in.type == QuantInput::kBFloat16) {
    return launch_1x128<SwigluSource<__nv_bfloat16>>(params.in, params.groups, out, stream);
  }
  if (out.num_columns % kTile != 0) {
    return launch_1x128<SwigluSource<__nv_fp8_e4m3>>(params.in, params.groups, out, stream);
  }
  if (out.data_t != nullptr) {
    static_assert(blocks_fit(kWideBlocks, sizeof(WideBothStorage)));
    return launch_tiles(swiglu_both_kernel<kWeighted>, tile_grid(out.num_rows, out.num_columns), kWideThreads,
                        sizeof(WideBothStorage), stream, params.in, params.groups, out);
  } else {
    const unsigned blocks = num_blocks(out.num_rows, out.num_columns, kWideBlockRows, kWideBlockColumns);
    swiglu_rows_kernel<kWeighted><<<blocks, kWideThreads, 0, stream>>>(params.in, params.groups, out);
  }
  return nullptr;
}

template <bool kWithProduct, bool kWeighted>
const char* launch_backward(const SwigluBackwardParams& params, cudaStream_t stream) {
  constexpr int kBytes = sizeof(BackwardStorage), kBytesFp8 = sizeof(WideBackwardStorage<kWithProduct>);
  static_assert(blocks_fit(2, kBytes) && blocks_fit(kWithProduct ? 2 : 3, kBytesFp8));
  const dim3 grid = tile_grid(params.out.num_rows, params.in.hidden);
  if (params.in.type == QuantInput::kBFloat16) {
    return launch_tiles(swiglu_backward_kernel<kWithProduct, kWeighted>, grid, kTileThreads, kBytes, stream, params);
  }
  return launch_tiles(swiglu_fp8_backward_kernel<kWithProduct, kWeighted>, grid, kWideThreads, kBytesFp8, stream,
                      params);
}

}  // namespace

const char* quantize_1x128(const Quantize1x128Params& params, void* stream) {
  if (params.out.num_rows == 0 || params.out.num_columns == 0) return nullptr;
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) {
    if (params.rows != nullptr) {
      return launch_1x128<GatheredSource<__nv_bfloat16>>({params.x, params.rows, params.x_stride}, params.groups,
                                                         params.out, cuda_stream);
    }
    if (params.input == QuantInput::kBFloat16) {
      return launch_1x128<PlainSource<__nv_bfloat16>>({params.x, params.x_stride}, params.groups, params.out,
                                                      cuda_stream);
    }
    return launch_1x128<PlainSource<float>>({params.x, params.x_stride}, params.groups, params.out, cuda_stream);
  });
}

const char* quantize_128x128(const Quantize128x128Params& params, void* stream) {
  if (params.num_matrices == 0 || params.num_rows == 0 || params.num_columns == 0) return nullptr;
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) {
    if (params.input == QuantInput::kBFloat16) {
      return launch_128x128<__nv_bfloat16>(params, cuda_stream);
    }
    return launch_128x128<float>(params, cuda_stream);
  });
}

const char* transpose_128x128(const Transpose128x128Params& params, void* stream) {
  if (params.num_matrices == 0 || params.num_rows == 0 || params.num_columns == 0) return nullptr;
  const unsigned blocks = params.num_matrices * num_blocks(params.num_rows, params.num_columns, kTile, kTile);
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) -> const char* {
    if (params.vectorised) {
      transpose_blocks_kernel<true><<<blocks, kTransposeThreads, 0, cuda_stream>>>(params);
    } else {
      transpose_blocks_kernel<false><<<blocks, kTransposeThreads, 0, cuda_stream>>>(params);
    }
    return nullptr;
  });
}

const char* swiglu_quantize_1x128(const SwigluParams& params, void* stream) {
  if (params.out.num_rows == 0 || params.out.num_columns == 0) return nullptr;
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) {
    return params.in.weight == nullptr ? launch_swiglu<false>(params, cuda_stream)
                                       : launch_swiglu<true>(params, cuda_stream);
  });
}

const char* swiglu_backward_quantize_1x128(const SwigluBackwardParams& params, void* stream) {
  if (params.out.num_rows == 0 || params.in.hidden == 0) return nullptr;
  return on_device(params.device, stream, [&](cudaStream_t cuda_stream) {
    if (params.output_t == nullptr) {
      return params.in.weight == nullptr ? launch_backward<false, false>(params, cuda_stream)
                                         : launch_backward<false, true>(params, cuda_stream);
    }
    return params.in.weight == nullptr ? launch_backward<true, false>(params, cuda_stream)
                                       : launch_backward<true, true>(params, cuda_stream);
  });
}

}  // namespace dsv3rt
