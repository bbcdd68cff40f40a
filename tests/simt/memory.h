// Every access of a kernel to memory is checked here.
#pragma once
#include "executor.h"

namespace simt {

struct Range {
  char* begin;
  size_t bytes;
};

enum class Access { read, write, atomic };

void use_memory(const std::vector<Memory>& memory, size_t shared_bytes, Range stacks);
// Fills the dynamic shared memory of a block that starts with NaN and forgets who wrote to it.
void poison_shared_memory(size_t bytes);

// `pc` is an address in the code that does it, for the report.
void check_access(const void* p, size_t bytes, Access access, const void* pc);

// cp.async: from its start until the wait of the thread nobody may touch the destination.
void start_async_write(const void* p, size_t bytes, const void* pc);
void finish_async_write(void* p, const void* data, size_t bytes);

}  // namespace simt

#define SIMT_PC __builtin_return_address(0)
