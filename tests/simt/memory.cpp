// Bounds, alignment and order of every access to memory.
//
// Device code is compiled with -fsanitize=thread, which makes the compiler call the functions at
// the end of this file before each load and store; no sanitizer library is linked. For each byte
// of shared memory a cell remembers who last wrote and read it. An access is ordered after an
// earlier one by the same thread, by a __syncthreads between them, or by a __syncwarp if both
// threads are of one warp. Two accesses without order, one of them a write, are a race, whether
// or not it shows in the result.
#include "memory.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include <dlfcn.h>

namespace simt {
namespace {

constexpr size_t kMostShared = 227 * 1024;  // sm_90; sm_80 has 163 KiB
constexpr size_t kRedZone = 4096;           // on both sides
constexpr uint16_t kSeveral = 0xffff;       // readers of more than one warp
constexpr uint16_t kOfWarp = 0x8000;        // | warp: several readers of it

// Written or read by `thread` at block and warp time.
struct Event {
  uint32_t block = 0, warp = 0;
  uint16_t thread = 0;
};

struct Cell {
  Event write, read;
  bool atomic = false;    // the last write
  bool in_flight = false; // the last write is a cp.async that nobody has waited for
};

struct State {
  std::vector<Memory> memory;
  size_t last_hit = 0;
  Range stacks{};
  size_t shared_bytes = 0;
  alignas(1024) unsigned char shared[kRedZone + kMostShared + kRedZone];
  Cell cells[kMostShared];
};

State& state = *new State;

unsigned warp_of(uint16_t thread) {
  return thread & kOfWarp ? thread & ~kOfWarp : thread / 32u;
}

bool ordered(const Event& before, const Time& t) {
  if (before.block < t.block) return true;
  if (before.thread == t.thread) return true;
  return before.thread != kSeveral && warp_of(before.thread) == t.thread / 32u &&
         before.warp < t.warp;
}

Event event_at(const Time& t) { return {t.block, t.warp, t.thread}; }

// The readers that a later write must be ordered after.
Event joined(const Event& before, const Time& t) {
  if (ordered(before, t)) return event_at(t);
  const bool one_warp = before.thread != kSeveral && warp_of(before.thread) == t.thread / 32u;
  return {t.block, t.warp, one_warp ? static_cast<uint16_t>(kOfWarp | t.thread / 32u) : kSeveral};
}

std::string who(uint16_t thread) {
  if (thread == kSeveral) return "threads of several warps";
  if (thread & kOfWarp) return "threads of warp " + std::to_string(thread & ~kOfWarp);
  return "thread " + std::to_string(thread);
}

const char* verb(Access a) {
  return a == Access::read ? "reads " : a == Access::write ? "writes " : "updates ";
}

// Python turns the offset into a file and a line.
std::string code_at(const void* pc) {
  Dl_info info{};
  if (dladdr(pc, &info) == 0) return "";
  char text[40];
  std::snprintf(text, sizeof text, " [+0x%zx]",
                static_cast<size_t>(static_cast<const char*>(pc) -
                                    static_cast<const char*>(info.dli_fbase)) - 1);
  return text;
}

[[noreturn]] void report(Access access, size_t bytes, const std::string& what, const void* pc) {
  fail(verb(access) + std::to_string(bytes) + " bytes " + what + code_at(pc));
}

void check_cell(Cell& cell, size_t offset, size_t bytes, Access access, const Time& t,
                const void* pc) {
  const std::string at = "of shared memory at offset " + std::to_string(offset);
  const bool fresh = cell.write.block < first_block_time();  // a former block's
  if (!fresh && cell.in_flight)
    report(access, bytes, at + " that a cp.async of " + who(cell.write.thread) +
                              " still fills: no wait for it", pc);
  if (fresh && access != Access::write)
    report(access, bytes, at + " that nobody has written", pc);
  if (!fresh && !ordered(cell.write, t) && !(access == Access::atomic && cell.atomic))
    report(access, bytes, at + " that " + who(cell.write.thread) +
                              " has written: race, no barrier between them", pc);
  if (access != Access::read && !ordered(cell.read, t))
    report(access, bytes, at + " that " + who(cell.read.thread) +
                              " may still read: race, no barrier between them", pc);
}

bool conflict(const Cell& cell, Access access, const Time& t) {
  const bool fresh = cell.write.block < first_block_time();
  if (fresh ? access != Access::write : cell.in_flight) return true;
  if (!fresh && !ordered(cell.write, t) && !(access == Access::atomic && cell.atomic)) return true;
  return access != Access::read && !ordered(cell.read, t);
}

void check_shared(size_t offset, size_t bytes, Access access, const void* pc) {
  const Time t = now();
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = state.cells[i];
    if (conflict(cell, access, t)) check_cell(cell, i, bytes, access, t, pc);
    if (access == Access::read) {
      cell.read = joined(cell.read, t);
    } else {
      cell.write = event_at(t);
      cell.atomic = access == Access::atomic;
      cell.in_flight = false;
    }
  }
}

void check_global(const char* p, size_t bytes, Access access, const void* pc) {
  const auto inside = [&](const Memory& m) {
    return p >= m.begin && p + bytes <= m.begin + m.bytes;
  };
  const size_t n = state.memory.size();
  for (size_t i = 0; i < n; ++i) {
    const size_t at = (state.last_hit + i) % n;
    const Memory& m = state.memory[at];
    if (!inside(m)) continue;
    if (access != Access::read && !m.writable)
      report(access, bytes, "of " + m.name + ", which is an input", pc);
    state.last_hit = at;
    return;
  }
  std::string near = "in no tensor";
  ptrdiff_t best = PTRDIFF_MAX;
  for (const Memory& m : state.memory) {
    const ptrdiff_t offset = p - m.begin, size = static_cast<ptrdiff_t>(m.bytes);
    const ptrdiff_t distance = offset < 0 ? -offset : offset >= size ? offset - size : 0;
    if (distance < best)
      best = distance, near = "out of bounds: at offset " + std::to_string(offset) + " of " +
                              m.name + ", which has " + std::to_string(size) + " bytes";
  }
  report(access, bytes, near, pc);
}

}  // namespace

void use_memory(const std::vector<Memory>& memory, size_t shared_bytes, Range stacks) {
  if (shared_bytes > kMostShared)
    throw std::runtime_error("launch: " + std::to_string(shared_bytes) +
                             " bytes of shared memory, a block has at most " +
                             std::to_string(kMostShared));
  state.memory = memory, state.last_hit = 0;
  state.stacks = stacks, state.shared_bytes = shared_bytes;
}

void poison_shared_memory(size_t bytes) { std::memset(shared_memory(), 0xff, bytes); }

unsigned char* shared_memory() { return state.shared + kRedZone; }

void check_access(const void* p, size_t bytes, Access access, const void* pc) {
  const auto* at = static_cast<const char*>(p);
  if (!running() || static_cast<size_t>(at - state.stacks.begin) < state.stacks.bytes) return;
  const bool vector = (bytes & (bytes - 1)) == 0 && bytes <= 16;
  if (vector && reinterpret_cast<uintptr_t>(p) % bytes != 0)
    report(access, bytes, "at an address that is no multiple of them", pc);
  const auto offset = static_cast<const unsigned char*>(p) - shared_memory();
  if (offset < -static_cast<ptrdiff_t>(kRedZone) ||
      offset >= static_cast<ptrdiff_t>(kMostShared + kRedZone))
    return check_global(at, bytes, access, pc);
  if (offset < 0 || offset + bytes > state.shared_bytes)
    report(access, bytes, "out of bounds: at offset " + std::to_string(offset) +
                              " of shared memory, which has " +
                              std::to_string(state.shared_bytes) + " bytes", pc);
  check_shared(static_cast<size_t>(offset), bytes, access, pc);
}

void start_async_write(const void* p, size_t bytes, const void* pc) {
  check_access(p, bytes, Access::write, pc);
  const size_t offset = static_cast<const unsigned char*>(p) - shared_memory();
  if (offset + bytes > state.shared_bytes) fail("cp.async: the destination is no shared memory");
  std::memset(const_cast<void*>(p), 0xff, bytes);
  for (size_t i = 0; i < bytes; ++i) state.cells[offset + i].in_flight = true;
}

void finish_async_write(void* p, const void* data, size_t bytes) {
  std::memcpy(p, data, bytes);
  const size_t offset = static_cast<unsigned char*>(p) - shared_memory();
  for (size_t i = 0; i < bytes; ++i) {
    state.cells[offset + i].in_flight = false;
    state.cells[offset + i].write = event_at(now());
  }
}

}  // namespace simt

// What the compiler calls.
#define SIMT_HOOK(kind, size, access)                                             \
  extern "C" void __tsan_##kind##size(const void* p) {                            \
    simt::check_access(p, size, simt::Access::access, SIMT_PC);                   \
  }
#define SIMT_HOOKS(size) SIMT_HOOK(read, size, read) SIMT_HOOK(write, size, write)
SIMT_HOOKS(1) SIMT_HOOKS(2) SIMT_HOOKS(4) SIMT_HOOKS(8) SIMT_HOOKS(16)

extern "C" {
void __tsan_read_range(const void* p, size_t bytes) {
  simt::check_access(p, bytes, simt::Access::read, SIMT_PC);
}
void __tsan_write_range(const void* p, size_t bytes) {
  simt::check_access(p, bytes, simt::Access::write, SIMT_PC);
}
void __tsan_init() {}
void __tsan_func_entry(const void*) {}
void __tsan_func_exit() {}
}
