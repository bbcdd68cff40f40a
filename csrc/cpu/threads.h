// Dealing work to torch's threads, and aligned buffers for it.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/stable.h"

namespace sparse_attn {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char[], Free>;

// Asks for huge pages: the first touch of a large buffer otherwise costs more than filling it.
inline void prefer_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~(kHuge - 1);
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

inline Buffer allocate(int64_t bytes) {
  constexpr int64_t kHuge = int64_t(1) << 21;
  const int64_t alignment = bytes >= kHuge ? kHuge : 64;
  // no slack at the end: it would hide an overrun from sanitizers
  char* p = static_cast<char*>(
      std::aligned_alloc(alignment, round_up(std::max<int64_t>(bytes, 1), alignment)));
  SA_CHECK(p != nullptr, "out of memory: ", bytes, " bytes of scratch");
  prefer_huge_pages(p, bytes);
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
