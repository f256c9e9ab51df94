#include "comm/rails.h"
#include "comm/sm90_ep_combine.cuh"
#include "comm/sm90_ep_dispatch.cuh"
#include "comm/sm90_ep_latency.cuh"
#include "comm/transport.h"
#include "common/launch.h"

namespace dsv3rt {
namespace {

// A record's bytes: a row and its scales, so that the next one starts on 16 bytes.
int record_bytes(const EpRows& rows) { return round_up(rows.row_bytes + 4 * rows.num_scales, 16); }

template <bool kNodes>
void dispatch(const EpComm& comm, const EpDispatchParams& params, cudaStream_t stream) {
  const Team& team = team_of(comm);
  const int record = record_bytes(params.tokens), experts = team.shape.num_experts;
  const bool weighted = params.outputs != nullptr;
  const StageArgs stage{params.tokens, params.finds_route, params.choice, params.weight, params.num_tokens, record};
  ep_stage_kernel<<<params.num_sms, kThreads, kWarps * experts, stream>>>(team, stage);
  if constexpr (kNodes) {
    const RailTokens leaving{params.finds_route, weighted, params.num_tokens, record, params.route.rails};
    put_tokens(*rails_of(comm), team, leaving, params.num_sms, stream);
  }
  if (params.finds_route) {
    const int places = experts + 2 * (experts / team.shape.num_ranks) + 1;
    ep_place_kernel<kNodes><<<params.num_sms, kThreads, places * sizeof(int), stream>>>(team, {params.route});
  }
  const PullArgs pull{params.route, params.rows, static_cast<const __nv_bfloat16*>(params.outputs), record};
  if (weighted) {
    ep_pull_kernel<true, kNodes><<<params.num_sms, kThreads, 0, stream>>>(team, pull);
  } else {
    ep_pull_kernel<false, kNodes><<<params.num_sms, kThreads, 0, stream>>>(team, pull);
  }
  if constexpr (kNodes) release_inboxes(*rails_of(comm), team, weighted, stream);
  if (weighted) {
    ep_weight_grad_kernel<kNodes><<<1, kThreads, 0, stream>>>(team, params.weight_grad, params.route.rails,
                                                              params.num_tokens * team.shape.top_k);
  }
}

template <bool kNodes>
void combine(const EpComm& comm, const EpCombineParams& params, cudaStream_t stream) {
  const Team& team = team_of(comm);
  const PushArgs push{params.route, static_cast<const char*>(params.rows)};
  const ReduceArgs reduce{params.weight, static_cast<__nv_bfloat16*>(params.tokens), params.num_tokens};
  ep_push_kernel<kNodes><<<params.num_sms, kThreads, 0, stream>>>(team, push);
  if constexpr (kNodes) put_slots(*rails_of(comm), team, params.route.rails, params.num_sms, stream);
  ep_reduce_kernel<kNodes><<<params.num_sms, kThreads, 0, stream>>>(team, reduce);
  if constexpr (kNodes) release_slots(*rails_of(comm), team, stream);
}

}  // namespace

const char* ep_dispatch(EpComm* comm, const EpDispatchParams& params, void* stream) {
  const DeviceGuard guard(ep_device(comm));
  DSV3RT_CUDA_CHECK(guard.status());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  rails_of(*comm) != nullptr ? dispatch<true>(*comm, params, cuda_stream) : dispatch<false>(*comm, params, cuda_stream);
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

const char* ep_combine(EpComm* comm, const EpCombineParams& params, void* stream) {
  const DeviceGuard guard(ep_device(comm));
  DSV3RT_CUDA_CHECK(guard.status());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  rails_of(*comm) != nullptr ? combine<true>(*comm, params, cuda_stream) : combine<false>(*comm, params, cuda_stream);
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
