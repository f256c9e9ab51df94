// ep_layout num_ranks node_size num_experts max_tokens top_k num_columns max_rows: prints, for each rank,
//
//   area NAME START BYTES        what lies in a window (the same for all ranks)
//   inbox RANK OTHER START       where RANK lets the rank on its rail in node OTHER put what that has staged
//   outbox RANK OTHER START      where rows for that rank wait at RANK
//   words WORDS                  of a route's bits for one node
#include <cstdio>
#include <cstdlib>

#include "comm/window.h"

int main(int argc, char** argv) {
  using namespace dsv3rt;
  if (argc != 8) return 2;
  const int node_size = std::atoi(argv[2]);
  EpShape shape{
      std::atoi(argv[1]), 0,    std::atoi(argv[3]), std::atoi(argv[4]), std::atoi(argv[5]), std::atoi(argv[6]),
      std::atoi(argv[7]), false};
  const WindowLayout at = layout_of(shape);
  const RailLayout rails = rail_layout_of(shape, at, shape.num_ranks / node_size);
  const long long choices = static_cast<long long>(shape.max_tokens) * shape.top_k,
                  others = shape.num_ranks / node_size - 1;
  const auto area = [](const char* name, long long start, long long bytes) {
    std::printf("area %s %lld %lld\n", name, start, bytes);
  };
  area("signals", at.signals, 8LL * kNumPhases * kMaxEpRanks);
  area("overflows", at.overflows, 16LL * kMaxEpRanks);
  area("local", at.local, sizeof(LocalState));
  area("staged", at.num_tokens, rails.inbox_bytes);
  area("slots", at.slots, choices * shape.num_columns * 2);
  for (int room = 0; room < kNumRooms; ++room) {
    area(room == 0 ? "room_of_results" : "room_of_gradients", room_offset(at, static_cast<EpRoom>(room)),
         2LL * shape.max_rows * shape.num_columns);
  }
  area("row_weight_grad", at.row_weight_grad, 4LL * shape.max_rows);
  if (others > 0) {
    area("inbox", rails.inbox, others * rails.inbox_bytes);
    area("outbox", rails.outbox, others * rails.outbox_bytes);
    area("returned_weight_grad", rails.returned_weight_grad, others * choices * 4);
  }
  area("window", 0, others > 0 ? rails.bytes : at.bytes);
  for (shape.rank = 0; shape.rank < shape.num_ranks; ++shape.rank) {
    const Nodes nodes = nodes_of(shape, node_size);
    for (int other = 0; other < nodes.count; ++other) {
      if (other == nodes.node) continue;
      const long long index = area_of(nodes.node, other);
      std::printf("inbox %d %d %lld\n", shape.rank, other, rails.inbox + index * rails.inbox_bytes);
      std::printf("outbox %d %d %lld\n", shape.rank, other, rails.outbox + index * rails.outbox_bytes);
    }
  }
  std::printf("words %d\n", rail_words(shape));
  return 0;
}
