// Runs the prefill kernels on a GPU without Python: correctness on small and awkward batches, then TFLOPS. Build and
// run:
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a --ptxas-options=--register-usage-level=10 -Icsrc
//        csrc/mla/launch_*.cu tests/csrc/check_mla_prefill.cu -o build/check_mla_prefill && build/check_mla_prefill
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "mla/params.h"

namespace {

using dsv3rt::kNopeDim;
using dsv3rt::kQueryDim;
using dsv3rt::kRopeDim;
using dsv3rt::kValueDim;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

template <typename T>
struct Buffer {
  T* data = nullptr;
  size_t count;
  explicit Buffer(size_t elements) : count(elements) {
    check(cudaMalloc(&data, std::max<size_t>(count, 1) * sizeof(T)), "malloc");
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    check(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
};

// Roughly normal: the sum of three hashes.
__global__ void fill(__nv_bfloat16* target, size_t count, uint32_t seed, float size) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
    float sum = 0;
    uint32_t bits = static_cast<uint32_t>(i) * 2654435761u ^ seed * 40503u;
    for (int k = 0; k < 3; ++k) {
      bits ^= bits >> 16, bits *= 0x7feb352du, bits ^= bits >> 15, bits *= 0x846ca68bu, bits ^= bits >> 16;
      sum += bits * (2.0f / 4294967296.0f) - 1;
    }
    target[i] = __float2bfloat16(sum * size);
  }
}

struct Sample {
  int query, head, key, seen;  // rows of q and of the first key, and how many keys are seen
};

struct Arrays {
  const __nv_bfloat16 *q, *kv, *k_rope;  // (Tq, H, 192), (Tk, H, 256), (Tk, 64)
  int heads;
};

// One block a sample, in FP64; scores in shared memory.
__global__ void reference(Arrays a, const Sample* samples, double scale, double* out, double* lse) {
  extern __shared__ double scores[];
  const Sample s = samples[blockIdx.x];
  const __nv_bfloat16* q = a.q + (size_t(s.query) * a.heads + s.head) * kQueryDim;
  const auto kv_row = [&](int j) { return a.kv + (size_t(s.key + j) * a.heads + s.head) * (kNopeDim + kValueDim); };
  for (int j = threadIdx.x; j < s.seen; j += blockDim.x) {
    double sum = 0;
    for (int c = 0; c < kNopeDim; ++c) sum += double(__bfloat162float(q[c])) * double(__bfloat162float(kv_row(j)[c]));
    for (int c = 0; c < kRopeDim; ++c) {
      sum += double(__bfloat162float(q[kNopeDim + c])) *
             double(__bfloat162float(a.k_rope[size_t(s.key + j) * kRopeDim + c]));
    }
    scores[j] = sum * scale;
  }
  __syncthreads();
  double peak = -INFINITY, total = 0, value = 0;
  for (int j = 0; j < s.seen; ++j) peak = fmax(peak, scores[j]);
  for (int j = 0; j < s.seen; ++j) {
    const double weight = exp(scores[j] - peak);
    total += weight;
    value += weight * double(__bfloat162float(kv_row(j)[kNopeDim + threadIdx.x]));
  }
  out[size_t(blockIdx.x) * kValueDim + threadIdx.x] = s.seen == 0 ? 0 : value / total;
  if (threadIdx.x == 0) lse[blockIdx.x] = s.seen == 0 ? -INFINITY : peak + log(total);
}

struct Case {
  const char* name;
  std::vector<int> q_lengths, k_lengths;
  int heads;
  bool causal;
  float size = 1;      // of q and k
  int nan_sequence = -1;
};

struct Problem {
  explicit Problem(const Case& c)
      : q_ends(ends(c.q_lengths)),
        k_ends(ends(c.k_lengths)),
        Tq(q_ends.back()),
        Tk(k_ends.back()),
        heads(c.heads),
        q(size_t(Tq) * heads * kQueryDim),
        kv(size_t(Tk) * heads * (kNopeDim + kValueDim)),
        k_rope(size_t(Tk) * kRopeDim),
        out(size_t(Tq + kGuardRows) * heads * kValueDim),
        lse(size_t(Tq + kGuardRows) * heads),
        counter(1),
        device_q_ends(q_ends),
        device_k_ends(k_ends) {
    fill<<<256, 256>>>(q.data, q.count, 1, c.size);
    fill<<<256, 256>>>(kv.data, kv.count, 2, 1);
    fill<<<256, 256>>>(k_rope.data, k_rope.count, 3, c.size);
    check(cudaMemset(out.data, 0xff, out.count * 2), "poison");  // NaN
    check(cudaMemset(lse.data, 0xff, lse.count * 4), "poison");
    if (c.nan_sequence >= 0) {
      const size_t first_q = q_ends[c.nan_sequence], end_q = q_ends[c.nan_sequence + 1];
      const size_t first_k = k_ends[c.nan_sequence], end_k = k_ends[c.nan_sequence + 1];
      poison(q, first_q * heads * kQueryDim, end_q * heads * kQueryDim);
      poison(kv, first_k * heads * 256, end_k * heads * 256);
      poison(k_rope, first_k * kRopeDim, end_k * kRopeDim);
    }
    params.q = {q.data, int64_t(heads) * kQueryDim, kQueryDim};
    params.k_nope = {kv.data, int64_t(heads) * 256, 256};
    params.v = {kv.data + kNopeDim, int64_t(heads) * 256, 256};
    params.k_rope = {k_rope.data, kRopeDim, kRopeDim};
    params.out = out.data;
    params.lse = lse.data;
    params.q_ends = device_q_ends.data;
    params.k_ends = device_k_ends.data;
    params.tile_counter = counter.data;
    params.num_queries = Tq;
    params.num_keys = Tk;
    params.num_heads = heads;
    params.num_sequences = static_cast<int>(c.q_lengths.size());
    params.scale = 1 / std::sqrt(192.0f);
    params.causal = c.causal;
  }

  static constexpr int kGuardRows = 8;
  static std::vector<int> ends(const std::vector<int>& lengths) {
    std::vector<int> result{0};
    for (const int length : lengths) result.push_back(result.back() + length);
    return result;
  }
  static void poison(Buffer<__nv_bfloat16>& buffer, size_t first, size_t end) {
    check(cudaMemset(buffer.data + first, 0xff, (end - first) * 2), "poison");
  }

  void run() {
    if (const char* error = dsv3rt::mla_prefill(params, nullptr)) {
      std::printf("launch: %s\n", error);
      std::exit(1);
    }
  }

  std::vector<int> q_ends, k_ends;
  int Tq, Tk, heads;
  Buffer<__nv_bfloat16> q, kv, k_rope, out;
  Buffer<float> lse;
  Buffer<int> counter, device_q_ends, device_k_ends;
  dsv3rt::MlaPrefillParams params{};
};

std::vector<Sample> samples_of(const Case& c, const Problem& p) {
  std::vector<Sample> samples;
  uint64_t state = 12345;
  const auto random = [&](int bound) {
    return int((state = state * 6364136223846793005u + 1442695040888963407u) >> 33) % bound;
  };
  for (size_t b = 0; b < c.q_lengths.size(); ++b) {
    if (int(b) == c.nan_sequence) continue;
    const int queries = c.q_lengths[b], keys = c.k_lengths[b];
    for (int n = 0; n < std::min(queries * c.heads, 600); ++n) {
      const bool all = queries * c.heads <= 600;
      const int i = all ? n / c.heads : n % 4 == 0 ? queries - 1 - n / 4 % queries : random(queries);
      const int head = all ? n % c.heads : random(c.heads);
      const int seen = c.causal ? std::max(0, i + 1 + keys - queries) : keys;
      samples.push_back({p.q_ends[b] + i, head, p.k_ends[b], seen});
    }
  }
  return samples;
}

bool verify(const Case& c) {
  Problem p(c);
  p.run();
  check(cudaDeviceSynchronize(), c.name);
  const std::vector<Sample> samples = samples_of(c, p);
  int most_seen = 0;
  for (const Sample& s : samples) most_seen = std::max(most_seen, s.seen);
  Buffer<Sample> device_samples(samples);
  Buffer<double> expected(samples.size() * kValueDim), expected_lse(samples.size());
  check(cudaFuncSetAttribute(reference, cudaFuncAttributeMaxDynamicSharedMemorySize, 200000), "reference");
  reference<<<samples.size(), kValueDim, most_seen * sizeof(double)>>>({p.q.data, p.kv.data, p.k_rope.data, p.heads},
                                                                       device_samples.data, p.params.scale,
                                                                       expected.data, expected_lse.data);
  check(cudaDeviceSynchronize(), "reference");
  std::vector<double> want(expected.count), want_lse(expected_lse.count);
  std::vector<__nv_bfloat16> got(p.out.count);
  std::vector<float> got_lse(p.lse.count);
  check(cudaMemcpy(want.data(), expected.data, want.size() * 8, cudaMemcpyDeviceToHost), "download");
  check(cudaMemcpy(want_lse.data(), expected_lse.data, want_lse.size() * 8, cudaMemcpyDeviceToHost), "download");
  check(cudaMemcpy(got.data(), p.out.data, got.size() * 2, cudaMemcpyDeviceToHost), "download");
  check(cudaMemcpy(got_lse.data(), p.lse.data, got_lse.size() * 4, cudaMemcpyDeviceToHost), "download");

  double worst = 0, worst_lse = 0;
  for (size_t n = 0; n < samples.size(); ++n) {
    const size_t row = size_t(samples[n].query) * p.heads + samples[n].head;
    for (int column = 0; column < kValueDim; ++column) {
      const double error = std::abs(__bfloat162float(got[row * kValueDim + column]) - want[n * kValueDim + column]);
      if (!(error <= worst)) worst = error;  // NaN wins
    }
    const bool same = std::isinf(want_lse[n]) && got_lse[row] == want_lse[n];
    const double error = same ? 0 : std::abs(got_lse[row] - want_lse[n]) / std::max(1.0, std::abs(want_lse[n]));
    if (!(error <= worst_lse)) worst_lse = error;
  }
  bool untouched = true;
  for (size_t i = size_t(p.Tq) * p.heads * kValueDim; i < got.size(); ++i)
    untouched &= std::isnan(__bfloat162float(got[i]));
  for (size_t i = size_t(p.Tq) * p.heads; i < got_lse.size(); ++i) untouched &= std::isnan(got_lse[i]);
  // Values are up to 3; weights and the result are rounded to 2^-9 each: well inside 3 * 2^-8 + 3 * 2^-9.
  const bool good = worst < 0.02 && worst_lse < 1e-5 && untouched;
  std::printf("%-4s %-44s out %.2e  lse %.2e%s\n", good ? "ok" : "BAD", c.name, worst, worst_lse,
              untouched ? "" : "  WROTE PAST THE END");
  return good;
}

double pairs_of(const Case& c) {
  double pairs = 0;
  for (size_t b = 0; b < c.q_lengths.size(); ++b) pairs += double(c.q_lengths[b]) * c.k_lengths[b] / (c.causal ? 2 : 1);
  return pairs;
}

// Median of 20 runs in milliseconds.
template <typename Run>
float time_of(const char* name, const Run& run) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&end), "event");
  for (int i = 0; i < 5; ++i) run();
  std::vector<float> times(20);
  for (float& ms : times) {
    check(cudaEventRecord(start), "record");
    run();
    check(cudaEventRecord(end), "record");
    check(cudaEventSynchronize(end), name);
    check(cudaEventElapsedTime(&ms, start, end), "elapsed");
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void measure(const Case& c) {
  Problem p(c);
  const float ms = time_of(c.name, [&] { p.run(); });
  const double flops = 2 * c.heads * pairs_of(c) * (kQueryDim + kValueDim);
  std::printf("%-32s forward   %.3f ms  %.0f TFLOPS\n", c.name, ms, flops / ms * 1e-9);
}

// A forward pass and the arrays of the backward pass.
struct Gradients {
  explicit Gradients(const Case& c)
      : p(c),
        heads(c.heads),
        tiles(heads * (p.Tq / dsv3rt::kBackwardQueries + c.q_lengths.size())),
        dout(p.Tq * heads * kValueDim),
        dq(p.q.count),
        dkv(p.kv.count),
        dk_rope(p.k_rope.count),
        dlse(p.Tq * heads),
        statistics(tiles * 2 * dsv3rt::kBackwardQueries),
        dk_rope_parts(heads * p.k_rope.count),
        counters(2) {
    fill<<<256, 256>>>(dout.data, dout.count, 4, 1);
    check(cudaMemset(dlse.data, 0, dlse.count * 4), "zero");
    for (Buffer<__nv_bfloat16>* buffer : {&dq, &dkv, &dk_rope}) Problem::poison(*buffer, 0, buffer->count);
    p.run();
    params.q = p.params.q;
    params.k_nope = p.params.k_nope;
    params.k_rope = p.params.k_rope;
    params.v = p.params.v;
    params.out = {p.out.data, int64_t(heads) * kValueDim, kValueDim};
    params.dout = {dout.data, int64_t(heads) * kValueDim, kValueDim};
    params.lse = p.lse.data;
    params.dlse = dlse.data;
    params.dq = dq.data;
    params.dk_nope = dkv.data;
    params.dv = dkv.data + kNopeDim;
    params.dk_rope = dk_rope.data;
    params.dkv_row_stride = int64_t(heads) * 256;
    params.dkv_head_stride = 256;
    params.q_ends = p.params.q_ends;
    params.k_ends = p.params.k_ends;
    params.statistics = statistics.data;
    params.dk_rope_parts = dk_rope_parts.data;
    params.tile_counters = counters.data;
    params.num_queries = p.Tq;
    params.num_keys = p.Tk;
    params.num_heads = c.heads;
    params.num_sequences = p.params.num_sequences;
    params.num_tiles = static_cast<int>(tiles / heads);
    params.scale = p.params.scale;
    params.causal = c.causal;
  }

  void run() {
    if (const char* error = dsv3rt::mla_prefill_backward(params, nullptr)) {
      std::printf("launch: %s\n", error);
      std::exit(1);
    }
  }

  Problem p;
  size_t heads, tiles;
  Buffer<__nv_bfloat16> dout, dq, dkv, dk_rope;
  Buffer<float> dlse, statistics, dk_rope_parts;
  Buffer<int> counters;
  dsv3rt::MlaBackwardParams params{};
};

// One block a query and head of one sequence: its part of the gradients in FP64, added up. Shared memory: weights and
// their gradients.
__global__ void reference_gradients(Arrays a, const __nv_bfloat16* dout, Sample first, int queries, int keys,
                                    bool causal, double scale, double* dq, double* dkv, double* dk_rope) {
  extern __shared__ double weights[];
  double* dweights = weights + keys;
  __shared__ double total, delta;
  const int i = blockIdx.x, head = blockIdx.y, seen = causal ? max(0, min(keys, i + 1 + keys - queries)) : keys;
  const size_t row = size_t(first.query + i) * a.heads + head;
  const auto kv_at = [&](int j) { return (size_t(first.key + j) * a.heads + head) * 256; };
  const auto number = [](const __nv_bfloat16& x) { return double(__bfloat162float(x)); };
  const auto key = [&](int j, int c) {
    return number(c < kNopeDim ? a.kv[kv_at(j) + c] : a.k_rope[size_t(first.key + j) * kRopeDim + c - kNopeDim]);
  };
  for (int j = threadIdx.x; j < seen; j += blockDim.x) {
    double score = 0, dweight = 0;
    for (int c = 0; c < kQueryDim; ++c) score += number(a.q[row * kQueryDim + c]) * key(j, c);
    for (int c = 0; c < kValueDim; ++c) dweight += number(dout[row * kValueDim + c]) * number(a.kv[kv_at(j) + 128 + c]);
    weights[j] = exp(score * scale);  // scores are small here
    dweights[j] = dweight;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    total = delta = 0;
    for (int j = 0; j < seen; ++j) total += weights[j], delta += weights[j] * dweights[j];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < kQueryDim; c += blockDim.x) {
    double sum = 0;
    for (int j = 0; j < seen; ++j) {
      const double weight = weights[j] / total, dscore = scale * weight * (dweights[j] - delta / total);
      const double dk = dscore * number(a.q[row * kQueryDim + c]);
      sum += dscore * key(j, c);
      atomicAdd(c < kNopeDim ? &dkv[kv_at(j) + c] : &dk_rope[size_t(first.key + j) * kRopeDim + c - kNopeDim], dk);
      if (c < kValueDim) atomicAdd(&dkv[kv_at(j) + 128 + c], weight * number(dout[row * kValueDim + c]));
    }
    dq[row * kQueryDim + c] = sum;
  }
}

// Half of the squared distance over the squared size; NaN stays.
double difference(const Buffer<__nv_bfloat16>& mine, const Buffer<double>& theirs) {
  std::vector<__nv_bfloat16> got(mine.count);
  std::vector<double> want(theirs.count);
  check(cudaMemcpy(got.data(), mine.data, got.size() * 2, cudaMemcpyDeviceToHost), "download");
  check(cudaMemcpy(want.data(), theirs.data, want.size() * 8, cudaMemcpyDeviceToHost), "download");
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double x = __bfloat162float(got[i]);
    error += (x - want[i]) * (x - want[i]);
    size += x * x + want[i] * want[i];
  }
  return error == 0 ? 0 : error / size;
}

bool verify_backward(const Case& c) {
  Gradients g(c);
  g.run();
  check(cudaDeviceSynchronize(), c.name);
  Buffer<double> dq(g.dq.count), dkv(g.dkv.count), dk_rope(g.dk_rope.count);
  for (Buffer<double>* buffer : {&dq, &dkv, &dk_rope}) {
    check(cudaMemset(buffer->data, 0, buffer->count * 8), "zero");
  }
  check(cudaFuncSetAttribute(reference_gradients, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000), "reference");
  for (size_t b = 0; b < c.q_lengths.size(); ++b) {
    if (c.q_lengths[b] == 0 || c.k_lengths[b] == 0) continue;
    reference_gradients<<<dim3(c.q_lengths[b], c.heads), 192, c.k_lengths[b] * 16>>>(
        {g.p.q.data, g.p.kv.data, g.p.k_rope.data, c.heads}, g.dout.data, {g.p.q_ends[b], 0, g.p.k_ends[b], 0},
        c.q_lengths[b], c.k_lengths[b], c.causal, g.params.scale, dq.data, dkv.data, dk_rope.data);
  }
  check(cudaDeviceSynchronize(), "reference");
  const double diffs[3] = {difference(g.dq, dq), difference(g.dkv, dkv), difference(g.dk_rope, dk_rope)};
  // As in tests/gpu/test_mla_backward_kernel.py.
  bool good = true;
  for (const double diff : diffs) good &= diff < 1e-5;
  std::printf("%-4s %-44s dq %.2e  dk_nope, dv %.2e  dk_rope %.2e\n", good ? "ok" : "BAD", c.name, diffs[0], diffs[1],
              diffs[2]);
  return good;
}

void measure_backward(const Case& c) {
  Gradients g(c);
  const float ms = time_of(c.name, [&] { g.run(); });
  const double flops = 2 * c.heads * pairs_of(c) * (3 * kQueryDim + 2 * kValueDim);
  std::printf("%-32s backward  %.3f ms  %.0f TFLOPS\n", c.name, ms, flops / ms * 1e-9);
}

}  // namespace

int main() {
  alarm(240);  // a kernel that hangs ends with its process
  const std::vector<int> ragged{1, 127, 128, 129, 300, 5, 1000, 64, 63, 65};
  const std::vector<Case> cases = {
      {"one tile", {128}, {128}, 1, true},
      {"one tile, all keys", {128}, {128}, 1, false},
      {"one token", {1}, {1}, 1, true},
      {"two blocks of keys", {256}, {256}, 1, true},
      {"many blocks", {1024}, {1024}, 3, true},
      {"many blocks, all keys", {1024}, {1024}, 3, false},
      {"odd length", {777}, {777}, 16, true},
      {"ragged", ragged, ragged, 3, true},
      {"ragged, all keys", ragged, ragged, 3, false},
      {"more keys than queries", {100, 1, 130}, {1000, 513, 131}, 3, true},
      {"more queries than keys", {1000, 300, 7}, {100, 299, 0}, 3, true},
      {"no keys", {200}, {0}, 2, true},
      {"forty sequences", std::vector<int>(40, 33), std::vector<int>(40, 33), 16, true},
      {"NaN in a neighbour", {100, 77, 130, 128}, {100, 77, 130, 128}, 3, true, 1, 1},
      {"NaN in a neighbour, all keys", {100, 77, 130, 128}, {100, 77, 130, 128}, 3, false, 1, 1},
      {"NaN behind the first", {200, 77}, {200, 77}, 3, true, 1, 1},
      {"small scores", {500}, {500}, 3, true, 1e-4f},
      {"large scores", {500}, {500}, 3, true, 20},
      {"128 heads", {1537}, {1537}, 128, true},
      {"8192 tokens", {8192}, {8192}, 16, true},
  };
  bool good = true;
  for (const Case& c : cases) good &= verify(c);
  const std::vector<Case> differentiated = {
      {"gradients: one tile", {128}, {128}, 1, true},
      {"gradients: many blocks", {1024}, {1024}, 3, true},
      {"gradients: many blocks, all keys", {1024}, {1024}, 3, false},
      {"gradients: odd length", {777}, {777}, 5, true},
      {"gradients: ragged", ragged, ragged, 3, true},
      {"gradients: ragged, all keys", ragged, ragged, 3, false},
      {"gradients: more keys than queries", {100, 1, 130}, {1000, 513, 131}, 3, true},
      {"gradients: more queries than keys", {1000, 300, 7}, {100, 299, 0}, 3, true},
      {"gradients: 128 heads", {300}, {300}, 128, true},
  };
  for (const Case& c : differentiated) good &= verify_backward(c);
  if (!good) return 1;
  const std::vector<Case> timed = {
      {"4096 causal", {4096}, {4096}, 128, true},
      {"8192 causal", {8192}, {8192}, 128, true},
      {"16384 causal", {16384}, {16384}, 128, true},
      {"8192 all keys", {8192}, {8192}, 128, false},
      {"4 x 1024 causal", {1024, 1024, 1024, 1024}, {1024, 1024, 1024, 1024}, 128, true},
      {"8192 in ragged pieces", {5000, 17, 1111, 2064}, {5000, 17, 1111, 2064}, 128, true},
  };
  for (const Case& c : timed) measure(c);
  for (const Case& c : timed) measure_backward(c);
  return 0;
}
