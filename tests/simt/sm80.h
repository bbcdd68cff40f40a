// The instructions that csrc/cuda/sm80.cuh wraps, with the behaviour that PTX documents.
#pragma once
#include "cuda.h"

namespace sparse_attn {

// Both start to write at once and may finish as late as the wait.
void cp_async_16(void* to, const void* from, bool valid);
void cp_async_commit();
void cp_async_wait_pending(int groups);  // waits until at most so many groups are under way

template <int kGroups>
void cp_async_wait() {
  cp_async_wait_pending(kGroups);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_HERE);
void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, SIMT_HERE);

// d [16, 8] += a [16, 16] b [16, 8]
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE);

// d [16, 8] += a [16, 32] b [32, 8] and a [16, 64] b [64, 8], of integers
void mma_m16n8k32_s8u8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE);
void mma_m16n8k64_s4(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_HERE);

template <class T>
uint32_t pack_two(float low, float high) {
  return from_float<T>(low).bits | uint32_t{from_float<T>(high).bits} << 16;
}

float exp2_approx(float x);

}  // namespace sparse_attn
