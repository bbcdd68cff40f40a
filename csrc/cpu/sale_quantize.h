// What the driver (sale_quantize.cpp) and the kernels of each instruction set share.
#pragma once
#include <cstdint>

#include "../common/params.h"

namespace sparse_attn {

constexpr int64_t kQuantizePiece = 512;  // tokens per task, a multiple of every tile and block

struct QuantizeKernel {
  // sums [D] = tokens [begin, end) of a head added up
  void (*sum)(const SaleQuantizeParams&, int64_t batch, int64_t head, int64_t begin, int64_t end,
              float* sums);
  // floats of scratch that `quantize` needs
  int64_t (*scratch_floats)(const SaleQuantizeParams&);
  // codes and steps of tokens [begin, end), begin a multiple of kQuantizePiece; `floor` bounds the
  // largest value of every group from below
  void (*quantize)(const SaleQuantizeParams&, int64_t batch, int64_t head, int64_t begin,
                   int64_t end, const float* center, float floor, float* scratch);
};

extern const QuantizeKernel kQuantizeAvx512, kQuantizeAvx2, kQuantizePortable;

}  // namespace sparse_attn
