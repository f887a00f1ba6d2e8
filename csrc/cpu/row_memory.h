// Rows of tensors of any layout and type in and out of memory, a tile of rows at a time. Included by the kernels_*.cpp
// files only, which are compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "common/rows.h"
#include "cpu/simd.h"

namespace ltk::LTK_ISA {
namespace {

// The next row's memory, fetched while this row is computed: without it a batch larger than the cache waits for each
// row's logits in sweep (1) and leaves the memory idle in sweep (2) (512x8142, one thread: 0.45 instead of 0.56 ns a
// logit). Null for short rows, which the processor fetches ahead by itself.
struct Ahead {
  const char* input = nullptr;
  const char* gradient = nullptr;
  int64_t input_bytes = 0, gradient_bytes = 0;  // of an element
  void column(int64_t j) const {
    __builtin_prefetch(input + j * input_bytes, 0, 2);
    __builtin_prefetch(gradient + j * gradient_bytes, 1, 2);
  }
};

constexpr int64_t max_tile = 16;      // 16 floats are a cache line
constexpr int64_t short_tile = 4096;  // logits of a tile of short rows, which stay in L1

// Memory on a cache line. Not a std::vector: its functions would have external linkage (see common/row_loss.h).
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count > 0 ? static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)) : nullptr) {
    if (count > 0 && data_ == nullptr) std::abort();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return data_; }

 private:
  T* data_;
};

// A tensor of rows: used where they are if they hold T at unit class stride, and otherwise in scratch rows of T.
// Without data there are only scratch rows. `tile` rows pass together, so that where classes are strided neighbouring
// rows share cache lines.
template <class T>
class Rows {
 public:
  Rows(const void* data, ElementType type, const Layout& layout, int64_t classes, int64_t tile)
      : data_(static_cast<char*>(const_cast<void*>(data))),
        type_(type),
        layout_(layout),
        classes_(classes),
        direct_(data != nullptr && layout.stride_class == 1 &&
                type == (sizeof(T) == 4 ? ElementType::f32 : ElementType::f64)),
        scratch_(direct_ ? 0 : tile * classes) {}
  T* row(int64_t first, int64_t row) {
    return direct_ ? reinterpret_cast<T*>(data_) + layout_.offset(row) : scratch_.data() + (row - first) * classes_;
  }
  // Where a row lies if it lies in one piece, else the scratch memory, which is in the cache.
  const char* memory(int64_t row) {
    return in_one_piece() ? data_ + layout_.offset(row) * element_bytes()
                          : reinterpret_cast<const char*>(scratch_.data());
  }
  int64_t element_bytes() const {
    const bool half = type_ == ElementType::bf16 || type_ == ElementType::f16;
    return !in_one_piece() ? int64_t(sizeof(T)) : half ? 2 : type_ == ElementType::f32 ? 4 : 8;
  }
  void read(int64_t begin, int64_t end) {
    each(
        begin, end, [&](auto* from, T* to) { widen(from, classes_, to); },
        [](auto* from, T* to) { *to = T(to_float(*from)); });
  }
  void write(int64_t begin, int64_t end) {
    each(
        begin, end, [&](auto* to, T* from) { narrow(from, classes_, to); },
        [](auto* to, T* from) { round_to(to, *from); });
  }

 private:
  bool in_one_piece() const { return data_ != nullptr && layout_.stride_class == 1; }
  template <class Whole, class One>
  void each(int64_t begin, int64_t end, Whole whole, One one) {
    if (direct_ || data_ == nullptr) return;
    switch (type_) {
      case ElementType::bf16:
        return each_of<BFloat16>(begin, end, whole, one);
      case ElementType::f16:
        return each_of<Float16>(begin, end, whole, one);
      case ElementType::f32:
        return each_of<float>(begin, end, whole, one);
      default:
        return each_of<double>(begin, end, whole, one);
    }
  }
  template <class E, class Whole, class One>
  void each_of(int64_t begin, int64_t end, Whole whole, One one) {
    E* data = reinterpret_cast<E*>(data_);
    T* scratch = scratch_.data();
    if (layout_.stride_class == 1) {
      for (int64_t r = begin; r < end; ++r) whole(data + layout_.offset(r), scratch + (r - begin) * classes_);
      return;
    }
    int64_t offsets[max_tile];
    for (int64_t first = begin; first < end; first += max_tile, scratch += max_tile * classes_) {
      const int64_t rows = std::min(end - first, max_tile);
      for (int64_t r = 0; r < rows; ++r) offsets[r] = layout_.offset(first + r);
      for (int64_t j = 0; j < classes_; ++j)
        for (int64_t r = 0; r < rows; ++r)
          one(data + offsets[r] + j * layout_.stride_class, scratch + r * classes_ + j);
    }
  }

  char* data_;
  ElementType type_;
  Layout layout_;
  int64_t classes_;
  bool direct_;
  Scratch<T> scratch_;
};

}  // namespace
}  // namespace ltk::LTK_ISA
