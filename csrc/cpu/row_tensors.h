// The tensors of a call of cross_entropy, a tile of rows at a time. Included by the kernels_*.cpp files only.
#pragma once

#include <algorithm>

#include "cpu/cross_entropy.h"
#include "cpu/row_memory.h"

namespace ltk::LTK_ISA {
namespace {

// The three tensors of a call, read and written a tile of rows at a time.
template <class T>
struct Tensors {
  bool probabilities, long_rows;
  int64_t tile;
  Rows<T> input, gradient, target;

  explicit Tensors(const CrossEntropyCall<T>& call)
      : probabilities(is_floating(call.target_type)),
        long_rows(call.classes >= 256),
        tile(call.input_layout.stride_class != 1 || (call.gradient && call.gradient_layout.stride_class != 1) ||
                     (probabilities && call.target_layout.stride_class != 1)
                 ? max_tile
                 : std::clamp<int64_t>(short_tile / call.classes, 1, max_tile)),
        input(call.input, call.input_type, call.input_layout, call.classes, tile),
        gradient(call.gradient, call.gradient_type, call.gradient_layout, call.classes, tile),
        target(probabilities ? call.target : nullptr, call.target_type, call.target_layout,
               probabilities ? call.classes : 0, tile) {}

  // Calls rows(first, last) for every tile, with its logits and probabilities read and its gradient to be written.
  template <class Tile>
  void for_tiles(int64_t begin, int64_t end, Tile rows) {
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t last = std::min(first + tile, end);
      input.read(first, last);
      target.read(first, last);
      rows(first, last);
      gradient.write(first, last);
    }
  }
  // The memory of the row after `row`, one of those before `end`.
  Ahead ahead(int64_t row, int64_t end) {
    if (!long_rows || row + 1 >= end) return {};
    return {input.memory(row + 1), gradient.memory(row + 1), input.element_bytes(), gradient.element_bytes()};
  }
  // Calls row(index, logits, probabilities or null, the next row's memory, gradient or scratch) for each row.
  template <class Row>
  void for_rows(int64_t begin, int64_t end, Row row) {
    for_tiles(begin, end, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        row(r, input.row(first, r), probabilities ? target.row(first, r) : nullptr, ahead(r, end),
            gradient.row(first, r));
    });
  }
};

}  // namespace
}  // namespace ltk::LTK_ISA
