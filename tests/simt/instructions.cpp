// Instructions of a warp, asynchronous copies, atomics and conversions.
//
// Fragment layouts, after the PTX manual; g = lane / 4, t = lane % 4, two elements per register:
//   ldmatrix       lane i holds the address of row i % 8 of matrix i / 8; register m receives
//                  elements (g, 2t) and (g, 2t + 1) of matrix m, transposed: (2t, g), (2t + 1, g)
//   mma a [16,16]  registers 0..3 hold rows g, g + 8, g, g + 8; columns 2t of the left half in the
//                  first two, of the right half in the others
//   mma b [16, 8]  register r holds rows 2t + 8r and the next, column g
//   mma d [16, 8]  0, 1: row g, columns 2t, 2t + 1; 2, 3: the same of row g + 8
// Integers of 8 and 4 bits have the same layout with n = 4 and 8 elements per register: n t takes the
// place of 2t, 4 n that of 8.
#include <type_traits>
#include <unordered_map>
#include <utility>

#include "memory.h"
#include "sm80.h"

namespace simt {
namespace {

struct Copy {
  void* to;
  unsigned char data[16];
  int group;
};

// Copies of the running block that no wait has completed, by thread.
struct Copies {
  uint32_t block_time = 0;
  std::unordered_map<uint16_t, std::vector<Copy>> of_thread;
  std::unordered_map<uint16_t, int> groups;  // committed so far

  void forget_former_blocks() {
    if (block_time == first_block_time()) return;
    block_time = first_block_time();
    of_thread.clear(), groups.clear();
  }
};

Copies& copies = *new Copies;

constexpr uint32_t kFullMask = 0xffffffff;

template <class T>
T& checked(T* p) {
  check_access(p, sizeof(T), Access::atomic, SIMT_PC);
  return *p;
}

float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

std::vector<float> make_half_table() {
  std::vector<float> table(65536);
  for (uint32_t bits = 0; bits < table.size(); ++bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 0    ? std::ldexp(float(fraction), -24)
                       : exponent == 31 ? (fraction ? NAN : INFINITY)
                                        : std::ldexp(float(1024 + fraction), int(exponent) - 25);
    table[bits] = bits >> 15 ? -size : size;
  }
  return table;
}

const std::vector<float>& half_table = *new std::vector<float>(make_half_table());

}  // namespace

float half_to_float(uint16_t bits) { return half_table[bits]; }

uint16_t float_to_half(float x) {
  const uint16_t sign = as_bits(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent;
  std::frexp(size, &exponent);
  // a unit in the last place is 2^(exponent - 11), but no less than 2^-24
  const int unit = std::max(exponent - 11, -24);
  const auto n = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -unit)));
  return static_cast<uint16_t>(sign | (n + (unit == -24 ? 0 : uint32_t(unit + 24) << 10)));
}

float bfloat16_to_float(uint16_t bits) { return as_float(uint32_t{bits} << 16); }

uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = as_bits(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

int atomic_add(int* p, int x) { return std::exchange(checked(p), *p + x); }
unsigned long long atomic_add(unsigned long long* p, unsigned long long x) {
  return std::exchange(checked(p), *p + x);
}
float atomic_add(float* p, float x) { return std::exchange(checked(p), *p + x); }
int atomic_min(int* p, int x) { return std::exchange(checked(p), std::min(*p, x)); }
int atomic_max(int* p, int x) { return std::exchange(checked(p), std::max(*p, x)); }
int atomic_or(int* p, int x) { return std::exchange(checked(p), *p | x); }
int atomic_exchange(int* p, int x) { return std::exchange(checked(p), x); }
int atomic_compare_exchange(int* p, int expected, int x) {
  int& at = checked(p);
  return std::exchange(at, at == expected ? x : at);
}

}  // namespace simt

namespace sparse_attn {

using simt::Access;

void cp_async_16(void* to, const void* from, bool valid) {
  simt::copies.forget_former_blocks();
  const uint16_t thread = simt::now().thread;
  simt::Copy copy{to, {}, simt::copies.groups[thread]};
  if (valid) {
    simt::check_access(from, 16, Access::read, SIMT_PC);
    std::memcpy(copy.data, from, 16);
  }
  simt::start_async_write(to, 16, SIMT_PC);
  simt::copies.of_thread[thread].push_back(copy);
}

void cp_async_commit() {
  simt::copies.forget_former_blocks();
  ++simt::copies.groups[simt::now().thread];
}

void cp_async_wait_pending(int groups) {
  simt::copies.forget_former_blocks();
  const uint16_t thread = simt::now().thread;
  auto& mine = simt::copies.of_thread[thread];
  const int done = simt::copies.groups[thread] - groups;
  std::erase_if(mine, [&](const simt::Copy& copy) {
    if (copy.group >= done) return false;
    simt::finish_async_write(copy.to, copy.data, 16);
    return true;
  });
}

namespace {

struct MatrixLane {
  const void* row;
  uint32_t* r;
};

template <bool kTransposed>
void ldmatrix(void* const* lanes, uint32_t) {
  uint16_t m[4][8][8];
  for (int i = 0; i < 32; ++i)
    std::memcpy(m[i / 8][i % 8], static_cast<MatrixLane*>(lanes[i])->row, 16);
  for (int i = 0; i < 32; ++i)
    for (int n = 0; n < 4; ++n) {
      const int g = i / 4, t = i % 4 * 2;
      const uint32_t low = kTransposed ? m[n][t][g] : m[n][g][t];
      const uint32_t high = kTransposed ? m[n][t + 1][g] : m[n][g][t + 1];
      static_cast<MatrixLane*>(lanes[i])->r[n] = low | high << 16;
    }
}

template <class D>
struct MmaLane {
  D* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float element(uint32_t pair, int which) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * which);
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) return simt::half_to_float(bits);
  return simt::bfloat16_to_float(bits);
}

template <class T>
void mma(void* const* lanes, uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 32; ++i) {
    const auto& lane = *static_cast<MmaLane<float>*>(lanes[i]);
    const int g = i / 4, t = i % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int r = 0; r < 4; ++r)
        a[g + r % 2 * 8][t + e + r / 2 * 8] = element<T>(lane.a[r], e);
      for (int r = 0; r < 2; ++r) b[t + e + r * 8][g] = element<T>(lane.b[r], e);
      for (int r = 0; r < 2; ++r) d[g + r * 8][t + e] = lane.d[r * 2 + e];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
  for (int i = 0; i < 32; ++i)
    for (int r = 0; r < 4; ++r)
      static_cast<MmaLane<float>*>(lanes[i])->d[r] = d[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
}

// The integer of kBits in place `which` of a register.
template <int kBits, bool kSigned>
int integer(uint32_t packed, int which) {
  const uint32_t top = packed << (32 - kBits * (which + 1));  // it, in the highest bits
  if (kSigned) return static_cast<int32_t>(top) >> (32 - kBits);
  return static_cast<int>(top >> (32 - kBits));
}

template <int kBits, bool kSignedB>
void integer_mma(void* const* lanes, uint32_t) {
  constexpr int kEach = 32 / kBits, kDepth = 8 * kEach;
  int a[16][kDepth], b[kDepth][8];
  for (int i = 0; i < 32; ++i) {
    const auto& lane = *static_cast<MmaLane<int>*>(lanes[i]);
    const int g = i / 4, t = i % 4 * kEach;
    for (int e = 0; e < kEach; ++e) {
      for (int r = 0; r < 4; ++r)
        a[g + r % 2 * 8][t + e + r / 2 * 4 * kEach] = integer<kBits, true>(lane.a[r], e);
      for (int r = 0; r < 2; ++r)
        b[t + e + r * 4 * kEach][g] = integer<kBits, kSignedB>(lane.b[r], e);
    }
  }
  for (int i = 0; i < 32; ++i)
    for (int r = 0; r < 4; ++r) {
      int& d = static_cast<MmaLane<int>*>(lanes[i])->d[r];
      for (int k = 0; k < kDepth; ++k) d += a[i / 4 + r / 2 * 8][k] * b[k][i % 4 * 2 + r % 2];
    }
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Place place) {
  simt::check_access(row, 16, Access::read, SIMT_PC);
  MatrixLane mine{row, r};
  simt::warp_collective("ldmatrix", simt::kFullMask, &mine, ldmatrix<false>, place);
}

void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, simt::Place place) {
  simt::check_access(row, 16, Access::read, SIMT_PC);
  MatrixLane mine{row, r};
  simt::warp_collective("ldmatrix.trans", simt::kFullMask, &mine, ldmatrix<true>, place);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  simt::Place place) {
  MmaLane<float> mine{d, a, {b0, b1}};
  simt::warp_collective("mma.m16n8k16", simt::kFullMask, &mine, mma<T>, place);
}

void mma_m16n8k32_s8u8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                       simt::Place place) {
  MmaLane<int> mine{d, a, {b0, b1}};
  simt::warp_collective("mma.m16n8k32", simt::kFullMask, &mine, integer_mma<8, false>, place);
}

void mma_m16n8k64_s4(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     simt::Place place) {
  MmaLane<int> mine{d, a, {b0, b1}};
  simt::warp_collective("mma.m16n8k64", simt::kFullMask, &mine, integer_mma<4, true>, place);
}

template void mma_m16n8k16<__half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t,
                                   simt::Place);
template void mma_m16n8k16<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t,
                                          simt::Place);

float exp2_approx(float x) { return std::exp2(x); }

}  // namespace sparse_attn
