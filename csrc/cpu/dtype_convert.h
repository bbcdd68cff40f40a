// Scalar conversions between the supported dtypes and float, for code off the hot path.
#pragma once
#include <cstdint>

#include "../common/params.h"
#include "../common/stable.h"

namespace sparse_attn {

inline void store_as(DType dtype, void* base, int64_t at, float x) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(base)[at] = x; return;
    case DType::f16: static_cast<c10::Half*>(base)[at] = x; return;
    case DType::bf16: static_cast<c10::BFloat16*>(base)[at] = x; return;
  }
}

}  // namespace sparse_attn
