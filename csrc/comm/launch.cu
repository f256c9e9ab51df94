#include "comm/sm90_ep_combine.cuh"
#include "comm/sm90_ep_dispatch.cuh"
#include "comm/sm90_ep_latency.cuh"
#include "comm/transport.h"
#include "common/launch.h"

namespace dsv3rt {
namespace {

// A record's bytes: a row and its scales, so that the next one starts on 16 bytes.
int record_bytes(const EpRows& rows) { return round_up(rows.row_bytes + 4 * rows.num_scales, 16); }

const char* stage_and_pull(const Team& team, const EpDispatchParams& params, cudaStream_t stream) {
  const int record = record_bytes(params.tokens), experts = team.shape.num_experts;
  const StageArgs stage{params.tokens, params.finds_route, params.choice, params.weight, params.num_tokens, record};
  ep_stage_kernel<<<params.num_sms, kThreads, kWarps * experts, stream>>>(team, stage);
  if (params.finds_route) {
    const int places = experts + 2 * (experts / team.shape.num_ranks) + 1;
    ep_place_kernel<<<params.num_sms, kThreads, places * sizeof(int), stream>>>(team, {params.route});
  }
  const PullArgs pull{params.route, params.rows, static_cast<const __nv_bfloat16*>(params.outputs), record};
  if (params.outputs == nullptr) {
    ep_pull_kernel<false><<<params.num_sms, kThreads, 0, stream>>>(team, pull);
    return nullptr;
  }
  ep_pull_kernel<true><<<params.num_sms, kThreads, 0, stream>>>(team, pull);
  ep_weight_grad_kernel<<<1, kThreads, 0, stream>>>(team, params.weight_grad, params.num_tokens * team.shape.top_k);
  return nullptr;
}

}  // namespace

const char* ep_dispatch(EpComm* comm, const EpDispatchParams& params, void* stream) {
  const DeviceGuard guard(ep_device(comm));
  DSV3RT_CUDA_CHECK(guard.status());
  const char* error = stage_and_pull(team_of(*comm), params, static_cast<cudaStream_t>(stream));
  if (error != nullptr) return error;
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

const char* ep_combine(EpComm* comm, const EpCombineParams& params, void* stream) {
  const DeviceGuard guard(ep_device(comm));
  DSV3RT_CUDA_CHECK(guard.status());
  const Team& team = team_of(*comm);
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  ep_push_kernel<<<params.num_sms, kThreads, 0, cuda_stream>>>(team,
                                                               {params.route, static_cast<const char*>(params.rows)});
  ep_reduce_kernel<<<params.num_sms, kThreads, 0, cuda_stream>>>(
      team, {params.weight, static_cast<__nv_bfloat16*>(params.tokens), params.num_tokens});
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

namespace {

template <typename Args>
const char* launch(void (*kernel)(Team, Args), EpComm* comm, const Args& args, int num_sms, void* stream) {
  const DeviceGuard guard(ep_device(comm));
  DSV3RT_CUDA_CHECK(guard.status());
  kernel<<<num_sms, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(team_of(*comm), args);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

}  // namespace

const char* ep_send(EpComm* comm, const EpSendParams& params, void* stream) {
  const SendArgs args{static_cast<const __nv_bfloat16*>(params.tokens), params.choice, params.num_tokens};
  return launch(ep_send_kernel, comm, args, params.num_sms, stream);
}

const char* ep_receive(EpComm* comm, const EpReceiveParams& params, void* stream) {
  return launch(ep_receive_kernel, comm, ReceiveArgs{params.route, params.rows}, params.num_sms, stream);
}

const char* ep_send_back(EpComm* comm, const EpSendBackParams& params, void* stream) {
  const SendBackArgs args{params.route, static_cast<const char*>(params.rows)};
  return launch(ep_send_back_kernel, comm, args, params.num_sms, stream);
}

const char* ep_collect(EpComm* comm, const EpCollectParams& params, void* stream) {
  const ReduceArgs args{params.weight, static_cast<__nv_bfloat16*>(params.tokens), params.num_tokens};
  return launch(ep_collect_kernel, comm, args, params.num_sms, stream);
}

}  // namespace dsv3rt
