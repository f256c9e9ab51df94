// Which pages a block attends to. All pages of all requests stand in one line, before each request's some room that
// stands for the cost of starting it; the line is cut in equal parts. Everything follows from the lengths: the kernels
// that need it work it out themselves, and nothing is passed between them.
#pragma once

#include <cuda_runtime.h>

#include "common/math.h"
#include "mla/decode_params.h"
#include "mla/rings.cuh"

namespace dsv3rt {

constexpr int kLeastShare = 2;

// A run of pages of one request, inside one part.
struct Piece {
  int request;
  int first_page, end_page;  // both the same: there is no further piece
  int whole_pages;           // those before it are seen whole by all rows of the block
  int length;                // of the request, in tokens
  int partial;               // where the result goes among the part's partial results; -1: it is the whole result
};

// Where the table of the piece's request names its first page.
__device__ __forceinline__ const int32_t* first_entry(const MlaDecodeParams& params, const Piece& piece) {
  return params.block_table + piece.request * params.block_table_stride + piece.first_page;
}

// By one thread, to whoever awaits pieces.
template <class Storage>
__device__ __forceinline__ void publish_piece(Storage& storage, TwoStage slot, const Piece& piece) {
  storage.piece_empty[slot.stage()].wait(slot.empty_parity());
  storage.piece[slot.stage()] = piece;
  storage.piece_full[slot.stage()].arrive();
}

__device__ __forceinline__ int request_length(const MlaDecodeParams& params, int request) {
  return min(max(params.lengths[request], 0), params.max_pages * kPageTokens);
}

// Tokens that the query of a row of the request sees; may be <= 0.
__device__ __forceinline__ int tokens_seen(const MlaDecodeParams& params, int length, int row) {
  const int query = min(row / params.num_heads, params.num_queries - 1);
  return length - params.num_queries + query + 1;
}

__device__ __forceinline__ int pages_of(int length) { return ceil_div(length, kPageTokens); }

// Pages' worth of time to load queries and to store results. Where each page meets one block of rows alone, memory is
// the limit, and other blocks use what of it one block leaves.
__device__ __forceinline__ int start_room(const MlaDecodeParams& params) { return params.grid.row_blocks > 1 ? 3 : 1; }

__device__ __forceinline__ int room_of(const MlaDecodeParams& params, int length) {
  return length == 0 ? 0 : start_room(params) + pages_of(length);
}

__device__ __forceinline__ int share_of(int total, int parts) { return max(ceil_div(total, parts), kLeastShare); }

// Parts that hold pages of a request, the first and the last.
struct PartRange {
  int first, last;
};

__device__ __forceinline__ PartRange parts_of(int first_page, int num_pages, int share) {
  return {first_page / share, (first_page + num_pages - 1) / share};
}

__device__ __forceinline__ int sum_over_warp(int x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Walks through the pieces of one part; used by one whole warp.
class PieceCursor {
 public:
  __device__ __forceinline__ PieceCursor(const MlaDecodeParams& params, int part) : params_(params) {
    int total = 0;
    for (int request = threadIdx.x % 32; request < params.num_requests; request += 32) {
      total += room_of(params, request_length(params, request));
    }
    share_ = share_of(sum_over_warp(total), params.grid.parts);
    begin_ = -part * share_;
    find_start();
  }

  __device__ __forceinline__ Piece next() {
    while (request_ < params_.num_requests && begin_ < share_) {
      const int request = request_++, length = request_length(params_, request), num_pages = pages_of(length);
      const int first_page = begin_ + start_room(params_);
      begin_ += room_of(params_, length);
      Piece piece{request, max(-first_page, 0), min(share_ - first_page, num_pages)};
      if (piece.first_page >= piece.end_page) continue;
      piece.whole_pages = max(tokens_seen(params_, length, blockIdx.x * params_.grid.block_rows), 0) / kPageTokens;
      piece.length = length;
      piece.partial = first_page < 0 ? 0 : first_page + num_pages > share_ ? 1 : -1;
      return piece;
    }
    return {};
  }

 private:
  // The request in whose room the part begins.
  __device__ __forceinline__ void find_start() {
    const int lane = threadIdx.x % 32;
    while (request_ < params_.num_requests) {
      const int request = request_ + lane;
      const int room = request < params_.num_requests ? room_of(params_, request_length(params_, request)) : 0;
      int end = room;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int below = __shfl_up_sync(~0u, end, distance);
        if (lane >= distance) end += below;
      }
      const unsigned past = __ballot_sync(~0u, begin_ + end > 0);
      if (past != 0) {
        const int owner = __ffs(past) - 1;
        request_ += owner;
        begin_ += __shfl_sync(~0u, end - room, owner);
        return;
      }
      request_ += 32;
      begin_ += __shfl_sync(~0u, end, 31);
    }
  }

  const MlaDecodeParams& params_;
  int share_;
  int request_ = 0, begin_;  // the next request, and where its room begins, counted from the part's beginning
};

}  // namespace dsv3rt
