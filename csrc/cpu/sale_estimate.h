// What the driver (sale_estimate.cpp) and the kernels of each instruction set share.
#pragma once
#include <cstdint>

#include "../common/params.h"

namespace sparse_attn {

constexpr int kChunkTokens = 256;  // keys unpacked at once: whole blocks
constexpr int kMaxUnits = 4;       // query blocks that share them

// One query block of one head: which middle blocks it keeps.
struct EstimateUnit {
  int64_t head, m;
  int64_t first, end;  // blocks [first, end) are in question
  uint8_t* kept;       // [Nk], zero at first
};

// Units of one KV head.
struct EstimateTask {
  int64_t batch, kv_head;
  EstimateUnit units[kMaxUnits];
  int n;
};

struct EstimateKernel {
  int64_t (*scratch_bytes)(const SaleEstimateParams&);
  void (*run)(const SaleEstimateParams&, const EstimateTask&, void* scratch);
};

extern const EstimateKernel kEstimateAvx512, kEstimateAvx2, kEstimatePortable;

}  // namespace sparse_attn
