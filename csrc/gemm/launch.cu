#include "gemm/heuristics.h"
#include "gemm/launch.cuh"

namespace dsv3rt {

// Instantiated one by one in instances/.
extern template GemmLauncher find_launcher<ScaleB::kBlock128, GemmOutput::kBFloat16, Grouping::kNone>(
    const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kBlock128, GemmOutput::kFloat32, Grouping::kNone>(const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kBlock128, GemmOutput::kFloat32Add, Grouping::kNone>(
    const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kRow, GemmOutput::kBFloat16, Grouping::kNone>(const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kRow, GemmOutput::kFloat32, Grouping::kNone>(const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kRow, GemmOutput::kFloat32Add, Grouping::kNone>(const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kBlock128, GemmOutput::kBFloat16, Grouping::kRows>(
    const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kBlock128, GemmOutput::kFloat32, Grouping::kRows>(const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kRow, GemmOutput::kFloat32Add, Grouping::kDepth>(const GemmChoice&);
extern template GemmLauncher find_launcher<ScaleB::kRow, GemmOutput::kFloat32, Grouping::kDepth>(const GemmChoice&);

namespace {

GemmLauncher launcher_for(const GemmParams& params, const GemmChoice& choice) {
  const bool block = params.scale_b_kind == ScaleB::kBlock128;
  if (params.grouping == Grouping::kDepth) {
    return params.output == GemmOutput::kFloat32Add
               ? find_launcher<ScaleB::kRow, GemmOutput::kFloat32Add, Grouping::kDepth>(choice)
               : find_launcher<ScaleB::kRow, GemmOutput::kFloat32, Grouping::kDepth>(choice);
  }
  if (params.grouping == Grouping::kRows) {
    return params.output == GemmOutput::kBFloat16
               ? find_launcher<ScaleB::kBlock128, GemmOutput::kBFloat16, Grouping::kRows>(choice)
               : find_launcher<ScaleB::kBlock128, GemmOutput::kFloat32, Grouping::kRows>(choice);
  }
  switch (params.output) {
    case GemmOutput::kBFloat16:
      return block ? find_launcher<ScaleB::kBlock128, GemmOutput::kBFloat16, Grouping::kNone>(choice)
                   : find_launcher<ScaleB::kRow, GemmOutput::kBFloat16, Grouping::kNone>(choice);
    case GemmOutput::kFloat32:
      return block ? find_launcher<ScaleB::kBlock128, GemmOutput::kFloat32, Grouping::kNone>(choice)
                   : find_launcher<ScaleB::kRow, GemmOutput::kFloat32, Grouping::kNone>(choice);
    case GemmOutput::kFloat32Add:
      return block ? find_launcher<ScaleB::kBlock128, GemmOutput::kFloat32Add, Grouping::kNone>(choice)
                   : find_launcher<ScaleB::kRow, GemmOutput::kFloat32Add, Grouping::kNone>(choice);
  }
  return nullptr;
}

}  // namespace

const char* fp8_gemm_nt(GemmParams params, const GemmChoice* forced, void* stream) {
  if (params.m == 0 || params.n == 0 || params.k == 0) return nullptr;
  const DeviceGuard guard(params.device);
  DSV3RT_CUDA_CHECK(guard.status());
  int device_sms = 0;
  DSV3RT_CUDA_CHECK(cudaDeviceGetAttribute(&device_sms, cudaDevAttrMultiProcessorCount, params.device));
  params.num_sms = params.num_sms > 0 ? std::min(params.num_sms, device_sms) : device_sms;
  const GemmProblem problem{params.m,          params.n,       params.k,
                            params.num_groups, params.num_sms, params.scale_b_kind,
                            params.output,     params.grouping};
  const GemmChoice choice = forced ? *forced : choose_gemm(problem);
  const GemmLauncher launcher = launcher_for(params, choice);
  if (launcher == nullptr) return "no kernel was compiled for this tile";
  return launcher(params, choice, static_cast<cudaStream_t>(stream));
}

}  // namespace dsv3rt
