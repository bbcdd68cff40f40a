// Which instruction set the CPU kernels use: chosen once at run time, overridable for tests.
#pragma once

namespace sparse_attn {

// Ascending: a machine that has one level has every level before it.
enum class CpuIsa : int { portable, avx2, avx512, avx512bf16, amx };

CpuIsa cpu_isa();

}  // namespace sparse_attn
