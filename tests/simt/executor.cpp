// The scheduler: which thread runs next, who waits for whom.
#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <stdexcept>

#include "fiber.h"
#include "memory.h"

namespace simt {
namespace {

constexpr uint32_t kLanes = 32;
constexpr size_t kMostThreads = 1024;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kGuard = 4096;  // below each stack

enum class State { ready, at_block_barrier, at_warp_operation, returned };

struct Thread {
  Fiber fiber;
  State state;
  const char* waits_for;
  Place place;
  uint32_t mask;  // of the warp operation
  void* passed;   // to the warp operation
  int value;      // of the vote at a block barrier
};

struct Warp {
  uint32_t ready, waiting, returned;  // a bit per lane
  uint32_t lanes;
  uint32_t time;
};

char* map_stacks() {
  const size_t bytes = kMostThreads * kStack;
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("no memory for the stacks of the threads");
  for (size_t i = 0; i < kMostThreads; ++i)
    mprotect(static_cast<char*>(p) + i * kStack, kGuard, PROT_NONE);
  return static_cast<char*>(p);
}

struct Executor {
  const Launch* launch = nullptr;
  void (*kernel)(const void*) = nullptr;
  const void* parameters = nullptr;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::mt19937_64 random;
  Fiber scheduler;
  Index3 block;
  uint32_t current = 0;
  uint32_t block_time = 1, first_time = 1;
  int vote_result = 0;
  bool active = false;     // a kernel runs
  bool in_thread = false;  // its code does, not the scheduler
  std::string failure;
  char* stacks = nullptr;
};

Executor ex;

Thread& self() { return ex.threads[ex.current]; }
Warp& warp_of(uint32_t thread) { return ex.warps[thread / kLanes]; }
uint32_t bit_of(uint32_t thread) { return 1u << thread % kLanes; }

void suspend() { switch_fiber(self().fiber, ex.scheduler); }

void enter() {
  ex.kernel(ex.parameters);
  Warp& w = warp_of(ex.current);
  self().state = State::returned;
  w.ready &= ~bit_of(ex.current);
  w.returned |= bit_of(ex.current);
  suspend();
}

std::string name_of(const Thread& t) {
  if (t.state == State::returned) return "has returned";
  std::string path = t.place.file_name();
  path = path.substr(path.rfind('/') + 1);
  return std::string("waits at ") + t.waits_for + " (" + path + ":" +
         std::to_string(t.place.line()) + ")";
}

// Two threads that cannot both go on.
[[noreturn]] void report_pair(const char* what, uint32_t a, uint32_t b) {
  fail(std::string(what) + ": thread " + std::to_string(a) + " " + name_of(ex.threads[a]) +
       ", thread " + std::to_string(b) + " " + name_of(ex.threads[b]));
}

bool same_place(const Thread& a, const Thread& b) {
  return a.place.line() == b.place.line() && a.place.column() == b.place.column() &&
         std::string_view(a.place.file_name()) == b.place.file_name();
}

// No thread is ready: either all have reached the same barrier, or they never will.
void release_block() {
  const auto n = static_cast<uint32_t>(ex.threads.size());
  uint32_t first = n, count = 0;
  bool any = false, all = true;
  for (uint32_t t = 0; t < n; ++t) {
    const Thread& thread = ex.threads[t];
    if (thread.state == State::returned) continue;
    if (first == n) first = t;
    if (thread.state == State::at_warp_operation) {
      const uint32_t base = t / kLanes * kLanes;
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        const bool missing = (thread.mask >> lane & 1) &&
                             (base + lane >= n ||
                              ex.threads[base + lane].state != State::at_warp_operation);
        if (missing && base + lane >= n) fail("a mask names a lane that the block lacks");
        if (missing) report_pair("deadlock", t, base + lane);
      }
      report_pair("deadlock", t, t == first ? t + 1 : first);
    }
    if (thread.state != ex.threads[first].state) report_pair("deadlock", first, t);
    if (!same_place(thread, ex.threads[first])) report_pair("divergent barrier", first, t);
    any |= thread.value != 0, all &= thread.value != 0, count += thread.value != 0;
  }
  ex.vote_result = any | all << 1 | static_cast<int>(count) << 2;
  ++ex.block_time;
  for (uint32_t t = 0; t < n; ++t)
    if (ex.threads[t].state == State::at_block_barrier) {
      ex.threads[t].state = State::ready;
      warp_of(t).ready |= bit_of(t);
    }
}

// Lets every ready lane of a warp run up to its next wait, in random order.
void run_warp(uint32_t w) {
  uint32_t left = ex.warps[w].ready;
  while (left != 0) {
    uint32_t skip = static_cast<uint32_t>(ex.random()) % kLanes;
    const uint32_t turned = left >> skip | (skip == 0 ? 0 : left << (kLanes - skip));
    const uint32_t lane = (static_cast<uint32_t>(__builtin_ctz(turned)) + skip) % kLanes;
    left &= ~(1u << lane);
    ex.current = w * kLanes + lane;
    ex.in_thread = true;
    switch_fiber(ex.scheduler, self().fiber);
    ex.in_thread = false;
    if (!ex.failure.empty()) throw std::runtime_error(ex.failure);
    left &= ex.warps[w].ready;
  }
}

void run_block() {
  const auto n = static_cast<uint32_t>(ex.threads.size());
  ex.first_time = ++ex.block_time;
  poison_shared_memory(ex.launch->shared_bytes);
  for (Warp& w : ex.warps) w.ready = w.waiting = w.returned = 0;
  for (uint32_t t = 0; t < n; ++t) {
    char* const stack = ex.stacks + t * kStack + kGuard;
    ex.threads[t].fiber.start(stack, kStack - kGuard, enter);
    ex.threads[t].state = State::ready;
    warp_of(t).ready |= bit_of(t);
  }
  for (Warp& w : ex.warps) w.lanes = w.ready;
  std::vector<uint32_t> able;
  for (;;) {
    able.clear();
    bool live = false;
    for (uint32_t w = 0; w < ex.warps.size(); ++w) {
      if (ex.warps[w].ready != 0) able.push_back(w);
      live |= ex.warps[w].returned != ex.warps[w].lanes;
    }
    if (!live) return;
    if (able.empty())
      release_block();
    else
      run_warp(able[ex.random() % able.size()]);
  }
}

}  // namespace

void run(const Launch& launch, void (*kernel)(const void*), const void* parameters) {
  const size_t n = size_t{launch.block.x} * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (n == 0 || n > kMostThreads || blocks == 0)
    throw std::runtime_error("launch: a block has 1 to 1024 threads, a grid at least a block");
  if (ex.stacks == nullptr) ex.stacks = map_stacks();
  ex.launch = &launch, ex.kernel = kernel, ex.parameters = parameters;
  ex.threads.resize(n), ex.warps.assign((n + kLanes - 1) / kLanes, Warp{});
  ex.random.seed(launch.seed);
  ex.failure.clear();
  use_memory(launch.memory, launch.shared_bytes, {ex.stacks, kMostThreads * kStack});
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), ex.random);
  ex.active = true;
  struct Reset {
    ~Reset() { ex.active = false; }
  } reset;
  for (const uint64_t i : order) {
    ex.block = {static_cast<uint32_t>(i % launch.grid.x),
                static_cast<uint32_t>(i / launch.grid.x % launch.grid.y),
                static_cast<uint32_t>(i / launch.grid.x / launch.grid.y)};
    run_block();
  }
}

Index3 thread_index() {
  const Index3 size = ex.launch->block;
  return {ex.current % size.x, ex.current / size.x % size.y, ex.current / size.x / size.y};
}
Index3 block_index() { return ex.block; }
Index3 block_size() { return ex.launch->block; }
Index3 grid_size() { return ex.launch->grid; }

Time now() {
  return {ex.block_time, warp_of(ex.current).time, static_cast<uint16_t>(ex.current)};
}
uint32_t first_block_time() { return ex.first_time; }
bool running() { return ex.active; }

void fail(const std::string& what) {
  ex.failure = "block (" + std::to_string(ex.block.x) + ", " + std::to_string(ex.block.y) + ", " +
               std::to_string(ex.block.z) + ")";
  if (ex.in_thread) ex.failure += ", thread " + std::to_string(ex.current);
  ex.failure += ": " + what;
  if (ex.in_thread && self().state == State::at_warp_operation)
    ex.failure += ": " + name_of(self());
  if (!ex.in_thread) throw std::runtime_error(ex.failure);
  suspend();  // for good
  __builtin_unreachable();
}

void fail(const char* what) { fail(std::string(what)); }

int block_barrier(const char* name, Vote vote, int value, Place place) {
  Thread& t = self();
  t.state = State::at_block_barrier, t.waits_for = name, t.place = place, t.value = value;
  warp_of(ex.current).ready &= ~bit_of(ex.current);
  suspend();
  switch (vote) {
    case Vote::any: return ex.vote_result & 1;
    case Vote::all: return ex.vote_result >> 1 & 1;
    case Vote::count: return ex.vote_result >> 2;
    default: return 0;
  }
}

void order_warp_memory() { ++warp_of(ex.current).time; }

void warp_collective(const char* name, uint32_t mask, void* lane, Collective all, Place place) {
  Thread& t = self();
  Warp& w = warp_of(ex.current);
  const uint32_t bit = bit_of(ex.current), base = ex.current / kLanes * kLanes;
  t.waits_for = name, t.place = place, t.mask = mask, t.passed = lane;
  t.state = State::at_warp_operation;
  if ((mask & bit) == 0) fail("the mask leaves out the lane itself");
  w.waiting |= bit, w.ready &= ~bit;
  if ((w.waiting & mask) != mask) {
    suspend();
    return;
  }
  void* lanes[kLanes] = {};
  for (uint32_t i = 0; i < kLanes; ++i) {
    if ((mask >> i & 1) == 0) continue;
    const Thread& other = ex.threads[base + i];
    if (other.mask != mask || !same_place(other, t))
      report_pair("divergent warp operation", ex.current, base + i);
    lanes[i] = other.passed;
  }
  all(lanes, mask);
  for (uint32_t i = 0; i < kLanes; ++i)
    if (mask >> i & 1) ex.threads[base + i].state = State::ready;
  w.waiting &= ~mask, w.ready |= mask;
}

}  // namespace simt
