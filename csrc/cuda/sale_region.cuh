// Which blocks of keys a query block of SALE sees, and which of them it keeps anyway.
#pragma once
#include "device.cuh"

namespace sparse_attn {

// [0, sink) and [local, seen) are the reference region, between them lies the middle.
struct SaleRegion {
  int sink, local, seen;

  template <class P>
  __device__ __forceinline__ SaleRegion(const P& p, int query_block) {
    const int n_keys = static_cast<int>(p.Tk), kv_block = static_cast<int>(p.kv_block);
    const int q_block = static_cast<int>(p.q_block);
    const int first = n_keys - static_cast<int>(p.Tq) + query_block * q_block;
    const int last = min(first + q_block - 1, n_keys - 1);
    seen = last < 0 ? 0 : last / kv_block + 1;
    const int own = max(first, 0) / kv_block;
    local = min(max(own - static_cast<int>(p.local_blocks) + 1, 0), seen);
    sink = min(local, static_cast<int>(p.sink_blocks));
  }
};

}  // namespace sparse_attn
