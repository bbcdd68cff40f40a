// Runs CUDA device code on the host: a fiber per thread, in an order that a seed decides.
#pragma once
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

namespace simt {

using Place = std::source_location;

struct Index3 {
  uint32_t x = 1, y = 1, z = 1;
};

// What a kernel may touch in global memory.
struct Memory {
  std::string name;
  char* begin;
  size_t bytes;
  bool writable;
};

struct Launch {
  Index3 grid, block;
  size_t shared_bytes;
  uint64_t seed;
  std::vector<Memory> memory;
};

// Calls `kernel(parameters)` once per thread of the grid. Throws std::runtime_error with block,
// thread and place at the first fault.
void run(const Launch& launch, void (*kernel)(const void* parameters), const void* parameters);

// Everything below is called from inside a kernel.

Index3 thread_index();
Index3 block_index();
Index3 block_size();
Index3 grid_size();
unsigned char* shared_memory();
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const char* what);

enum class Vote { none, any, all, count };

// __syncthreads and its variants: waits for every thread of the block that has not returned.
int block_barrier(const char* name, Vote vote, int value, Place place);

// Waits for the lanes of `mask`; the last one calls `all` with what each lane passed (null for
// lanes outside of the mask), then they go on.
using Collective = void (*)(void* const* lanes, uint32_t mask);
void warp_collective(const char* name, uint32_t mask, void* lane, Collective all, Place place);
// What lanes of the mask did before, they all see from here on.
void order_warp_memory();

// A point in the order of the block's threads; see memory.cpp.
struct Time {
  uint32_t block;    // block barriers passed, counted over the whole run
  uint32_t warp;     // the same for the barriers of the warp
  uint16_t thread;   // in its block
};

Time now();
uint32_t first_block_time();  // of the block that runs
bool running();

}  // namespace simt
