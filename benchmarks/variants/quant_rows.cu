// Ways to run the 1x128 casts, side by side: nvcc -std=c++17 -O3 -arch=sm_90a -Icsrc benchmarks/variants/quant_rows.cu
//
// Prints the median device time of each, cold L2, and its share of the copy bandwidth of the same run. Also what an
// empty kernel takes between the same events, which no variant can undercut.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "quant/quantize_1x128.cuh"

namespace dsv3rt {

#define CHECK(call)                                                                        \
  do {                                                                                     \
    const cudaError_t status = (call);                                                     \
    if (status != cudaSuccess) std::printf("%s: %s\n", #call, cudaGetErrorString(status)); \
    if (status != cudaSuccess) std::exit(1);                                               \
  } while (0)

enum class Load { kDefault, kStreaming, kReadOnce };

template <Load kLoad, int kRowCount>
struct Variant : PlainSource<__nv_bfloat16> {
  static constexpr int kRows = kRowCount;
  static __device__ __forceinline__ void load(const Params& in, Raw& raw, int64_t row, int column) {
    const auto* source =
        reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(in.x) + row * in.stride + column);
    if (kLoad == Load::kDefault) raw.words = __ldg(source);
    if (kLoad == Load::kStreaming) raw.words = __ldcs(source);
    if (kLoad == Load::kReadOnce) raw.words = load_once_16(source);
  }
};

// A grid of as many blocks as fit; each warp loads its next rows before it works on those at hand.
template <class Source, int kBlocks>
__global__ void __launch_bounds__(kRowThreads, kBlocks)
    persistent_rows_kernel(const typename Source::Params in, const QuantOutput out) {
  constexpr int kRows = Source::kRows;
  using Form = RowForm<Source>;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * kRows;
  const unsigned num_units =
      ceil_div(out.num_rows, int64_t(Form::kBlockRows)) * ceil_div(out.num_columns, Form::kBlockColumns);
  typename Source::Raw ahead[kRows], raw[kRows];
  const auto load = [&](unsigned unit) {
    const BlockPosition block(unit, out.num_columns, Form::kBlockColumns);
    const int column = block.column * Form::kBlockColumns + lane * 8;
    const int64_t row = block.row * Form::kBlockRows + warp_row;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (unit < num_units && column < out.num_columns && row + r < out.num_rows) {
        Source::load(in, ahead[r], row + r, column);
      } else {
        ahead[r].clear();
      }
    }
  };
  load(blockIdx.x);
  for (unsigned unit = blockIdx.x; unit < num_units; unit += gridDim.x) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) raw[r] = ahead[r];
    load(unit + gridDim.x);
    const BlockPosition block(unit, out.num_columns, Form::kBlockColumns);
    const int column = block.column * Form::kBlockColumns + lane * 8;
    const int64_t row = block.row * Form::kBlockRows + warp_row;
    const int rows_left = column < out.num_columns ? static_cast<int>(min(out.num_rows - row, int64_t(kRows))) : 0;
    float scales[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const TileScale tile = tile_scale(lanes_max<16>(raw[r].amax_bits()), out.scale_mask);
      scales[r] = tile.scale;
      if (r < rows_left) {
        *reinterpret_cast<uint2*>(out.data + (row + r) * out.num_columns + column) =
            quantize_octet(raw[r], tile.inverse);
      }
    }
    if (lane % 16 == 0) {
      write_scales(out.scale + (column / kTile) * out.scale_stride + row, scales, rows_left);
    }
  }
}

__global__ void empty_kernel() {}

struct Bench {
  cudaEvent_t start, end;
  void* scratch;
  size_t scratch_bytes = size_t(1) << 30;

  Bench() {
    CHECK(cudaEventCreate(&start));
    CHECK(cudaEventCreate(&end));
    CHECK(cudaMalloc(&scratch, scratch_bytes));
  }

  double microseconds(const std::function<void()>& run) {
    std::vector<float> samples;
    for (int i = 0; i < 45; ++i) {
      CHECK(cudaMemsetAsync(scratch, 0, scratch_bytes));
      CHECK(cudaEventRecord(start));
      run();
      CHECK(cudaEventRecord(end));
      CHECK(cudaDeviceSynchronize());
      float milliseconds;
      CHECK(cudaEventElapsedTime(&milliseconds, start, end));
      if (i >= 5) samples.push_back(milliseconds * 1e3f);
    }
    std::sort(samples.begin(), samples.end());
    return samples[samples.size() / 2];
  }
};

void measure(Bench& bench, double copy_rate, int num_rows, int num_columns) {
  const size_t elements = size_t(num_rows) * num_columns;
  __nv_bfloat16* x;
  QuantOutput out{};
  CHECK(cudaMalloc(&x, 2 * elements));
  CHECK(cudaMalloc(&out.data, elements));
  CHECK(cudaMalloc(&out.scale, elements / 32));
  CHECK(cudaMalloc(&out.data_t, elements));
  CHECK(cudaMalloc(&out.scale_t, elements / 32));
  std::vector<uint16_t> host(elements);
  for (uint16_t& value : host) value = 0x3f00 | (std::rand() & 0x80ff);
  CHECK(cudaMemcpy(x, host.data(), 2 * elements, cudaMemcpyHostToDevice));
  out.scale_stride = num_rows;
  out.scale_t_stride = num_columns;
  out.num_rows = num_rows;
  out.num_columns = num_columns;
  const PlainSource<__nv_bfloat16>::Params in{x, num_columns};
  const auto report = [&](const char* name, double bytes, const std::function<void()>& run) {
    const double time = bench.microseconds(run);
    CHECK(cudaGetLastError());
    std::printf("%6d x %5d  %-36s %7.1f us  %.3f of copy\n", num_rows, num_columns, name, time,
                bytes / time * 1e6 / copy_rate);
  };
  const double written = elements * (1 + 4.0 / 128), rows_bytes = 2.0 * elements + written;
  const auto one_shot = [&](const char* name, auto source) {
    using Source = decltype(source);
    report(name, rows_bytes, [&] {
      const unsigned blocks = ceil_div(num_rows, RowForm<Source>::kBlockRows) * ceil_div(num_columns, 256);
      quantize_rows_kernel<Source><<<blocks, kRowThreads>>>(in, {}, out);
    });
  };
  const auto persistent = [&](const char* name, auto source, auto blocks) {
    using Source = decltype(source);
    constexpr int kBlocks = decltype(blocks)::value;
    report(name, rows_bytes, [&] { persistent_rows_kernel<Source, kBlocks><<<132 * kBlocks, kRowThreads>>>(in, out); });
  };
  one_shot("one shot, 8 rows, default loads", Variant<Load::kDefault, 8>{});
  one_shot("one shot, 8 rows, streaming loads", Variant<Load::kStreaming, 8>{});
  one_shot("one shot, 8 rows, read-once loads", Variant<Load::kReadOnce, 8>{});
  one_shot("one shot, 4 rows, default loads", Variant<Load::kDefault, 4>{});
  one_shot("one shot, 4 rows, read-once loads", Variant<Load::kReadOnce, 4>{});
  persistent("persistent x2, 8 rows, read-once", Variant<Load::kReadOnce, 8>{}, std::integral_constant<int, 2>{});
  persistent("persistent x3, 4 rows, read-once", Variant<Load::kReadOnce, 4>{}, std::integral_constant<int, 3>{});
  persistent("persistent x4, 4 rows, read-once", Variant<Load::kReadOnce, 4>{}, std::integral_constant<int, 4>{});
  const unsigned tiles = ceil_div(num_rows, kTile) * ceil_div(num_columns, kTile);
  report("rows and columns, default loads", 2.0 * elements + 2 * written,
         [&] { quantize_both_kernel<Variant<Load::kDefault, 8>><<<tiles, kTileThreads>>>(in, {}, out); });
  report("rows and columns, read-once loads", 2.0 * elements + 2 * written,
         [&] { quantize_both_kernel<Variant<Load::kReadOnce, 8>><<<tiles, kTileThreads>>>(in, {}, out); });
  for (void* buffer : {static_cast<void*>(x), static_cast<void*>(out.data), static_cast<void*>(out.scale),
                       static_cast<void*>(out.data_t), static_cast<void*>(out.scale_t)}) {
    CHECK(cudaFree(buffer));
  }
}

}  // namespace dsv3rt

int main() {
  using namespace dsv3rt;
  Bench bench;
  const size_t copy_bytes = size_t(1) << 30;
  void *from, *to;
  CHECK(cudaMalloc(&from, copy_bytes));
  CHECK(cudaMalloc(&to, copy_bytes));
  const double copy_time =
      bench.microseconds([&] { CHECK(cudaMemcpyAsync(to, from, copy_bytes, cudaMemcpyDeviceToDevice)); });
  const double copy_rate = 2.0 * copy_bytes / copy_time * 1e6;
  std::printf("copy %.0f GB/s, empty kernel %.1f us\n", copy_rate / 1e9,
              bench.microseconds([] { empty_kernel<<<1, 32>>>(); }));
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
  for (const auto& shape :
       {std::pair(4096, 2048), std::pair(4096, 7168), std::pair(4096, 18432), std::pair(16384, 7168)}) {
    measure(bench, copy_rate, shape.first, shape.second);
  }
  return 0;
}
