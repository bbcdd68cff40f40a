// CUDA's vocabulary for the host compiler: what device code includes instead of CUDA's headers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "executor.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define SA_SHARED_MEMORY(name) unsigned char* const name = simt::shared_memory()

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

using std::max, std::min;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace simt {

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
float bfloat16_to_float(uint16_t bits);
uint16_t float_to_bfloat16(float x);

int atomic_add(int* p, int x);
unsigned long long atomic_add(unsigned long long* p, unsigned long long x);
float atomic_add(float* p, float x);
int atomic_min(int* p, int x);
int atomic_max(int* p, int x);
int atomic_or(int* p, int x);
int atomic_exchange(int* p, int x);
int atomic_compare_exchange(int* p, int expected, int x);

// What a lane brings to an operation of its warp, and takes from it.
template <class T>
struct Exchange {
  T value;
  int source;  // the lane it reads
  T result;
};

template <class T>
T read_lane(const char* name, uint32_t mask, T value, int source, Place place) {
  Exchange<T> mine{value, source, value};
  warp_collective(name, mask, &mine, [](void* const* lanes, uint32_t members) {
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] == nullptr) continue;
      auto& to = *static_cast<Exchange<T>*>(lanes[i]);
      if ((members >> to.source & 1) == 0) fail("a shuffle reads a lane that is not in its mask");
      to.result = static_cast<Exchange<T>*>(lanes[to.source])->value;
    }
  }, place);
  return mine.result;
}

template <class T, class F>
T combine_lanes(const char* name, uint32_t mask, T value, F, Place place) {
  Exchange<T> mine{value, 0, value};
  warp_collective(name, mask, &mine, [](void* const* lanes, uint32_t members) {
    const int first = __builtin_ctz(members);
    T all = static_cast<Exchange<T>*>(lanes[first])->value;
    for (int i = first + 1; i < 32; ++i)
      if (lanes[i] != nullptr) all = F{}(all, static_cast<Exchange<T>*>(lanes[i])->value);
    for (int i = 0; i < 32; ++i)
      if (lanes[i] != nullptr) static_cast<Exchange<T>*>(lanes[i])->result = all;
  }, place);
  return mine.result;
}

inline int lane() { return static_cast<int>((threadIdx.x + blockDim.x * threadIdx.y) % 32); }

}  // namespace simt

#define SIMT_HERE simt::Place place = simt::Place::current()

inline void __syncthreads(SIMT_HERE) {
  simt::block_barrier("__syncthreads", simt::Vote::none, 0, place);
}
inline int __syncthreads_or(int x, SIMT_HERE) {
  return simt::block_barrier("__syncthreads_or", simt::Vote::any, x, place);
}
inline int __syncthreads_and(int x, SIMT_HERE) {
  return simt::block_barrier("__syncthreads_and", simt::Vote::all, x, place);
}
inline int __syncthreads_count(int x, SIMT_HERE) {
  return simt::block_barrier("__syncthreads_count", simt::Vote::count, x, place);
}
inline void __syncwarp(uint32_t mask = 0xffffffff, SIMT_HERE) {
  simt::warp_collective("__syncwarp", mask, &mask, [](void* const*, uint32_t) {
    simt::order_warp_memory();
  }, place);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, SIMT_HERE) {
  const int first = simt::lane() / width * width;
  return simt::read_lane("__shfl_sync", mask, value, first + source % width, place);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, SIMT_HERE) {
  const int source = simt::lane() ^ lanes, last = simt::lane() / width * width + width - 1;
  return simt::read_lane("__shfl_xor_sync", mask, value, source > last ? simt::lane() : source,
                         place);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, SIMT_HERE) {
  const int first = simt::lane() / width * width, source = simt::lane() - delta;
  return simt::read_lane("__shfl_up_sync", mask, value, source < first ? simt::lane() : source,
                         place);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, SIMT_HERE) {
  const int end = simt::lane() / width * width + width, source = simt::lane() + delta;
  return simt::read_lane("__shfl_down_sync", mask, value, source >= end ? simt::lane() : source,
                         place);
}

inline uint32_t __ballot_sync(uint32_t mask, int x, SIMT_HERE) {
  const uint32_t mine = x != 0 ? 1u << simt::lane() : 0;
  return simt::combine_lanes("__ballot_sync", mask, mine, [](auto a, auto b) { return a | b; },
                             place);
}
inline int __any_sync(uint32_t mask, int x, SIMT_HERE) {
  return simt::combine_lanes("__any_sync", mask, int{x != 0}, [](int a, int b) { return a | b; },
                             place);
}
inline int __all_sync(uint32_t mask, int x, SIMT_HERE) {
  return simt::combine_lanes("__all_sync", mask, int{x != 0}, [](int a, int b) { return a & b; },
                             place);
}
template <class T>
T __reduce_add_sync(uint32_t mask, T x, SIMT_HERE) {
  return simt::combine_lanes("__reduce_add_sync", mask, x, [](T a, T b) { return T(a + b); },
                             place);
}
template <class T>
T __reduce_min_sync(uint32_t mask, T x, SIMT_HERE) {
  return simt::combine_lanes("__reduce_min_sync", mask, x, [](T a, T b) { return std::min(a, b); },
                             place);
}
template <class T>
T __reduce_max_sync(uint32_t mask, T x, SIMT_HERE) {
  return simt::combine_lanes("__reduce_max_sync", mask, x, [](T a, T b) { return std::max(a, b); },
                             place);
}
template <class T>
T __reduce_or_sync(uint32_t mask, T x, SIMT_HERE) {
  return simt::combine_lanes("__reduce_or_sync", mask, x, [](T a, T b) { return T(a | b); },
                             place);
}

inline int atomicAdd(int* p, int x) { return simt::atomic_add(p, x); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  return simt::atomic_add(p, x);
}
inline float atomicAdd(float* p, float x) { return simt::atomic_add(p, x); }
inline int atomicMin(int* p, int x) { return simt::atomic_min(p, x); }
inline int atomicMax(int* p, int x) { return simt::atomic_max(p, x); }
inline int atomicOr(int* p, int x) { return simt::atomic_or(p, x); }
inline int atomicExch(int* p, int x) { return simt::atomic_exchange(p, x); }
inline int atomicCAS(int* p, int expected, int x) {
  return simt::atomic_compare_exchange(p, expected, x);
}
inline void __threadfence() {}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }

// The sum of c and the products of the four signed bytes of a and b.
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8)
    c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return c;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
// 0 for NaN, the nearest of int's numbers where there is none
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  return static_cast<int>(std::clamp(std::nearbyint(double{x}), -2147483648.0, 2147483647.0));
}
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __fdividef(float a, float b) { return a / b; }
inline uint32_t __float_as_uint(float x) { return __builtin_bit_cast(uint32_t, x); }
inline float __uint_as_float(uint32_t x) { return __builtin_bit_cast(float, x); }

inline float __half2float(__half x) { return simt::half_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {simt::float_to_half(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return simt::bfloat16_to_float(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {simt::float_to_bfloat16(x)}; }
