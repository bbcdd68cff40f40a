// What every kernel includes: CUDA's vocabulary, or its stand-ins where the host compiler runs the
// kernels (tests/simt).
#pragma once
#ifdef SIMT_MODULE
#include "simt/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SA_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include "../common/params.h"

namespace sparse_attn {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);  // no NVRTC header has it

// kN elements that are loaded and stored at once, from an address that is a multiple of their size
template <class T, int kN>
struct alignas(sizeof(T) * kN) Pack {
  T elements[kN];
  __device__ __forceinline__ T& operator[](int i) { return elements[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return elements[i]; }
};

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

}  // namespace sparse_attn
