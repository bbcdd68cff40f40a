// The checks of squeezed_attend and its parameters, for the bindings of every device.
#pragma once
#include <cmath>
#include <optional>

#include "stable.h"

namespace sparse_attn {

// A call through torch.ops has not been checked by anybody.
inline void check_squeezed_attend(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const Tensor& tail_key, const Tensor& tail_value,
                                  const Tensor& starts, const Tensor& sums, const Tensor& counts,
                                  const Tensor* tail_lengths, std::optional<double> scale) {
  SA_CHECK(query.dim() == 4 && query.numel() > 0, "query: expected [B, Hq, Tq, D], not empty");
  dtype_of(query, "query");
  SA_CHECK(key.dim() == 4 && key.numel() > 0, "key: expected [C, Hkv, Tk, D], not empty");
  SA_CHECK(value.dim() == 4 && value.numel() > 0, "value: expected [C, Hkv, Tk, Dv], not empty");
  SA_CHECK(tail_key.dim() == 4 && tail_value.dim() == 4,
           "tail_key, tail_value: expected [B, Hkv, N, D], [B, Hkv, N, Dv]");
  for (const Tensor* t : {&key, &value, &tail_key, &tail_value})
    SA_CHECK(t->scalar_type() == query.scalar_type() && t->size(1) == key.size(1),
             "key, value, tail_key, tail_value: dtype differs from query's or heads from key's");
  SA_CHECK(key.size(0) == 1 || key.size(0) == query.size(0),
           "key: batch size is neither 1 nor query's");
  SA_CHECK(value.size(0) == key.size(0) && value.size(2) == key.size(2),
           "value: batch size or length differs from key's");
  SA_CHECK(tail_key.size(0) == query.size(0) && tail_value.size(0) == query.size(0) &&
               tail_value.size(2) == tail_key.size(2),
           "tail_key, tail_value: batch size differs from query's or their lengths differ");
  SA_CHECK(key.size(3) == query.size(3) && tail_key.size(3) == query.size(3) &&
               tail_value.size(3) == value.size(3),
           "key, tail_key, tail_value: head_dim differs");
  SA_CHECK(query.size(1) % key.size(1) == 0, "query: heads are no multiple of key's");
  check_lengths(query.size(2), key.size(2));
  check_lengths(query.size(2), tail_key.size(2));
  const int64_t heads = starts.dim() == 3 ? starts.size(1) : 0;
  SA_CHECK(starts.dim() == 3 && starts.scalar_type() == ScalarType::Int &&
               starts.size(0) == query.size(0) &&
               (heads == query.size(1) || heads == key.size(1)),
           "starts: expected int32 [B, H', R], H' the heads of query or key");
  SA_CHECK(sums.dim() == 3 && sums.scalar_type() == ScalarType::Int &&
               sums.size(0) == starts.size(0) && sums.size(1) == heads &&
               sums.size(2) == starts.size(2),
           "sums: expected int32 of starts' shape");
  SA_CHECK(counts.dim() == 2 && counts.scalar_type() == ScalarType::Int &&
               counts.size(0) == starts.size(0) && counts.size(1) == heads,
           "counts: expected int32 [B, H']");
  if (tail_lengths != nullptr)
    SA_CHECK(tail_lengths->dim() == 1 && tail_lengths->scalar_type() == ScalarType::Int &&
                 tail_lengths->size(0) == query.size(0),
             "tail_lengths: expected int32 [B]");
  check_scale(scale);
}

// All but the results; the tensors have contiguous last dimensions and must outlive it.
inline SqueezedAttendParams squeezed_attend_params(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& tail_key,
    const Tensor& tail_value, const Tensor& starts, const Tensor& sums, const Tensor& counts,
    const Tensor* tail_lengths, std::optional<double> scale) {
  SqueezedAttendParams p{};
  p.query = query.const_data_ptr(), p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.tail_key = tail_key.const_data_ptr(), p.tail_value = tail_value.const_data_ptr();
  p.starts = starts.const_data_ptr<int32_t>(), p.sums = sums.const_data_ptr<int32_t>();
  p.counts = counts.const_data_ptr<int32_t>();
  if (tail_lengths != nullptr) p.tail_lengths = tail_lengths->const_data_ptr<int32_t>();
  for (int i = 0; i < 3; ++i) {
    p.query_stride[i] = query.stride(i);
    p.key_stride[i] = key.stride(i), p.value_stride[i] = value.stride(i);
    p.tail_key_stride[i] = tail_key.stride(i), p.tail_value_stride[i] = tail_value.stride(i);
  }
  if (key.size(0) == 1) p.key_stride[0] = p.value_stride[0] = 0;
  for (int i = 0; i < 2; ++i) {
    p.starts_stride[i] = starts.stride(i), p.sums_stride[i] = sums.stride(i);
    p.counts_stride[i] = counts.stride(i);
  }
  p.B = query.size(0), p.Hq = query.size(1), p.Tq = query.size(2), p.D = query.size(3);
  p.Hkv = key.size(1), p.Tk = key.size(2), p.Dv = value.size(3), p.N = tail_key.size(2);
  p.Hd = starts.size(1), p.runs = starts.size(2);
  p.scale = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.D))));
  p.dtype = dtype_of(query, "query");
  return p;
}

}  // namespace sparse_attn
