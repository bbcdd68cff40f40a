// Kernels that are right, or wrong in one way if `broken`: the executor must tell them apart.
#include "simt/host.h"
#include "simt/sm80.h"

namespace {

using namespace sparse_attn;

struct Parameters {
  const uint16_t* in;
  uint16_t* out;
  int n;
  bool broken;
};

// out = in reversed
void missing_syncthreads(const Parameters& p) {
  SA_SHARED_MEMORY(memory);
  auto* const s = reinterpret_cast<uint16_t*>(memory);
  s[threadIdx.x] = p.in[threadIdx.x];
  if (!p.broken) __syncthreads();
  p.out[threadIdx.x] = s[p.n - 1 - threadIdx.x];
}

// each lane takes its neighbour's
void missing_syncwarp(const Parameters& p) {
  SA_SHARED_MEMORY(memory);
  auto* const s = reinterpret_cast<uint16_t*>(memory);
  s[threadIdx.x] = p.in[threadIdx.x];
  if (!p.broken) __syncwarp();
  p.out[threadIdx.x] = s[threadIdx.x ^ 1];
}

void copy_eight(const Parameters& p, bool wait, bool barrier) {
  SA_SHARED_MEMORY(memory);
  auto* const s = reinterpret_cast<uint16_t*>(memory);
  const int from = threadIdx.x * 8;
  cp_async_16(s + from, p.in + from, true);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  if (barrier) __syncthreads();
  for (int i = 0; i < 8; ++i) p.out[from + i] = s[p.n - 1 - from - i];
}

void missing_wait(const Parameters& p) { copy_eight(p, !p.broken, true); }
void missing_barrier_after_wait(const Parameters& p) { copy_eight(p, true, !p.broken); }

void read_out_of_bounds(const Parameters& p) {
  p.out[threadIdx.x] = p.in[threadIdx.x + (p.broken ? 1 : 0)];
}

void shared_out_of_bounds(const Parameters& p) {
  SA_SHARED_MEMORY(memory);
  auto* const s = reinterpret_cast<uint16_t*>(memory);
  s[threadIdx.x + (p.broken ? 1 : 0)] = p.in[threadIdx.x];
  p.out[threadIdx.x] = s[threadIdx.x + (p.broken ? 1 : 0)];
}

void write_input(const Parameters& p) {
  p.out[threadIdx.x] = p.in[threadIdx.x];
  if (p.broken) const_cast<uint16_t*>(p.in)[threadIdx.x] = 0;
}

void read_unwritten(const Parameters& p) {
  SA_SHARED_MEMORY(memory);
  auto* const s = reinterpret_cast<uint16_t*>(memory);
  if (!p.broken || threadIdx.x != 5) s[threadIdx.x] = p.in[threadIdx.x];
  p.out[threadIdx.x] = s[threadIdx.x];
}

void misaligned(const Parameters& p) {
  if (threadIdx.x != 0) return;
  const auto* from = reinterpret_cast<const uint4*>(p.in + (p.broken ? 1 : 0));
  *reinterpret_cast<uint4*>(p.out) = *from;
}

void divergent_barrier(const Parameters& p) {
  if (p.broken && threadIdx.x < 7)
    __syncthreads();
  else
    __syncthreads();
  p.out[threadIdx.x] = p.in[threadIdx.x];
}

void deadlock(const Parameters& p) {
  if (p.broken && threadIdx.x == 3) return;
  p.out[threadIdx.x] = __shfl_xor_sync(0xffffffff, p.in[threadIdx.x], 1);
}

void lane_outside_of_mask(const Parameters& p) {
  const int value = p.in[threadIdx.x];
  const uint32_t mask = p.broken ? 0xfffffff0 : 0xffffffff;
  if (p.broken && threadIdx.x % 32 < 4) return;
  p.out[threadIdx.x] = static_cast<uint16_t>(__shfl_sync(mask, value, 0));
}

// who comes first: right on no machine, and different from seed to seed
void order_of_threads(const Parameters& p) {
  const int place = atomicAdd(reinterpret_cast<int*>(p.out), 1);
  p.out[2 + place] = static_cast<uint16_t>(threadIdx.x);
}

// out [16, 8] = a [16, 16] b [16, 8], in bfloat16; b is stored by columns
void wrong_fragment(const Parameters& p) {
  SA_SHARED_MEMORY(memory);
  auto* const a = reinterpret_cast<uint16_t*>(memory);
  auto* const b = a + 256;
  const int lane = threadIdx.x;
  for (int i = lane; i < 256 + 128; i += 32) a[i] = p.in[i];
  __syncwarp();
  uint32_t fragment[4];
  ldmatrix_x4(fragment, a + lane % 16 * 16 + lane / 16 * 8);
  const int column = lane / 4, row = lane % 4 * 2, half = p.broken ? 4 : 8;
  const auto pair = [&](int i) { return b[i] | uint32_t{b[i + 1]} << 16; };
  float d[4] = {};
  mma_m16n8k16<__nv_bfloat16>(d, fragment, pair(column * 16 + row),
                              pair(column * 16 + row + half));
  for (int i = 0; i < 4; ++i)
    p.out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = __float2bfloat16_rn(d[i]).bits;
}

// not faults: float32 to 16 bits
template <class T>
void convert(const Parameters& p) {
  const auto* in = reinterpret_cast<const float*>(p.in);
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    if constexpr (std::is_same_v<T, __half>)
      p.out[i] = __float2half_rn(in[i]).bits;
    else
      p.out[i] = __float2bfloat16_rn(in[i]).bits;
  }
}

template <void (*kKernel)(const Parameters&)>
void run(const simt::Arguments& a) {
  const Parameters p{a.pointer<const uint16_t>("in"), a.pointer<uint16_t>("out"),
                     static_cast<int>(a.number("n")), a.number("broken") != 0};
  simt::launch<kKernel>(a, {}, {.x = static_cast<uint32_t>(a.number("threads"))},
                        static_cast<size_t>(a.number("shared_bytes")), p);
}

#define FAULT(name) const simt::Register register_##name(#name, run<name>);
FAULT(missing_syncthreads)
FAULT(missing_syncwarp)
FAULT(missing_wait)
FAULT(missing_barrier_after_wait)
FAULT(read_out_of_bounds)
FAULT(shared_out_of_bounds)
FAULT(write_input)
FAULT(read_unwritten)
FAULT(misaligned)
FAULT(divergent_barrier)
FAULT(deadlock)
FAULT(lane_outside_of_mask)
FAULT(order_of_threads)
FAULT(wrong_fragment)
const simt::Register register_to_half("to_half", run<convert<__half>>);
const simt::Register register_to_bfloat16("to_bfloat16", run<convert<__nv_bfloat16>>);

}  // namespace
