// Rows with labels whose classes lie side by side, 16 bytes at a time. What decides these kernels is memory traffic:
//
// * forward: the row is read once and stays in registers, spread over a warp, a block or a cluster of blocks; where not
//   even a cluster holds it, it is read twice. State and loss are a few bytes a row.
// * backward: elementwise once the state is there: one read, one write; columns can be split over blocks at will.
// * the per-class tables (scale, bias, smoothing weights) would be 4 bytes from L2 for every 2 bytes of half logits. A
//   block fetches the part that its columns need into shared memory and then takes many rows.
//
// Shared tables are planar: column p lies in plane p % width at p / width. Element k of the vectors of a warp then is
// read from 32 neighbouring words, whatever the row's alignment: no bank conflicts, which 8 neighbouring columns for
// each thread would have.
#pragma once

#include "cuda/batch.cuh"
#include "cuda/elements.cuh"

namespace ltk::cuda {

enum class Tables { none, shared, global };

// `vectors` is what a block takes of a row, for shared tables and for clusters.
struct VectorCall {
  Call<float> call;
  int vectors;
};

// The block's part of scale, bias and smoothing weights. Only those that the call has are there.
template <class E>
struct SharedTables {
  const float *scale, *bias, *smooth;
  int pitch;

  static constexpr int64_t bytes(int64_t vectors, int count) { return count * width<E> * (vectors + 2) * 4; }

  LTK_DEVICE SharedTables() : scale(nullptr), bias(nullptr), smooth(nullptr), pitch(0) {}
  // Columns from `begin` - width on, for `vectors` vectors that start at begin or up to width - 1 columns before it.
  LTK_DEVICE SharedTables(const Call<float>& call, int64_t begin, int vectors) : pitch(vectors + 2) {
    float* memory = reinterpret_cast<float*>(simt::shared_memory() + shared_header);
    const auto stage = [&](bool wanted, auto value) -> const float* {
      if (!wanted) return nullptr;
      float* table = memory;
      memory += width<E> * pitch;
      for (int p = simt::thread(); p < width<E> * pitch; p += simt::threads()) {
        const int64_t j = begin - width<E> + p;
        table[p % width<E> * pitch + p / width<E>] = j >= 0 && j < call.classes ? value(j) : 0.0f;
      }
      return table;
    };
    scale = stage(call.scale != nullptr, [&](int64_t j) { return call.scale[j]; });
    bias = stage(call.bias != nullptr, [&](int64_t j) { return call.bias[j]; });
    smooth = stage(call.options.label_smoothing > 0.0f && (call.bias != nullptr || call.weight != nullptr),
                   [&](int64_t j) { return smoothing_weight(call, j); });
    simt::sync_block();
  }
};

// How many tables a call needs, as SharedTables stages them.
inline int table_count(const Call<float>& call) {
  const bool smooth = call.options.label_smoothing > 0.0f && (call.bias != nullptr || call.weight != nullptr);
  return (call.scale != nullptr) + (call.bias != nullptr) + smooth;
}

// One row's view of the tables: element k of vector v, of which `local` counts from the block's first.
template <class E, Tables tables>
struct RowTables {
  const Call<float>& call;
  const SharedTables<E>* staged;
  const AlignedRow<E>& row;

  LTK_DEVICE float at(const float* global, const float* shared, int v, int local, int k) const {
    if (tables == Tables::shared) {
      const int p = width<E> - row.shift + k;  // in [1, 2 width)
      return shared[p % width<E> * staged->pitch + local + p / width<E>];
    }
    const int j = row.first(v) + k;
    return j >= 0 && j < row.classes ? global[j] : 0.0f;
  }
  // a x + b of a whole vector, -inf outside the row.
  LTK_DEVICE void adjust(const Vector& raw, int v, int local, float (&u)[width<E>]) const {
    decode(raw, u, E{});
    if (tables != Tables::none && call.scale != nullptr) {
#pragma unroll
      for (int k = 0; k < width<E>; ++k) u[k] *= at(call.scale, staged->scale, v, local, k);
    }
    if (tables != Tables::none && call.bias != nullptr) {
#pragma unroll
      for (int k = 0; k < width<E>; ++k) u[k] += at(call.bias, staged->bias, v, local, k);
    }
    if (row.whole(v)) return;
#pragma unroll
    for (int k = 0; k < width<E>; ++k) {
      const int j = row.first(v) + k;
      if (j < 0 || j >= row.classes) u[k] = -INFINITY;
    }
  }
  LTK_DEVICE float smooth(int v, int local, int k) const {
    if (tables == Tables::none || (call.bias == nullptr && call.weight == nullptr)) return 1.0f;
    if (tables == Tables::shared) return at(nullptr, staged->smooth, v, local, k);
    const int j = row.first(v) + k;
    return j >= 0 && j < row.classes ? smoothing_weight(call, j) : 0.0f;
  }
  LTK_DEVICE float slope(int v, int local, int k) const {
    return tables == Tables::none || call.scale == nullptr ? 1.0f : at(call.scale, staged->scale, v, local, k);
  }
};

// Adjusted logit of one column, as `adjust` rounds it.
template <Tables tables>
LTK_DEVICE float adjusted_at(const Call<float>& call, float x, int64_t j) {
  if (tables != Tables::none && call.scale != nullptr) x *= call.scale[j];
  if (tables != Tables::none && call.bias != nullptr) x += call.bias[j];
  return x;
}

// The sums that a thread's vectors add to a row.
struct RowSums {
  float exponentials, smooth_distance;
};

template <class E, Tables tables>
LTK_DEVICE void add_vector(const RowTables<E, tables>& table, const float (&u)[width<E>], int v, int local, int y,
                           float scale2, float max, bool smoothing, RowSums* sums) {
  float e[width<E>];
#pragma unroll
  for (int k = 0; k < width<E>; ++k) e[k] = simt::exp2(exponent(u[k], scale2, max));
#pragma unroll
  for (int k = 0; k < width<E>; ++k) sums->exponentials += e[k];
  if (!smoothing) return;
#pragma unroll
  for (int k = 0; k < width<E>; ++k) {
    const int j = table.row.first(v) + k;
    if (j < 0 || j >= table.row.classes || j == y) continue;
    const float weight = table.smooth(v, local, k);
    sums->smooth_distance += weighted(weight, max - u[k]);
  }
}

// Takes the label out of a vector: it is a term of its own, so that p - 1 never cancels.
template <int count>
LTK_DEVICE void leave_out(int at, float (&u)[count]) {
  if (unsigned(at) >= unsigned(count)) return;
#pragma unroll
  for (int k = 0; k < count; ++k)
    if (k == at) u[k] = -INFINITY;
}

constexpr int row_threads(Group group) { return group == Group::warp ? 128 : 512; }
constexpr int row_blocks(int held, Group group) { return group == Group::warp ? 8 : held > 4 ? 1 : 2; }

// `held` vectors a thread stay in registers between the maximum and the sum; 0: the row is read twice.
template <class E, Tables tables, int held, Group group>
LTK_KERNEL(row_threads(group), row_blocks(held, group))
forward_vectors(const VectorCall arguments) {
  const Call<float>& call = arguments.call;
  RowOptions<float> options = call.options;
  count_smoothing(call, &options);
  constexpr int n = width<E>;
  const bool smoothing = options.label_smoothing > 0.0f;
  const int part = group == Group::cluster ? simt::cluster_rank() : 0;
  const int begin = part * arguments.vectors;  // the block's first vector
  SharedTables<E> staged_tables =
      tables == Tables::shared ? SharedTables<E>(call, int64_t(begin) * n, arguments.vectors) : SharedTables<E>();
  const SharedTables<E>* staged = &staged_tables;

  const int threads = group == Group::warp ? simt::warp_size : simt::threads();
  const int mine = group == Group::warp ? lane() : simt::thread();
  const int64_t stride = group == Group::warp    ? simt::blocks() * warps()
                         : group == Group::block ? simt::blocks()
                                                 : simt::blocks() / simt::cluster_size();
  const int64_t start = group == Group::warp    ? simt::block() * warps() + warp()
                        : group == Group::block ? simt::block()
                                                : simt::block() / simt::cluster_size();
  const float scale2 = call.uniform_scale * log2_e<float>;
  Totals totals{0.0, 0.0};
  int64_t next_label = start < call.rows ? raw_label(call, start) : 0;
  for (int64_t r = start; r < call.rows; r += stride) {
    Label label = check_range(call, next_label);
    if (r + stride < call.rows) next_label = raw_label(call, r + stride);  // or the next row's loads would wait for it
    if (label.ignored || label.error != 0) {
      if (mine == 0 && part == 0) add_row_without_logits(call, r, label, &totals);
      continue;
    }
    const int y = int(label.y);
    const AlignedRow<E> row(call.input, call.input_layout.offset(r), call.classes);
    const RowTables<E, tables> table{call, staged, row};
    const int end = group == Group::cluster
                        ? (row.vectors() < begin + arguments.vectors ? row.vectors() : begin + arguments.vectors)
                        : row.vectors();
    Vector raw[held > 0 ? held : 1];
#pragma unroll
    for (int i = 0; i < held; ++i) {
      const int v = begin + i * threads + mine;
      raw[i] = v < end ? row.load(v) : Vector{};
    }
    if (is_absent(call, y)) {
      label.error = label_of_absent_class;
      if (mine == 0 && part == 0) add_row_without_logits(call, r, label, &totals);
      continue;
    }
    // While a block computes it loads nothing, and few blocks share a multiprocessor: memory would idle in between.
    // Meanwhile the next row comes into L2, a request for each line of 128 bytes.
    if (group != Group::warp && r + stride < call.rows) {
      const AlignedRow<E> next(call.input, call.input_layout.offset(r + stride), call.classes);
#pragma unroll
      for (int i = 0; i < held; ++i) {
        const int v = begin + i * threads + mine;
        if (mine % 8 == 0 && next.whole(v)) simt::prefetch(next.row + next.first(v));
      }
    }
    const float label_logit = adjusted_at<tables>(call, widen(row.row[y]), y) - margin_of(call, y);

    // Calls use(vector, local, adjusted logits) for the thread's vectors; the label is -inf in them.
    const auto for_vectors = [&](auto use) {
      if constexpr (held > 0) {
#pragma unroll
        for (int i = 0; i < held; ++i) {
          const int v = begin + i * threads + mine;
          if (v >= end) break;
          float u[n];
          table.adjust(raw[i], v, v - begin, u);
          leave_out(y - row.first(v), u);
          use(v, u);
        }
      } else {
        for (int v = begin + mine; v < end; v += threads) {
          float u[n];
          table.adjust(row.load(v), v, v - begin, u);
          leave_out(y - row.first(v), u);
          use(v, u);
        }
      }
    };
    float max = label_logit;
    for_vectors([&](int, const float (&u)[n]) {
#pragma unroll
      for (int k = 0; k < n; ++k) max = u[k] > max ? u[k] : max;
    });
    max = group_max<group>(max);
    RowSums sums{0.0f, 0.0f};
    for_vectors(
        [&](int v, const float (&u)[n]) { add_vector(table, u, v, v - begin, y, scale2, max, smoothing, &sums); });
    group_sum<group>(&sums.exponentials, &sums.smooth_distance, smoothing);
    if (mine != 0 || part != 0) continue;
    const float scale = call.uniform_scale, below = scale * (max - label_logit);
    const float smooth_weight = smoothing ? smoothing_weight(call, y) : 0.0f;
    RowState<float> state;
    const float loss = finish_label_row(scale * max, sums.exponentials, simt::exp2(exponent(label_logit, scale2, max)),
                                        below, scale * sums.smooth_distance + weighted(smooth_weight, below),
                                        call.weight != nullptr ? call.weight[y] : 1.0f, smooth_weight,
                                        call.row_weight != nullptr ? call.row_weight[r] : 1.0f, options, &state);
    state.max = max;
    add_row(call, r, loss, denominator_part(call, r, label.y), state, &totals);
  }
  if (group == Group::cluster) simt::sync_cluster();  // others may still read this block's shared memory
  finish_batch(call, totals);
}

constexpr int backward_held = 4;

// Columns [tile * vectors, ...) of the rows, a warp or a block a row.
template <class E, Tables tables, Group group>
LTK_KERNEL(group == Group::warp ? 128 : 256, group == Group::warp ? 6 : 4)
backward_vectors(const VectorCall arguments) {
  const Call<float>& call = arguments.call;
  RowOptions<float> options = call.options;
  count_smoothing(call, &options);
  constexpr int n = width<E>;
  const bool smoothing = options.label_smoothing > 0.0f;
  const int begin = simt::tile() * arguments.vectors;
  SharedTables<E> staged_tables =
      tables == Tables::shared ? SharedTables<E>(call, int64_t(begin) * n, arguments.vectors) : SharedTables<E>();
  const int threads = group == Group::warp ? simt::warp_size : simt::threads();
  const int mine = group == Group::warp ? lane() : simt::thread();
  const int64_t stride = group == Group::warp ? simt::blocks() * warps() : simt::blocks();
  const float scale2 = call.uniform_scale * log2_e<float>;
  const float inverse_denominator = read_inverse_denominator(call);
  for (int64_t r = group == Group::warp ? simt::block() * warps() + warp() : simt::block(); r < call.rows;
       r += stride) {
    const Label label = read_label(call, r);
    const AlignedRow<E> row(call.input, call.input_layout.offset(r), call.classes);
    const AlignedRow<E> out(call.gradient, call.gradient_layout.offset(r), call.classes);
    const bool together = row.shift == out.shift;
    const RowTables<E, tables> table{call, &staged_tables, out};
    const int end = out.vectors() < begin + arguments.vectors ? out.vectors() : begin + arguments.vectors;
    const RowState<float> state = read_state(call, r);
    const float factor = call.uniform_scale * inverse_denominator * call.upstream[call.upstream_layout.offset(r)];
    const float probability = factor * state.probability;
    const float smooth = factor * state.factor * options.smoothing_per_class;
    for (int base = begin + mine; base < end; base += backward_held * threads) {
      Vector raw[backward_held];
#pragma unroll
      for (int i = 0; i < backward_held; ++i) {
        const int v = base + i * threads;
        raw[i] = v >= end || label.ignored ? Vector{} : together ? row.load(v) : row.load_from(out.first(v));
      }
#pragma unroll
      for (int i = 0; i < backward_held; ++i) {
        const int v = base + i * threads;
        if (v >= end) break;
        float d[n];
        if (label.ignored) {
#pragma unroll
          for (int k = 0; k < n; ++k) d[k] = 0.0f;
        } else {
          table.adjust(raw[i], v, v - begin, d);
#pragma unroll
          for (int k = 0; k < n; ++k) d[k] = probability * simt::exp2(exponent(d[k], scale2, state.max));
          if (smoothing) {
#pragma unroll
            for (int k = 0; k < n; ++k) d[k] -= smooth * table.smooth(v, v - begin, k);
          }
          const int at = int(label.y) - out.first(v);
          if (unsigned(at) < unsigned(n)) {
#pragma unroll
            for (int k = 0; k < n; ++k)
              if (k == at) d[k] = factor * state.at_label;
          }
          if (tables != Tables::none && call.scale != nullptr) {
#pragma unroll
            for (int k = 0; k < n; ++k) d[k] *= table.slope(v, v - begin, k);
          }
        }
        out.store(v, d);
      }
    }
  }
}

}  // namespace ltk::cuda
