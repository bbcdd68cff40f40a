// The checks of sale_estimate and its parameters, for the bindings of every device.
#pragma once
#include <algorithm>

#include "stable.h"

namespace sparse_attn {

// The operator's tensors, in the order of its schema.
struct SaleEstimateTensors {
  Tensor query, query_step, key, key_step, key_bias, theta;
};

// A call through torch.ops has not been checked by anybody.
inline void check_sale_estimate(const SaleEstimateTensors& t, int64_t q_block, int64_t kv_block,
                                int64_t local, int64_t sink) {
  for (const Tensor* x : {&t.query, &t.key})
    SA_CHECK(x->dim() == 4 && x->numel() > 0 && x->scalar_type() == ScalarType::Byte,
             "query_packed, key_packed: expected uint8 [B, H, T, D / 2], not empty");
  SA_CHECK(t.key.size(0) == t.query.size(0) && t.key.size(3) == t.query.size(3),
           "key_packed: batch size or bytes differ from query_packed's");
  SA_CHECK(t.query.size(1) % t.key.size(1) == 0, "query_packed: heads are no multiple of key's");
  check_lengths(t.query.size(2), t.key.size(2));
  SA_CHECK(q_block == 16 || q_block == 32 || q_block == 64 || q_block == 128, "q_block: got ",
           q_block, ", expected 16, 32, 64 or 128");
  SA_CHECK(kv_block == 16 || kv_block == 32 || kv_block == 64, "kv_block: got ", kv_block,
           ", expected 16, 32 or 64");
  SA_CHECK(local >= 1, "local: got ", local, ", expected 1 or more");
  SA_CHECK(sink >= 0, "sink: got ", sink, ", expected 0 or more");
  const int64_t B = t.query.size(0), Hq = t.query.size(1), Hkv = t.key.size(1);
  const int64_t Tq = t.query.size(2), Tk = t.key.size(2);
  const auto check = [B](const char* name, const Tensor& x, int64_t heads, int64_t length) {
    SA_CHECK(x.dim() == 3 && x.scalar_type() == ScalarType::Float && x.size(0) == B &&
                 x.size(1) == heads && x.size(2) == length,
             name, ": expected float32 [", B, ", ", heads, ", ", length, "]");
  };
  check("query_step", t.query_step, Hq, 8 * ((Tq + 15) / 16));
  check("key_step", t.key_step, Hkv, 4 * ((Tk + kv_block - 1) / kv_block));
  check("key_bias", t.key_bias, Hq, Tk);
  check("theta", t.theta, Hq, Tq);
}

// All but the results; the float tensors must be contiguous.
inline SaleEstimateParams sale_estimate_params(const SaleEstimateTensors& t, int64_t q_block,
                                               int64_t kv_block, int64_t local, int64_t sink) {
  SaleEstimateParams p{};
  p.query = t.query.const_data_ptr<uint8_t>(), p.key = t.key.const_data_ptr<uint8_t>();
  p.query_step = t.query_step.const_data_ptr<float>();
  p.key_step = t.key_step.const_data_ptr<float>();
  p.key_bias = t.key_bias.const_data_ptr<float>(), p.theta = t.theta.const_data_ptr<float>();
  for (int i = 0; i < 3; ++i) {
    p.query_stride[i] = t.query.stride(i), p.key_stride[i] = t.key.stride(i);
  }
  p.B = t.query.size(0), p.Hq = t.query.size(1), p.Tq = t.query.size(2);
  p.D = 2 * t.query.size(3), p.Hkv = t.key.size(1), p.Tk = t.key.size(2);
  p.q_block = q_block, p.kv_block = kv_block;
  p.Mq = (p.Tq + q_block - 1) / q_block, p.Nk = (p.Tk + kv_block - 1) / kv_block;
  // longer than all keys is as long as them: nothing overflows
  p.local_blocks = (std::min(local, p.Tk + 128) + kv_block - 1) / kv_block;
  p.sink_blocks = (std::min(sink, p.Tk) + kv_block - 1) / kv_block;
  return p;
}

}  // namespace sparse_attn
