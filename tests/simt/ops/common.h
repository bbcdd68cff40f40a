// From Python's arguments to the parameters of an operator.
#pragma once
#include "cuda/plan.h"
#include "simt/host.h"

namespace sparse_attn {

// The limits that plans see: few multiprocessors, so that small inputs are split over all of them.
inline DeviceLimits limits(const simt::Arguments& a) {
  return {static_cast<int64_t>(a.number("processors", 4)), 163 * 1024};
}

inline DType dtype(const simt::Arguments& a) {
  return static_cast<DType>(static_cast<int>(a.number("dtype")));
}

inline void strides(const simt::Tensor& t, int64_t (&to)[3]) {
  for (int i = 0; i < 3; ++i) to[i] = t.strides[i];
}

inline simt::Index3 index3(const int64_t (&n)[3]) {
  return {static_cast<uint32_t>(n[0]), static_cast<uint32_t>(n[1]), static_cast<uint32_t>(n[2])};
}

// An input that may be left out.
template <class T>
const T* optional(const simt::Arguments& a, const char* name) {
  return a.tensors.count(name) == 0 ? nullptr : a.pointer<T>(name);
}

template <auto kKernel, class P>
void launch(const simt::Arguments& a, const LaunchPlan& plan, const P& p) {
  simt::launch<kKernel>(a, index3(plan.grid), index3(plan.block),
                        static_cast<size_t>(plan.shared_bytes), p);
}

}  // namespace sparse_attn
