// The only header that includes torch: libtorch's stable ABI, short names, checks.
#pragma once
#include <cmath>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "params.h"

// The namespace of the operators occurs here and in sparse_attn/registry.py, nowhere else.
#define SA_LIBRARY_IMPL_IN(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define SA_LIBRARY_IMPL(key, m) SA_LIBRARY_IMPL_IN(sparse_attn, key, m)

#define SA_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace sparse_attn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: SA_CHECK(false, name, ": expected float32, float16 or bfloat16"); return DType::f32;
  }
}

// Kernels hold positions, and positions plus a group of keys, in 32 bits.
inline void check_lengths(int64_t queries, int64_t keys) {
  constexpr int64_t kLimit = (int64_t{1} << 31) - 256;
  SA_CHECK(queries < kLimit && keys < kLimit - queries, "query, key: lengths ", queries, " and ",
           keys, ", expected less than ", kLimit, " tokens together");
}

// Kernels compute in float32, where a large double is infinite.
inline void check_scale(std::optional<double> scale) {
  SA_CHECK(std::isfinite(static_cast<float>(scale.value_or(0))),
           "scale: expected a number that is finite in float32");
}

// The kernels take any strides except in the last dimension.
inline Tensor last_dim_contiguous(const Tensor& t) {
  return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1 ? t : torch::stable::contiguous(t);
}

// [B, H, T, D] for kernels that load 16 bytes at a time and count rows in 32 bits: rows begin at
// multiples of 16 bytes, less than 2 GiB apart. Others are copied.
inline bool rows_are_aligned(const Tensor& x) {
  const int64_t vector = 16 / element_bytes(dtype_of(x, "tensor"));
  bool fits = x.stride(3) == 1 || x.size(3) == 1;
  fits = fits && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < 3; ++i) fits = fits && (x.size(i) == 1 || x.stride(i) % vector == 0);
  return fits && (x.size(2) == 1 || x.stride(2) < int64_t{1} << 30);
}

inline Tensor aligned_rows(const Tensor& t) {
  const Tensor x = last_dim_contiguous(t);
  return rows_are_aligned(x) ? x : torch::stable::contiguous(torch::stable::clone(x));
}

}  // namespace sparse_attn
