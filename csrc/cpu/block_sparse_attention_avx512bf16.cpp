// bf16 attention on AVX512-BF16: one vdpbf16ps multiplies 16 pairs.
#if defined(__x86_64__)
#include "block_sparse_attention_bf16.h"

namespace sparse_attn {
namespace {

inline __m512bh broadcast_pair(const uint16_t* at) {
  int32_t pair;
  std::memcpy(&pair, at, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

inline __m512bh load_pairs(const uint32_t* at) { return (__m512bh)_mm512_load_si512(at); }

// c [kRows][kVectors] += rows of pairs (broadcast) x columns of pairs
template <int kRows, int kVectors>
inline void multiply(__m512 (&c)[kRows][kVectors], const uint16_t* a, int64_t a_stride,
                     const uint32_t* b, int64_t b_vector_stride, int64_t pairs) {
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load_pairs(b + k * 16 + v * b_vector_stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh x = broadcast_pair(a + r * a_stride + 2 * k);
      for (int v = 0; v < kVectors; ++v) c[r][v] = _mm512_dpbf16_ps(c[r][v], x, column[v]);
    }
  }
}

// Computes at once what it is asked for: there is nothing to overlap with.
class Avx512Bf16Engine {
 public:
  // scores [32 keys][32] = key [32][D] x q [2][D / 2][16]
  void start_scores(const uint16_t* key, int64_t key_stride, const uint32_t* q, int64_t D,
                    float* scores) {
    for (int k = 0; k < kGroupKeys; k += kRows) {
      __m512 c[kRows][2] = {};
      multiply(c, key + k * key_stride, key_stride, q, D * 8, D / 2);
      store(c, scores + k * kLanes);
    }
  }

  void add(const SumJob& job) {
    for (int d = 0; d < 32; d += kRows) {
      __m512 c[kRows][2];
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < 2; ++v) c[r][v] = _mm512_load_ps(job.out + (d + r) * kLanes + v * 16);
      for (int i = 0; i < job.n; ++i)
        multiply(c, job.values[i] + d * kGroupKeys, kGroupKeys, job.p[i], 256, kGroupKeys / 2);
      store(c, job.out + d * kLanes);
    }
  }

  void finish_scores() {}
  void tick() {}
  void drain() {}

 private:
  static constexpr int kRows = 8;

  static void store(const __m512 (&c)[kRows][2], float* to) {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 2; ++v) _mm512_store_ps(to + r * kLanes + v * 16, c[r][v]);
  }
};

void tile(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
          const void* packed, void* scratch, float* partial) {
  Tile<Avx512Bf16Engine> t(p, tile, packed, scratch);
  t.run(groups, n);
  t.finish(partial);
}

}  // namespace

const AttentionKernel kAttentionAvx512Bf16 = {packed_bytes, pack, scratch_bytes, tile};

}  // namespace sparse_attn
#endif
