#include "comm/rails.h"
#include "comm/sm90_ep_combine.cuh"
#include "comm/sm90_ep_dispatch.cuh"
#include "comm/sm90_ep_fetch.cuh"
#include "comm/sm90_ep_latency.cuh"
#include "comm/sm90_ep_nodes.cuh"
#include "comm/sm90_ep_place.cuh"
#include "comm/transport.h"
#include "common/launch.h"

namespace dsv3rt {
namespace {

// A record's bytes: a row and its scales, so that the next one starts on 16 bytes.
int record_bytes(const EpRows& rows) { return round_up(rows.row_bytes + 4 * rows.num_scales, 16); }

StageArgs stage_args(const EpDispatchParams& params) {
  return {params.tokens, params.finds_route, params.choice,
          params.weight, params.num_tokens,  record_bytes(params.tokens)};
}

PullArgs pull_args(const EpDispatchParams& params) {
  return {params.route, params.rows, static_cast<const __nv_bfloat16*>(params.outputs), record_bytes(params.tokens)};
}

template <typename AnyTeam>
void stage(const AnyTeam& team, const EpDispatchParams& params, cudaStream_t stream) {
  ep_stage_kernel<<<params.num_sms, kThreads, kWarps * team.shape.num_experts, stream>>>(team, stage_args(params));
}

template <typename AnyTeam>
void place_and_pull(const AnyTeam& team, const EpDispatchParams& params, cudaStream_t stream) {
  if (params.finds_route) {
    const PlaceArgs place{params.route, params.row_weight, params.place};
    const int shared_bytes = place_shared_ints(team.shape) * int(sizeof(int));
    ep_place_kernel<<<params.num_sms, kThreads, shared_bytes, stream>>>(team, place);
  }
  if (params.outputs == nullptr) {
    ep_pull_kernel<false><<<params.num_sms, kThreads, 0, stream>>>(team, pull_args(params));
  } else {
    ep_pull_kernel<true><<<params.num_sms, kThreads, 0, stream>>>(team, pull_args(params));
  }
}

void dispatch_in_node(const Team& team, const EpDispatchParams& params, cudaStream_t stream) {
  stage(team, params, stream);
  place_and_pull(team, params, stream);
  if (params.outputs == nullptr) return;
  ep_weight_grad_kernel<<<1, kThreads, 0, stream>>>(team, params.weight_grad, params.num_tokens * team.shape.top_k);
}

void dispatch_between_nodes(const NodesTeam& team, const Rails& rails, const EpDispatchParams& params,
                            cudaStream_t stream) {
  const bool weighted = params.outputs != nullptr;
  stage(team, params, stream);
  const RailTokens leaving{params.finds_route, weighted, params.num_tokens, record_bytes(params.tokens),
                           params.rail_words};
  put_tokens(rails, team, leaving, params.num_sms, stream);
  if (params.finds_route) ep_mark_returning_kernel<<<params.num_sms, kThreads, 0, stream>>>(team, params.rail_words);
  place_and_pull(team, params, stream);
  release_inboxes(rails, team, weighted, stream);
  if (!weighted) return;
  ep_rails_weight_grad_kernel<<<1, kThreads, 0, stream>>>(team, params.weight_grad, params.rail_words,
                                                          params.num_tokens * team.shape.top_k);
}

template <typename AnyTeam>
void push(const AnyTeam& team, const EpCombineParams& params, cudaStream_t stream) {
  const PushArgs args{params.route, static_cast<const char*>(params.rows)};
  ep_push_kernel<<<params.num_sms, kThreads, 0, stream>>>(team, args);
}

template <typename AnyTeam>
void reduce(const AnyTeam& team, const EpCombineParams& params, cudaStream_t stream) {
  const ReduceArgs args{params.weight, static_cast<__nv_bfloat16*>(params.tokens), params.num_tokens};
  ep_reduce_kernel<<<params.num_sms, kThreads, 0, stream>>>(team, args);
}

// After what the products wrote into the room.
const char* fetch(const Team& team, const EpCombineParams& params, cudaStream_t stream) {
  const FetchArgs args = fetch_args(team, params);
  if (params.row_weight_grad != nullptr) {
    DSV3RT_CUDA_CHECK(cudaMemcpyAsync(team.self + args.row_weight_grad, params.row_weight_grad,
                                      params.route.capacity * sizeof(float), cudaMemcpyDeviceToDevice, stream));
  }
  ep_fetch_kernel<<<params.num_sms, kThreads, 0, stream>>>(team, args);
  return nullptr;
}

void combine_between_nodes(const NodesTeam& team, const Rails& rails, const EpCombineParams& params,
                           cudaStream_t stream) {
  push(team, params, stream);
  put_slots(rails, team, params.rail_words, params.num_sms, stream);
  reduce(team, params, stream);
  release_slots(rails, team, stream);
}

}  // namespace

const char* ep_dispatch(EpComm* comm, const EpDispatchParams& params, void* stream) {
  const DeviceGuard guard(ep_device(comm));
  DSV3RT_CUDA_CHECK(guard.status());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const Rails* rails = rails_of(*comm)) {
    dispatch_between_nodes(team_of(*comm), *rails, params, cuda_stream);
  } else {
    dispatch_in_node(team_of(*comm), params, cuda_stream);
  }
  DSV3RT_CUDA_CHECK(cudaGetLastError());
  return nullptr;
}

const char* ep_combine(EpComm* comm, const EpCombineParams& params, void* stream) {
  const DeviceGuard guard(ep_device(comm));
  DSV3RT_CUDA_CHECK(guard.status());
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const Rails* rails = rails_of(*comm)) {
    combine_between_nodes(team_of(*comm), *rails, params, cuda_stream);
  } else if (params.room != EpRoom::kNone) {
    if (const char* error = fetch(team_of(*comm), params, cuda_stream)) return error;
  } else {
    const Team& team = team_of(*comm);
    push(team, params, cuda_stream);
    reduce(team, params, cuda_stream);
  }
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
