// Contracts of expert-parallel dispatch and combine; no CUDA and no NCCL headers, so that the binding module needs
// none.
#pragma once

#include <cstdint>

namespace dsv3rt {

constexpr int kMaxEpRanks = 64;
constexpr int kMaxEpExperts = 1024;
constexpr int kUniqueIdBytes = 128;

// What a group of ranks agrees on once; the same on all of them but for `rank`. It sizes the window.
struct EpShape {
  int num_ranks;    // R
  int rank;
  int num_experts;  // E, a multiple of R; rank r holds E / R from r * E / R on
  int max_tokens;   // T, the most of any rank
  int top_k;        // K
  int num_columns;  // D, a multiple of 16; of 128 with low_latency
  int max_rows;     // of a room, less than 2^26; 0: no rooms
  bool low_latency; // the window has room for the form of that name
};

// The steps that wait for peers, in the order of their signals.
enum class EpPhase : int32_t { kStage, kPull, kPush, kReduce, kSend, kReceive, kSendBack, kCollect };

enum class EpFault : int32_t { kNone, kTimeout, kOverflow, kPeerOverflow, kBadExpert, kNetwork };

// The first thing that went wrong on this rank; kernels write it, the host reads it without waiting for them.
struct EpError {
  volatile int32_t is_complete;  // set last
  EpFault fault;
  EpPhase phase;                 // of a timeout; network: whose puts were not taken in time
  int32_t peer;
  int64_t expected;              // timeout: the signal's epoch; overflow: capacity; bad expert: number of experts
  int64_t seen;                  // timeout: the epoch found; overflow: rows needed; bad expert: its index
};

// Of one dispatch; all on the device, written by it and read by its combine and by both backwards.
struct EpRoute {
  int* counts;       // (X,) rows of each local expert
  int* offsets;      // (X + 1,)
  int* origin;       // (P,) where a row came from: rank * T * K + token * K + k; -1 for padding
  int* order;        // (P,) rows by the numbers of their tokens, those of all ranks in turns; padding last
  int* rows_needed;  // (1,) P that would have sufficed
  int64_t capacity;  // P, a multiple of block
  int block;
};

// Rooms of a window: products write their rows there, and the ranks of their tokens fetch them.
enum class EpRoom : int32_t { kNone = -1, kResults, kGradients };
constexpr int kNumRooms = 2;

// Where a choice's row lies: the rank of its expert above these bits, the row's number there below.
constexpr int kPlaceBits = 26;
constexpr uint32_t kNoPlace = 0xffffffff;

// Of one dispatch of the low-latency form: expert x owns rows x * capacity on, and fills the first of them.
struct EpMaskedRoute {
  int* counts;       // (X,)
  int* origin;       // (X * capacity,) as above, written where there is a row
  int capacity;
};

// Rows of D elements of BF16, or of FP8 with scales.
struct EpRows {
  void* data;
  float* scale;          // FP8: scale[tile * scale_stride + row]; else null
  int64_t row_stride;    // bytes
  int64_t scale_stride;
  int row_bytes;         // D times the size of an element, a multiple of 16
  int num_scales;        // a row
};

struct EpDispatchParams {
  EpRows tokens;          // T rows; data 16-byte aligned
  int num_tokens;         // T
  bool finds_route;       // else it is known already, and `choice` is null
  const int64_t* choice;  // (T, K) experts; null also where T is 0
  const float* weight;    // (T, K), with `outputs` or `row_weight`
  EpRoute route;
  uint32_t* rail_words;   // (ep_rail_words,) bits of what goes to which node and comes back; null within one node
  EpRows rows;            // P rows, contiguous
  const void* outputs;    // (P, D) BF16 or null. Given: rows are multiplied by their weights, and
  float* weight_grad;     // (T, K) gets the products of tokens and outputs
  float* row_weight;      // (P,) gets the rows' weights, with `place`; null: not wanted
  uint32_t* place;        // (T, K) gets where each choice's row lies
  int num_sms;
};

struct EpCombineParams {
  const void* rows;       // (P, D) BF16, contiguous, 16-byte aligned
  EpRoute route;
  EpRoom room;            // whose rows are summed instead, with `place` of the dispatch and without weights
  int64_t first_row;      // of the room, at all ranks: where the dispatch's rows begin
  const uint32_t* place;
  const float* row_weight_grad;  // (P,), with a room, or null
  float* weight_grad;     // (T, K) gets row_weight_grad of each choice's row
  const uint32_t* rail_words;  // of the dispatch
  const float* weight;    // (T, K); null: ones
  void* tokens;           // (T, D) BF16, contiguous
  int num_tokens;
  int num_sms;
};

struct EpSendParams {
  const void* tokens;     // (T, D) BF16, contiguous, 16-byte aligned
  const int64_t* choice;  // (T, K)
  int num_tokens;
  int num_sms;
};

struct EpReceiveParams {
  EpMaskedRoute route;
  EpRows rows;            // X * capacity rows of FP8 with scales
  int num_sms;
};

struct EpSendBackParams {
  const void* rows;       // (X * capacity, D) BF16, contiguous, 16-byte aligned
  EpMaskedRoute route;
  int num_sms;
};

struct EpCollectParams {
  const float* weight;    // (T, K); null: ones
  void* tokens;           // (T, D) BF16, contiguous
  int num_tokens;
  int num_sms;
};

class EpComm;  // a communicator, its window and what its kernels share

// Each returns null, or what went wrong; the text lasts until the thread's next call.
const char* ep_nccl_version(int* compiled, int* loaded);  // 1000 * 10 * major + 100 * minor + patch; 0: none
const char* ep_unique_id(uint8_t id[kUniqueIdBytes]);
const char* ep_create(const EpShape& shape, const uint8_t id[kUniqueIdBytes], int device, int64_t timeout_us,
                      EpComm** comm);
const char* ep_destroy(EpComm* comm);  // gives up, without waiting for peers, after a fault
const char* ep_dispatch(EpComm* comm, const EpDispatchParams& params, void* stream);
const char* ep_combine(EpComm* comm, const EpCombineParams& params, void* stream);
const char* ep_send(EpComm* comm, const EpSendParams& params, void* stream);
const char* ep_receive(EpComm* comm, const EpReceiveParams& params, void* stream);
const char* ep_send_back(EpComm* comm, const EpSendBackParams& params, void* stream);
const char* ep_collect(EpComm* comm, const EpCollectParams& params, void* stream);
const EpShape& ep_shape(const EpComm* comm);
int ep_device(const EpComm* comm);
int64_t ep_window_bytes(const EpComm* comm);
void* ep_room(const EpComm* comm, EpRoom room);  // (max_rows, D) BF16 of this rank's window; null: it has no rooms
int ep_num_nodes(const EpComm* comm);  // groups of ranks that reach each other's memory
int64_t ep_rail_words(const EpComm* comm);  // 0 within one node
EpError ep_error(const EpComm* comm);

}  // namespace dsv3rt
