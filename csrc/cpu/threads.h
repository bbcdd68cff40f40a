// Dealing work to torch's threads, and aligned buffers for it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#include "../common/stable.h"

namespace sparse_attn {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char[], Free>;

inline Buffer allocate(int64_t bytes) {
  char* p = static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64) + 64));
  SA_CHECK(p != nullptr, "out of memory: ", bytes, " bytes of scratch");
  return Buffer(p);
}

inline float* floats(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.get()); }

// Runs body(i, the thread's own state) for i in [0, n), dealt one by one.
template <class MakeState, class Body>
void deal(int64_t n, MakeState make_state, Body body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(n, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    auto state = make_state();
    for (int64_t i; (i = next.fetch_add(1)) < n;) body(i, state);
  });
}

}  // namespace sparse_attn
