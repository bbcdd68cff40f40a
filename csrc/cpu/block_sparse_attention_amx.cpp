// bf16 attention on AMX tiles: 16 x 32 bf16 times 32 x 16 bf16 per instruction.
#if defined(__x86_64__)
#include "amx.h"
#include "block_sparse_attention_bf16.h"

namespace sparse_attn {
namespace {

// Runs both products in slices of four tile multiplications, one slice per tick, so that they
// overlap with the vector instructions between the ticks.
class AmxEngine {
 public:
  // scores [32 keys][32] = key [32][D] x q [2][D / 2][16]
  void start_scores(const uint16_t* key, int64_t key_stride, const uint32_t* q, int64_t D,
                    float* scores) {
    key_ = key;
    key_stride_ = key_stride;
    q_ = q;
    D_ = D;
    scores_ = scores;
    d_ = 0;
  }

  void finish_scores() {
    tile_fence();
    while (d_ < D_) score_slice();
    if (slice_ > 0) finish_job();
  }

  void add(const SumJob& job) {
    if (n_jobs_ == kMaxJobs) drain();
    jobs_[n_jobs_++] = job;
  }

  void tick() {
    if (d_ < D_)
      score_slice();
    else if (job_ < n_jobs_)
      sum_slice();
  }

  void drain() {
    tile_fence();
    while (job_ < n_jobs_) sum_slice();
    job_ = n_jobs_ = 0;
  }

 private:
  void score_slice() {
    if (d_ == 0) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    _tile_loadd(4, key_ + d_, key_stride_ * 2);
    _tile_loadd(6, q_ + d_ * 8, 64);
    _tile_loadd(5, key_ + 16 * key_stride_ + d_, key_stride_ * 2);
    _tile_loadd(7, q_ + (D_ + d_) * 8, 64);
    multiply();
    d_ += 32;
    if (d_ == D_) store(scores_);
  }

  void sum_slice() {
    const SumJob& job = jobs_[job_];
    if (slice_ == 0) {
      _tile_loadd(0, job.out, kLanes * 4);
      _tile_loadd(1, job.out + 16 * kLanes, kLanes * 4);
      _tile_loadd(2, job.out + 16, kLanes * 4);
      _tile_loadd(3, job.out + 16 * kLanes + 16, kLanes * 4);
    }
    _tile_loadd(4, job.values[slice_], 64);
    _tile_loadd(6, job.p[slice_], 64);
    _tile_loadd(5, job.values[slice_] + 16 * kGroupKeys, 64);
    _tile_loadd(7, job.p[slice_] + 256, 64);
    multiply();
    if (++slice_ == job.n) {
      store(job.out);
      slice_ = 0;
      ++job_;
    }
  }

  void finish_job() {
    while (slice_ > 0) sum_slice();
  }

  static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }

  static void store(float* to) {
    _tile_stored(0, to, kLanes * 4);
    _tile_stored(1, to + 16 * kLanes, kLanes * 4);
    _tile_stored(2, to + 16, kLanes * 4);
    _tile_stored(3, to + 16 * kLanes + 16, kLanes * 4);
  }

  const uint16_t* key_ = nullptr;
  int64_t key_stride_ = 0;
  const uint32_t* q_ = nullptr;
  int64_t D_ = 0, d_ = 0;  // scores are complete when d_ == D_
  float* scores_ = nullptr;
  SumJob jobs_[kMaxJobs];
  int n_jobs_ = 0, job_ = 0, slice_ = 0;
};

void tile(const Params& p, const QueryTile& tile, const KeyGroup* groups, int64_t n,
          const void* packed, void* scratch, float* partial) {
  const AmxTiles tiles;
  Tile<AmxEngine> t(p, tile, packed, scratch);
  t.run(groups, n);
  t.finish(partial);
}

}  // namespace

const AttentionKernel kAttentionAmx = {packed_bytes, pack, scratch_bytes, tile};

}  // namespace sparse_attn
#endif
