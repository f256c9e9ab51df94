// Contracts of the kernels around experts; no CUDA headers, so that the binding module needs none.
#pragma once

#include <cstdint>

namespace dsv3rt {

constexpr int kMaxExperts = 512;
constexpr int kMaxExpertGroups = 32;
constexpr int kMaxTopK = 16;
constexpr float kSumFloor = 1e-20f;  // added to sums of scores: zero by it is zero where all scores underflow
constexpr int kMaxPlaceBlocks = 128;  // of the placement: each adds up the counts of all

// Here and below arrays of E columns are 16-byte aligned.
struct RouteParams {
  const void* logits;   // (T, E), FP32 or BF16, contiguous
  const float* bias;    // (E,)
  int64_t* idx;         // (T, K): chosen experts by falling biased score, ties to the lowest
  float* weight;        // (T, K)
  float* scores;        // (T, E): sigmoid of the logits
  int64_t* counts;      // (E,)
  int64_t num_tokens;
  int num_experts;      // E, up to kMaxExperts
  int num_groups;       // of neighbouring experts, up to kMaxExpertGroups
  int groups_kept;
  int top_k;            // K, up to kMaxTopK
  float scale;          // of the weights
  bool renormalize;
  bool logits_bf16;
  int device;
};

struct RouteBackwardParams {
  const float* weight_grad;  // (T, K)
  const float* scores_grad;  // (T, E), or null
  const float* scores;       // (T, E), as `route` wrote them
  const int64_t* idx;        // (T, K)
  void* logits_grad;         // (T, E), FP32 or BF16
  int64_t num_tokens;
  int num_experts;
  int top_k;
  float scale;
  bool renormalize;
  bool logits_bf16;
  int device;
};

struct BalanceParams {
  const float* scores;       // (T, E)
  const int64_t* idx;        // (T, K); one outside of 0 .. E counts nowhere, one given twice counts once
  const int32_t* cu_seqlens; // (B + 1,)
  float* share_parts;        // (B, parts, E): scratch, sums of scores divided by their token's sum
  int32_t* load_parts;       // (B, parts, E): scratch, choices
  float* sequence_loss;      // (B,): scratch
  int32_t* tickets;          // (B + 1,): scratch, parts of each sequence that are done, and sequences
  float* slope;              // (B, E): derivative of the loss by a token's divided scores
  float* loss;               // one number
  int64_t num_tokens;        // up to 2^31
  int num_sequences;         // B
  int num_parts;             // of a sequence
  int num_experts;
  int top_k;
  float alpha;
  int device;
};

struct BalanceBackwardParams {
  const float* grad;          // one number
  const float* scores;        // (T, E)
  const float* slope;         // (B, E), as `balance_loss` wrote it
  const int32_t* cu_seqlens;  // (B + 1,)
  float* scores_grad;         // (T, E); zeros for a token of no sequence
  int64_t num_tokens;
  int num_sequences;
  int num_experts;
  int device;
};

struct PlaceParams {
  const int64_t* idx;  // (N,): the expert of each choice; one outside of 0 .. E gets row -1 and counts nowhere
  int64_t* row_of;     // (N,)
  int32_t* counts;     // (E,)
  int32_t* offsets;    // (E + 1,): segments padded to `block` rows
  int32_t* partial;    // scratch: kMaxPlaceBlocks * E
  int64_t num_choices;
  int num_blocks, turns;  // set by `place`
  int num_experts;
  int block;
  int device;
};

// Rows of `row_bytes`, a multiple of 16, contiguous and 16-byte aligned.
struct PermuteParams {
  const void* x;           // (T,) rows
  void* rows;              // (P,) rows: those that choices name, and zeros in the padding of every segment
  const float* scale;      // (T, tiles), each tile's scales scale_stride apart, or null
  float* rows_scale;       // (P, tiles)
  float* packed_scale;     // (T, tiles) scratch, contiguous
  int32_t* token_of_row;   // (P,) scratch
  const int64_t* row_of;   // (T, K)
  const int32_t* counts;   // (E,)
  const int32_t* offsets;  // (E + 1,)
  int64_t num_tokens, num_rows;
  int64_t scale_stride, rows_scale_stride;
  int row_bytes;
  int num_tiles;
  int num_experts;
  int top_k;
  int device;
};

// BF16 rows of D numbers, a multiple of 8.
struct UnpermuteParams {
  const void* rows;       // (P, D)
  const float* weight;    // (T, K), or null: ones
  const int64_t* row_of;  // (T, K)
  void* y;                // (T, D): sum over k, in order, of weight * row
  int64_t num_tokens, num_rows;
  int num_columns;
  int top_k;
  int device;
};

struct UnpermuteBackwardParams {
  const void* grad;        // (T, D) of y
  const void* rows;        // (P, D), read for the gradient of the weights alone; null without
  const float* weight;     // (T, K), or null: ones
  const int64_t* row_of;   // (T, K)
  const int32_t* counts;   // (E,)
  const int32_t* offsets;  // (E + 1,)
  void* rows_grad;         // (P, D); zeros in the padding of every segment
  float* weight_grad;      // (T, K), or null
  int64_t num_tokens, num_rows;
  int num_columns;
  int num_experts;
  int top_k;
  int device;
};

// Each returns null, or what went wrong.
const char* route(const RouteParams& params, void* stream);
const char* route_backward(const RouteBackwardParams& params, void* stream);
const char* balance_loss(const BalanceParams& params, void* stream);
const char* balance_loss_backward(const BalanceBackwardParams& params, void* stream);
const char* place(const PlaceParams& params, void* stream);
const char* permute(const PermuteParams& params, void* stream);
const char* unpermute(const UnpermuteParams& params, void* stream);
const char* unpermute_backward(const UnpermuteBackwardParams& params, void* stream);

}  // namespace dsv3rt
