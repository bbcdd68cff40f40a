// The contents of a cache of keys: what operators that take block_table and kv_lengths check.
#pragma once
#include <cstdint>

#include "../common/stable.h"

namespace sparse_attn {

// Reads what lies on the host before anything is computed from it.
template <class Params>
void check_cache_contents(const Params& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t n = p.kv_lengths == nullptr ? p.Tk : p.kv_lengths[b];
    SA_CHECK(n >= 0 && n <= p.Tk, "kv_lengths: the value at [", b, "] is ", n,
             ", expected 0 to the capacity, ", p.Tk);
    if (p.block_table == nullptr) continue;
    const int32_t* pages = p.block_table + b * p.block_table_stride;
    for (int64_t i = 0; i << p.page_bits < n; ++i)
      SA_CHECK(pages[i] >= 0 && pages[i] < p.pages, "block_table: the page at [", b, ", ", i,
               "] is ", pages[i], " and in use, expected one in [0, ", p.pages, ")");
  }
}

}  // namespace sparse_attn
