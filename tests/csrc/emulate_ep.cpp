// emulate_ep nodes node_size experts max_tokens top_k columns rounds delay_us seed: the kernels of the exchange between
// ranks of one node or of several, all in this process on the host, against sums over everybody's tokens. Prints what
// was put between nodes; exits with 1 at the first difference.
#include <climits>

#include "cuda_on_host.h"
// (before the kernels: their language)
#include "exchange_launches.h"

namespace dsv3rt {

// The kernels' `extern __shared__` arrays.
thread_local uint8_t warp_counts[kWarps * kMaxEpExperts];
thread_local int shared[6 * kMaxEpExperts];

namespace {

constexpr int kBlock = 16;
constexpr int kChunks = 2;  // exchanges with weights that are under way together, each in its rows of the rooms

struct Options {
  int num_nodes, node_size, experts, max_tokens, top_k, columns, rounds, delay_us, seed;
};

struct Rank {
  NodesTeam team{};
  Rails rails{};
  std::vector<char> window;
  std::vector<char*> peers;
  EpError error{};
};

struct Batch {
  int num_tokens = 0;
  std::vector<int64_t> choice;
  std::vector<float> weight, scale;  // scale: [tile][token]
  std::vector<__nv_bfloat16> x, dy;  // [token][column]
};

struct Row {
  int rank, token, k;
};

[[noreturn]] void differ(const char* what, int rank, int64_t index) {
  std::printf("%s differs at rank %d, %lld\n", what, rank, static_cast<long long>(index));
  std::exit(1);
}

float number(__nv_bfloat16 value) { return __bfloat162float(value); }
float factor(int64_t expert) { return 1 + float(expert % 32) / 32; }

class World {
 public:
  explicit World(const Options& options) : options_(options), ranks_(options.num_nodes * options.node_size) {
    for (int rail = 0; rail < options.node_size; ++rail) rails_.push_back(std::make_unique<host::Rail>());
    for (int r = 0; r < int(ranks_.size()); ++r) {
      NodesTeam& team = ranks_[r].team;
      team.shape = {int(ranks_.size()),
                    r,
                    options.experts,
                    options.max_tokens,
                    options.top_k,
                    options.columns,
                    options.num_nodes > 1 ? 0 : kChunks * most_rows(),
                    false};
      team.nodes = nodes_of(team.shape, options.node_size);
      team.at = layout_of(team.shape);
      team.rails = rail_layout_of(team.shape, team.at, options.num_nodes);
      team.timeout_ns = 60'000'000'000;
      team.error = &ranks_[r].error;
      ranks_[r].window.assign(team.rails.bytes, 0);
      team.self = ranks_[r].window.data();
    }
    for (int r = 0; r < int(ranks_.size()); ++r) {
      Rank& rank = ranks_[r];
      const Nodes& nodes = rank.team.nodes;
      for (int mate = 0; mate < nodes.size; ++mate)
        rank.peers.push_back(ranks_[nodes.node * nodes.size + mate].team.self);
      rank.team.peers = rank.peers.data();
      host::Rail& rail = *rails_[nodes.rail];
      rail.windows.push_back(rank.team.self);
      rail.signals.emplace_back(host::kContexts * host::kSignals);
      rail.window_bytes = rank.team.rails.bytes;
      rail.delay_us = options.delay_us;
      rail.random.seed(unsigned(options.seed * 100 + nodes.rail + 1));
      rank.rails.device = {&rail, nodes.node, host::kContexts};
    }
  }

  void run() {
    host::skew_us = options_.delay_us;
    while_carried([&] {
      std::mt19937 random(unsigned(options_.seed));
      for (int round = 0; round < options_.rounds; ++round) {
        draw(random, round);
        for_all([&](int r) { exchange(r); });
      }
      for_all([&](int r) {
        Rank& rank = ranks_[r];
        host::launch(1, kRailThreads, [&rank] { ep_settle_rails_kernel(rank.team, rank.rails); });
        if (rank.error.is_complete) differ("the error record", r, int(rank.error.fault));
      });
      draw(random, 0);
      for_all([&](int r) { overflow(r); });
    });
    int64_t puts = 0, bytes = 0;
    for (auto& rail : rails_) puts += rail->num_puts, bytes += rail->put_bytes;
    std::printf("%lld puts, %lld bytes\n", static_cast<long long>(puts), static_cast<long long>(bytes));
  }

  // The last rank does not come: the others' records say so.
  void run_without_last() {
    std::mt19937 random(unsigned(options_.seed));
    draw(random, 0);
    const int last = int(ranks_.size()) - 1;
    for (Rank& rank : ranks_) rank.team.timeout_ns = 4'000'000'000;
    while_carried([&] {
      for_all([&](int r) {
        if (r != last) dispatch_alone(r);
      });
    });
    for (int r = 0; r < last; ++r) {
      const EpError& error = ranks_[r].error;
      if (!error.is_complete || error.fault != EpFault::kTimeout || error.peer != last ||
          error.phase != EpPhase::kStage) {
        differ("the record of a lost peer", r, error.peer);
      }
    }
  }

  // The last rank's rows come, but it does not say that the experts' results are there: nobody takes what lies there
  // for them.
  void run_without_last_results() {
    std::mt19937 random(unsigned(options_.seed));
    draw(random, 0);
    const int last = int(ranks_.size()) - 1;
    for (Rank& rank : ranks_) rank.team.timeout_ns = 4'000'000'000;
    std::vector<WeighedRows> arrived(ranks_.size());
    for_all([&](int r) { dispatch_with_weights(r, most_rows(), arrived[r]); });
    for_all([&](int r) {
      if (r == last) return;
      std::vector<__nv_bfloat16> y(size_t(batches_[r].num_tokens) * options_.columns);
      combine(ranks_[r], fetch_of(arrived[r], 0, y, batches_[r].num_tokens));
      for (size_t i = 0; i < y.size(); ++i) {
        if (!std::isnan(number(y[i]))) differ("a result without a peer's rows", r, int64_t(i));
      }
      const EpError& error = ranks_[r].error;
      if (!error.is_complete || error.fault != EpFault::kTimeout || error.peer != last ||
          error.phase != EpPhase::kPush) {
        differ("the record of lost results", r, error.peer);
      }
    });
  }

 private:
  // Runs `work` while what is put is delivered.
  template <typename Work>
  void while_carried(Work work) {
    std::atomic<bool> over = false;
    std::thread network([&] {
      while (!over) {
        for (auto& rail : rails_) rail->deliver();
        std::this_thread::yield();
      }
    });
    work();
    over = true;
    network.join();
  }

  template <typename Work>
  void for_all(Work work) {
    std::vector<std::thread> threads;
    for (int r = 0; r < int(ranks_.size()); ++r) threads.emplace_back([=] { work(r); });
    for (std::thread& thread : threads) thread.join();
  }

  void draw(std::mt19937& random, int round) {
    std::normal_distribution<float> normal;
    batches_.assign(ranks_.size(), {});
    for (int r = 0; r < int(ranks_.size()); ++r) {
      Batch& batch = batches_[r];
      batch.num_tokens =
          round % 3 == 1 && r == round % int(ranks_.size()) ? 0 : int(random() % (options_.max_tokens + 1));
      for (int t = 0; t < batch.num_tokens; ++t) {
        std::vector<int> all(options_.experts);
        for (int e = 0; e < options_.experts; ++e) all[e] = e;
        std::shuffle(all.begin(), all.end(), random);
        const bool skewed = round % 3 == 2;  // all to the experts of one rank first
        if (skewed)
          std::stable_partition(all.begin(), all.end(),
                                [&](int e) { return rank_of(e) == round % int(ranks_.size()); });
        for (int k = 0; k < options_.top_k; ++k) {
          batch.choice.push_back(all[k]);
          batch.weight.push_back(std::abs(normal(random)));
        }
        for (int c = 0; c < options_.columns; ++c) {
          batch.x.push_back(__float2bfloat16(normal(random)));
          batch.dy.push_back(__float2bfloat16(normal(random)));
        }
      }
      batch.scale.resize(size_t(num_scales()) * std::max(1, batch.num_tokens));
      for (float& scale : batch.scale) scale = normal(random);
    }
  }

  int num_scales() const { return (options_.columns + 127) / 128; }
  int num_local() const { return options_.experts / int(ranks_.size()); }
  int rank_of(int64_t expert) const { return int(expert) / num_local(); }

  // The rows of a rank's experts, padding as rank -1.
  std::vector<Row> rows_of(int rank, std::vector<int>* counts) const {
    std::vector<Row> rows;
    for (int x = 0; x < num_local(); ++x) {
      const size_t first = rows.size();
      for (int r = 0; r < int(ranks_.size()); ++r) {
        for (int i = 0; i < int(batches_[r].choice.size()); ++i) {
          if (batches_[r].choice[i] == rank * num_local() + x)
            rows.push_back({r, i / options_.top_k, i % options_.top_k});
        }
      }
      counts->push_back(int(rows.size() - first));
      while (rows.size() % kBlock != 0) rows.push_back({-1, 0, 0});
    }
    return rows;
  }

  // A route's arrays.
  struct Route {
    std::vector<int> counts, offsets, origin, order, rows_needed;
    std::vector<uint32_t> rails;
    EpRoute route{};
  };

  void make(Route& route, const NodesTeam& team, int capacity) const {
    route.counts.assign(num_local(), -1);
    route.offsets.assign(num_local() + 1, -1);
    route.origin.assign(capacity, -7);
    route.order.assign(capacity, -7);
    route.rows_needed.assign(1, 0);
    route.rails.assign(size_t(2) * team.nodes.count * rail_words(team.shape), 0xdeadbeef);
    route.route = {route.counts.data(),
                   route.offsets.data(),
                   route.origin.data(),
                   route.order.data(),
                   route.rows_needed.data(),
                   capacity,
                   kBlock};
  }

  void dispatch(const Rank& rank, const EpDispatchParams& params) const {
    const Team& team = rank.team;
    options_.num_nodes > 1 ? dispatch_by(rank.team, rank.rails, params) : dispatch_by(team, rank.rails, params);
  }

  void combine(const Rank& rank, const EpCombineParams& params) const {
    const Team& team = rank.team;
    if (params.room != EpRoom::kNone) return fetch_by(team, params);
    options_.num_nodes > 1 ? combine_by(rank.team, rank.rails, params) : combine_by(team, rank.rails, params);
  }

  EpRows rows_view(std::vector<__nv_bfloat16>& data) const {
    return {data.data(), nullptr, options_.columns * 2, 0, options_.columns * 2, 0};
  }

  // A dispatch that finds its route.
  static EpDispatchParams by_choice(const Batch& batch, const EpRows& tokens, Route& route, const EpRows& rows) {
    EpDispatchParams params{};
    params.tokens = tokens;
    params.num_tokens = batch.num_tokens;
    params.finds_route = true;
    params.choice = batch.choice.data();
    params.route = route.route;
    params.rail_words = route.rails.data();
    params.rows = rows;
    return params;
  }

  // Dispatch, another of FP8 in between, combine, and both backwards by the first one's route.
  void exchange(int r) {
    const Rank& rank = ranks_[r];
    Batch& batch = batches_[r];
    const int columns = options_.columns;
    std::vector<int> counts;
    const std::vector<Row> want = rows_of(r, &counts);
    const int capacity = int(want.size()) + 2 * kBlock;
    Route route;
    make(route, rank.team, capacity);
    std::vector<__nv_bfloat16> rows(size_t(capacity) * columns), out(rows), drows(rows);
    EpDispatchParams params = by_choice(batch, rows_view(batch.x), route, rows_view(rows));
    dispatch(rank, params);
    if (route.counts != counts) differ("the counts", r, 0);
    check_order(r, route, want);
    for (size_t i = 0; i < want.size(); ++i) {
      const Row& row = want[i];
      for (int c = 0; c < columns; ++c) {
        const float got = number(rows[i * columns + c]);
        const float x = row.rank < 0 ? 0.0f : number(batches_[row.rank].x[size_t(row.token) * columns + c]);
        if (got != x) differ("a row", r, int64_t(i));
        const int64_t expert = row.rank < 0 ? 0 : batches_[row.rank].choice[row.token * options_.top_k + row.k];
        out[i * columns + c] = __float2bfloat16(got * factor(expert));
      }
    }
    exchange_fp8(r, want);
    if (options_.num_nodes == 1) exchange_with_weights(r, want);
    std::vector<__nv_bfloat16> y(size_t(batch.num_tokens) * columns), dx(y);
    combine(rank, pushed(out, route, batch.weight.data(), y, batch.num_tokens));
    // A second one at once, of other rows: its slots must not come before the first have been read.
    std::vector<__nv_bfloat16> negative(out.size()), y_negative(y.size());
    for (size_t i = 0; i < out.size(); ++i) negative[i] = __float2bfloat16(-number(out[i]));
    combine(rank, pushed(negative, route, batch.weight.data(), y_negative, batch.num_tokens));
    check_sums(r, y, false);
    for (size_t i = 0; i < y.size(); ++i) {
      if (number(y[i]) != -number(y_negative[i])) differ("a second result", r, int64_t(i));
    }
    std::vector<float> weight_grad(batch.weight.size());
    params.tokens = rows_view(batch.dy);
    params.finds_route = false;
    params.choice = nullptr;
    params.weight = batch.weight.data();
    params.rows = rows_view(drows);
    params.outputs = out.data();
    params.weight_grad = weight_grad.data();
    dispatch(rank, params);
    check_weight_grad(r, weight_grad);
    for (size_t i = 0; i < want.size(); ++i) {
      const Row& row = want[i];
      for (int c = 0; row.rank >= 0 && c < columns; ++c) {
        const Batch& from = batches_[row.rank];
        const float dy = number(from.dy[size_t(row.token) * columns + c]);
        const float expected = number(__float2bfloat16(dy * from.weight[row.token * options_.top_k + row.k]));
        if (number(drows[i * columns + c]) != expected) differ("a row of the gradient", r, int64_t(i));
      }
    }
    combine(rank, pushed(drows, route, nullptr, dx, batch.num_tokens));
    check_sums(r, dx, true);
  }

  EpCombineParams pushed(const std::vector<__nv_bfloat16>& rows, Route& route, const float* weight,
                         std::vector<__nv_bfloat16>& tokens, int num_tokens) const {
    EpCombineParams params{};
    params.rows = rows.data();
    params.route = route.route;
    params.room = EpRoom::kNone;
    params.rail_words = route.rails.data();
    params.weight = weight;
    params.tokens = tokens.data();
    params.num_tokens = num_tokens;
    params.num_sms = kBlocks;
    return params;
  }

  struct WeighedRows {
    Route route;
    std::vector<__nv_bfloat16> rows;
    std::vector<float> row_weight;
    std::vector<uint32_t> place;
  };

  void dispatch_with_weights(int r, int capacity, WeighedRows& arrived) {
    Batch& batch = batches_[r];
    make(arrived.route, ranks_[r].team, capacity);
    arrived.rows.resize(size_t(capacity) * options_.columns);
    arrived.row_weight.assign(capacity, NAN);
    arrived.place.resize(batch.choice.size());
    EpDispatchParams params = by_choice(batch, rows_view(batch.x), arrived.route, rows_view(arrived.rows));
    params.weight = batch.weight.data();
    params.row_weight = arrived.row_weight.data();
    params.place = arrived.place.data();
    dispatch(ranks_[r], params);
  }

  EpCombineParams fetch_of(WeighedRows& arrived, int chunk, std::vector<__nv_bfloat16>& tokens, int num_tokens) const {
    EpCombineParams params = pushed({}, arrived.route, nullptr, tokens, num_tokens);
    params.place = arrived.place.data();
    params.room = EpRoom::kResults;
    params.first_row = int64_t(chunk) * most_rows();
    return params;
  }

  // Rows get their weights along and stay where they are, in both directions. A row's gradient of its weight is made
  // up. All chunks are the same tokens; those of odd number come back negated.
  void exchange_with_weights(int r, const std::vector<Row>& want) {
    WeighedRows arrived[kChunks];
    std::vector<float> row_weight_grad[kChunks];
    for (WeighedRows& chunk : arrived) dispatch_with_weights(r, int(want.size()) + kBlock, chunk);
    for (int i = 0; i < kChunks; ++i) row_weight_grad[i] = fill_rooms(r, want, arrived[i], i);
    for (int i = 0; i < kChunks; ++i) fetch_results(r, arrived[i], i);
    for (int i = kChunks - 1; i >= 0; --i) fetch_gradients(r, arrived[i], i, row_weight_grad[i]);
  }

  static float sign_of(int chunk) { return chunk % 2 == 0 ? 1.0f : -1.0f; }

  // Returns the gradients of the rows' weights.
  std::vector<float> fill_rooms(int r, const std::vector<Row>& want, const WeighedRows& arrived, int chunk) const {
    const Team& team = ranks_[r].team;
    const int columns = options_.columns;
    std::vector<float> row_weight_grad(arrived.row_weight.size());
    const auto in_room = [&](EpRoom room) {
      auto* rows = reinterpret_cast<__nv_bfloat16*>(team.self + room_offset(team.at, room));
      return rows + int64_t(chunk) * most_rows() * columns;
    };
    for (size_t i = 0; i < want.size(); ++i) {
      const Row& row = want[i];
      const Batch* from = row.rank < 0 ? nullptr : &batches_[row.rank];
      const size_t entry = size_t(row.token) * options_.top_k + row.k;
      if (arrived.row_weight[i] != (from == nullptr ? 0.0f : from->weight[entry])) {
        differ("a row's weight", r, int64_t(i));
      }
      row_weight_grad[i] = from == nullptr ? NAN : sign_of(chunk) * made_up(*from, entry);
      for (int c = 0; c < columns; ++c) {
        const float x = from == nullptr ? NAN : number(from->x[size_t(row.token) * columns + c]);
        const float out =
            from == nullptr ? NAN : sign_of(chunk) * number(__float2bfloat16(x * factor(from->choice[entry])));
        in_room(EpRoom::kResults)[i * columns + c] = __float2bfloat16(out);
        in_room(EpRoom::kGradients)[i * columns + c] = __float2bfloat16(-out);
      }
    }
    return row_weight_grad;
  }

  void fetch_results(int r, WeighedRows& arrived, int chunk) {
    const Batch& batch = batches_[r];
    std::vector<__nv_bfloat16> y(size_t(batch.num_tokens) * options_.columns);
    combine(ranks_[r], fetch_of(arrived, chunk, y, batch.num_tokens));
    check_sums("a fetched result", r, y, sign_of(chunk));
  }

  void fetch_gradients(int r, WeighedRows& arrived, int chunk, const std::vector<float>& row_weight_grad) {
    const Batch& batch = batches_[r];
    std::vector<__nv_bfloat16> dx(size_t(batch.num_tokens) * options_.columns);
    std::vector<float> weight_grad(batch.weight.size(), NAN);
    EpCombineParams params = fetch_of(arrived, chunk, dx, batch.num_tokens);
    params.room = EpRoom::kGradients;
    params.row_weight_grad = row_weight_grad.data();
    params.weight_grad = weight_grad.data();
    combine(ranks_[r], params);
    check_sums("a fetched gradient", r, dx, -sign_of(chunk));
    for (size_t entry = 0; entry < weight_grad.size(); ++entry) {
      if (weight_grad[entry] != sign_of(chunk) * made_up(batch, entry)) {
        differ("a fetched gradient of a weight", r, int64_t(entry));
      }
    }
  }

  void check_sums(const char* what, int r, const std::vector<__nv_bfloat16>& got, float sign) {
    const Batch& batch = batches_[r];
    for (size_t i = 0; i < got.size(); ++i) {
      float sum = 0;
      for (int k = 0; k < options_.top_k; ++k) {
        const size_t entry = i / options_.columns * options_.top_k + k;
        sum += number(__float2bfloat16(number(batch.x[i]) * factor(batch.choice[entry])));
      }
      if (number(got[i]) != sign * number(__float2bfloat16(sum))) differ(what, r, int64_t(i));
    }
  }

  static float made_up(const Batch& batch, size_t entry) { return batch.weight[entry] * 3 + 1; }

  // Rows of a rank that gets everybody's.
  int most_rows() const {
    const int ranks = options_.num_nodes * options_.node_size, local = options_.experts / ranks;
    return round_up(ranks * options_.max_tokens * std::min(options_.top_k, local), kBlock) + (local + 1) * kBlock;
  }

  // Every row once, padding last, and tokens not far from the order of their numbers.
  void check_order(int r, const Route& route, const std::vector<Row>& want) const {
    const int num_rows = int(want.size());
    std::vector<int> seen(route.order.begin(), route.order.begin() + num_rows);
    std::sort(seen.begin(), seen.end());
    for (int i = 0; i < num_rows; ++i) {
      if (seen[i] != i) differ("the rows of the order", r, i);
    }
    int last = 0;  // the greatest number of a group of 32 choices so far
    for (int i = 0; i < num_rows; ++i) {
      const Row& row = want[route.order[i]];
      const int group = row.rank < 0 ? INT_MAX : (row.token * options_.top_k + row.k) / 32;
      const bool in_turns = int(ranks_.size()) <= kTurns;  // more ranks come in several turns of a chunk each
      if (in_turns && group < last) differ("the order", r, i);
      last = std::max(last, group);
    }
  }

  void exchange_fp8(int r, const std::vector<Row>& want) {
    Batch& batch = batches_[r];
    const int columns = options_.columns, scales = num_scales(), capacity = int(want.size()) + kBlock;
    Route route;
    make(route, ranks_[r].team, capacity);
    std::vector<uint8_t> rows(size_t(capacity) * columns);
    std::vector<float> row_scale(size_t(capacity) * scales);
    // The high and low bytes of BF16 numbers are as good as any; a token is half of its row.
    const EpRows tokens{batch.x.data(), batch.scale.data(), columns * 2, std::max(1, batch.num_tokens), columns,
                        scales};
    dispatch(ranks_[r],
             by_choice(batch, tokens, route, {rows.data(), row_scale.data(), columns, capacity, columns, scales}));
    for (size_t i = 0; i < want.size(); ++i) {
      for (int c = 0; want[i].rank < 0 && c < columns + scales; ++c) {
        const bool is_zero =
            c < columns ? rows[i * columns + c] == 0 : row_scale[size_t(c - columns) * capacity + i] == 0;
        if (!is_zero) differ("padding of FP8", r, int64_t(i));
      }
      if (want[i].rank < 0) continue;
      const Batch& from = batches_[want[i].rank];
      const auto* bytes = reinterpret_cast<const uint8_t*>(from.x.data() + size_t(want[i].token) * columns);
      if (std::memcmp(bytes, rows.data() + i * columns, columns) != 0) differ("an FP8 row", r, int64_t(i));
      for (int s = 0; s < scales; ++s) {
        const float scale = from.scale[size_t(s) * std::max(1, from.num_tokens) + want[i].token];
        if (scale != row_scale[size_t(s) * capacity + i]) differ("a scale", r, int64_t(i));
      }
    }
  }

  void check_sums(int r, const std::vector<__nv_bfloat16>& got, bool is_gradient) const {
    const Batch& batch = batches_[r];
    for (size_t i = 0; i < got.size(); ++i) {
      const size_t token = i / options_.columns;
      float sum = 0;
      for (int k = 0; k < options_.top_k; ++k) {
        const size_t entry = token * options_.top_k + k;
        const float weight = batch.weight[entry];
        sum = is_gradient
                  ? sum + number(__float2bfloat16(number(batch.dy[i]) * weight))
                  : fmaf(number(__float2bfloat16(number(batch.x[i]) * factor(batch.choice[entry]))), weight, sum);
      }
      if (number(got[i]) != number(__float2bfloat16(sum)))
        differ(is_gradient ? "a gradient" : "a result", r, int64_t(i));
    }
  }

  void check_weight_grad(int r, const std::vector<float>& got) const {
    const Batch& batch = batches_[r];
    for (size_t entry = 0; entry < got.size(); ++entry) {
      double sum = 0, magnitude = 0;
      for (int c = 0; c < options_.columns; ++c) {
        const size_t i = entry / options_.top_k * options_.columns + c;
        const double out = number(__float2bfloat16(number(batch.x[i]) * factor(batch.choice[entry])));
        sum += out * number(batch.dy[i]);
        magnitude += std::abs(out * number(batch.dy[i]));
      }
      // Each of the additions, one a column at most, errs by 2^-24 of the sum of magnitudes.
      if (!(std::abs(got[entry] - sum) <= options_.columns * std::ldexp(magnitude, -24))) {
        differ("a weight's gradient", r, int64_t(entry));
      }
    }
  }

  void dispatch_alone(int r) {
    Batch& batch = batches_[r];
    const int capacity =
        round_up(options_.max_tokens * options_.top_k * int(ranks_.size()), kBlock) + kBlock * num_local();
    Route route;
    make(route, ranks_[r].team, capacity);
    std::vector<__nv_bfloat16> rows(size_t(capacity) * options_.columns);
    dispatch(ranks_[r], by_choice(batch, rows_view(batch.x), route, rows_view(rows)));
    if (route.offsets.back() != 0) differ("the layout without a peer", r, route.offsets.back());
  }

  // No room at rank 0: all hear of it and give no result.
  void overflow(int r) {
    Batch& batch = batches_[r];
    batch.num_tokens = options_.max_tokens;
    batch.choice.assign(size_t(options_.max_tokens) * options_.top_k, 0);
    for (size_t i = 0; i < batch.choice.size(); ++i) batch.choice[i] = int64_t(i) % options_.top_k;
    batch.x.resize(size_t(options_.max_tokens) * options_.columns);
    const int capacity = options_.max_tokens * options_.top_k * int(ranks_.size()) + kBlock * num_local();
    Route route;
    make(route, ranks_[r].team, r == 0 ? kBlock : round_up(capacity, kBlock));
    std::vector<__nv_bfloat16> rows(size_t(route.route.capacity) * options_.columns), y(batch.x.size());
    dispatch(ranks_[r], by_choice(batch, rows_view(batch.x), route, rows_view(rows)));
    combine(ranks_[r], pushed(rows, route, nullptr, y, batch.num_tokens));
    for (size_t i = 0; i < y.size(); ++i) {
      if (!std::isnan(number(y[i]))) differ("a result of rows that did not fit", r, int64_t(i));
    }
    const EpFault expected = r == 0 ? EpFault::kOverflow : EpFault::kPeerOverflow;
    if (!ranks_[r].error.is_complete || ranks_[r].error.fault != expected) differ("the overflow's record", r, 0);
  }

  Options options_;
  std::vector<std::unique_ptr<host::Rail>> rails_;
  std::vector<Rank> ranks_;
  std::vector<Batch> batches_;
};

}  // namespace
}  // namespace dsv3rt

int main(int argc, char** argv) {
  if (argc != 10) return 2;
  int values[9];
  for (int i = 0; i < 9; ++i) values[i] = std::atoi(argv[i + 1]);
  const dsv3rt::Options options{values[0], values[1], values[2], values[3], values[4],
                                values[5], values[6], values[7], values[8]};
  dsv3rt::World(options).run();
  dsv3rt::World(options).run_without_last();
  if (options.num_nodes == 1) dsv3rt::World(options).run_without_last_results();
  return 0;
}
