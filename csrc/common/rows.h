// How the rows of a call lie in memory: element types, strides, labels. Torch-free, for host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace ltk {

enum class ElementType : int { f64, f32, bf16, f16, i64, i32, i16, i8, u64, u32, u16, u8 };

LTK_HOST_DEVICE constexpr bool is_floating(ElementType type) { return type <= ElementType::f16; }

// Row r of an (outer, C, inner) tensor is (r / inner, :, r % inner). Strides in elements.
struct Layout {
  int64_t inner = 1, stride_outer = 0, stride_class = 1, stride_inner = 0;
  LTK_HOST_DEVICE_MEMBER int64_t offset(int64_t row) const {
    return inner == 1 ? row * stride_outer : row / inner * stride_outer + row % inner * stride_inner;
  }
};

LTK_HOST_DEVICE int64_t label_at(const void* target, ElementType type, int64_t row) {
  switch (type) {
    case ElementType::i64:
      return static_cast<const int64_t*>(target)[row];
    case ElementType::i32:
      return static_cast<const int32_t*>(target)[row];
    case ElementType::i16:
      return static_cast<const int16_t*>(target)[row];
    case ElementType::i8:
      return static_cast<const int8_t*>(target)[row];
    case ElementType::u64:
      return static_cast<int64_t>(static_cast<const uint64_t*>(target)[row]);
    case ElementType::u32:
      return static_cast<const uint32_t*>(target)[row];
    case ElementType::u16:
      return static_cast<const uint16_t*>(target)[row];
    default:
      return static_cast<const uint8_t*>(target)[row];
  }
}

}  // namespace ltk
