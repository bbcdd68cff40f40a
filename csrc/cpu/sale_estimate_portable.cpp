#include "sale_estimate_lanes.h"

namespace sparse_attn {
namespace {

struct PlainProduct {
  static void run(const uint8_t* q, int64_t row_bytes, const int8_t* keys, int64_t words,
                  int32_t (&c)[kRows][kSquare]) {
    std::memset(c, 0, sizeof c);
    for (int64_t w = 0; w < words; ++w) {
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* x = q + r * row_bytes + w * 4;
        const int8_t* k = keys + w * kSquare * 4;
        for (int j = 0; j < kSquare; ++j)
          c[r][j] += x[0] * k[4 * j] + x[1] * k[4 * j + 1] + x[2] * k[4 * j + 2] +
                     x[3] * k[4 * j + 3];
      }
    }
  }
};

}  // namespace

const EstimateKernel kEstimatePortable = {scratch_bytes, run<LanesEngine<PlainProduct>>};

}  // namespace sparse_attn
