#include "cpu_isa.h"

#include <atomic>
#include <string>

#include "../common/stable.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sparse_attn {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};

#if defined(__x86_64__)
bool os_grants_amx() {
#if defined(__linux__)
  // tile registers are off until the process asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

bool has_bit(unsigned leaf, unsigned subleaf, int reg, int bit) {
  unsigned r[4] = {0, 0, 0, 0};
  return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && ((r[reg] >> bit) & 1);
}

CpuIsa detect() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_bit(1, 0, 2, 29)))
    return CpuIsa::portable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        has_bit(7, 0, 2, 11)))  // avx512_vnni
    return CpuIsa::avx2;
  if (!has_bit(7, 1, 0, 5)) return CpuIsa::avx512;
  const bool amx = has_bit(7, 0, 3, 22) && has_bit(7, 0, 3, 24) && os_grants_amx();
  return amx ? CpuIsa::amx : CpuIsa::avx512bf16;
}
#else
CpuIsa detect() { return CpuIsa::portable; }
#endif

CpuIsa best_isa() {
  static const CpuIsa best = detect();
  return best;
}

std::atomic<int> g_isa{-1};  // -1: not chosen by hand

std::string cpu_isa_op(std::string name) {
  if (name == "auto") {
    g_isa = -1;
  } else if (!name.empty()) {
    int level = -1;
    for (int i = 0; i < 5; ++i)
      if (name == kNames[i]) level = i;
    SA_CHECK(level >= 0, "isa: got '", name,
             "', expected auto, portable, avx2, avx512, avx512bf16 or amx");
    SA_CHECK(level <= static_cast<int>(best_isa()), "isa: this machine cannot run '", name,
             "', its best is '", kNames[static_cast<int>(best_isa())], "'");
    g_isa = level;
  }
  return kNames[static_cast<int>(cpu_isa())];
}

}  // namespace

CpuIsa cpu_isa() {
  const int chosen = g_isa.load(std::memory_order_relaxed);
  return chosen < 0 ? best_isa() : static_cast<CpuIsa>(chosen);
}

SA_LIBRARY_IMPL(CompositeExplicitAutograd, m) { m.impl("_cpu_isa", TORCH_BOX(&cpu_isa_op)); }

}  // namespace sparse_attn
