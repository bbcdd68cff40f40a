#if defined(__x86_64__)
#include "amx.h"
#include "avx512_util.h"
#include "flex_prefill_select_probe.h"

namespace sparse_attn {
namespace {

// Scores of bf16 keys and queries on AMX tiles.
class AmxScorer {
 public:
  static int64_t scratch_bytes(const FlexPrefillParams& p) {
    return (kProbeLanes + kGroupKeys) * round_up(p.D, 32) * static_cast<int64_t>(sizeof(uint16_t));
  }

  AmxScorer(const FlexPrefillParams& p, const ProbeTask& t, void* scratch)
      : p_(p), t_(t), D_(round_up(p.D, 32)) {
    q_ = static_cast<uint32_t*>(scratch);
    keys_ = reinterpret_cast<uint16_t*>(q_) + kProbeLanes * D_;
    pack_lanes(
        [&](int64_t r) {
          return r < p.probe ? row(p.query, p.query_stride, t.head, p.Tq - p.probe + r) : nullptr;
        },
        kProbeLanes, p.D, false, q_);
  }

  void operator()(int64_t first, float* scores) {
    const uint16_t* keys = row(p_.key, p_.key_stride, kv_head(), first);
    int64_t stride = p_.key_stride[2];
    if (first + kGroupKeys > p_.Tk || p_.D % 32 != 0) {
      for (int k = 0; k < kGroupKeys; ++k)
        for (int64_t d = 0; d < D_; d += 32)
          _mm512_store_si512(keys_ + k * D_ + d,
                             first + k < p_.Tk
                                 ? _mm512_maskz_loadu_epi16(first_halves(p_.D - d),
                                                            keys + k * stride + d)
                                 : _mm512_setzero_si512());
      keys = keys_;
      stride = D_;
    }
    tile_fence();
    for (int lane = 0; lane < kProbeLanes; lane += 32)
      multiply(keys, stride, q_ + lane * D_ / 2, scores + lane);
  }

 private:
  int64_t kv_head() const { return t_.head / (p_.Hq / p_.Hkv); }

  const uint16_t* row(const void* base, const int64_t stride[3], int64_t head, int64_t at) const {
    return static_cast<const uint16_t*>(base) + t_.batch * stride[0] + head * stride[1] +
           at * stride[2];
  }

  // [32 keys][32 lanes]
  void multiply(const uint16_t* keys, int64_t stride, const uint32_t* q, float* scores) const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < D_; d += 32) {
      _tile_loadd(4, keys + d, stride * 2);
      _tile_loadd(5, keys + 16 * stride + d, stride * 2);
      _tile_loadd(6, q + d * 8, 64);
      _tile_loadd(7, q + (D_ + d) * 8, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, scores, kProbeLanes * 4);
    _tile_stored(1, scores + 16 * kProbeLanes, kProbeLanes * 4);
    _tile_stored(2, scores + 16, kProbeLanes * 4);
    _tile_stored(3, scores + 16 * kProbeLanes + 16, kProbeLanes * 4);
  }

  const AmxTiles tiles_;
  const FlexPrefillParams& p_;
  const ProbeTask& t_;
  const int64_t D_;
  uint32_t* q_;
  uint16_t* keys_;
};

}  // namespace

const ProbeKernel kProbeAmx = probe_kernel<AmxScorer>();

}  // namespace sparse_attn
#endif
