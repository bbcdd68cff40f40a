// The host's side of a launch: arguments from Python, kernels by name.
#pragma once
#include <cstring>
#include <map>
#include <stdexcept>

#include "executor.h"

namespace simt {

struct Tensor {
  char* data = nullptr;
  std::vector<int64_t> sizes, strides;  // in elements
  int64_t element_bytes = 0;
  bool writable = false;

  // from the first to the last element, whatever lies between them
  size_t bytes() const {
    int64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] == 0) return 0;
      last += (sizes[i] - 1) * strides[i];
    }
    return static_cast<size_t>((last + 1) * element_bytes);
  }
};

struct Arguments {
  std::map<std::string, Tensor> tensors;
  std::map<std::string, double> numbers;
  uint64_t seed = 0;

  const Tensor& tensor(const std::string& name) const { return tensors.at(name); }
  double number(const std::string& name) const { return numbers.at(name); }
  double number(const std::string& name, double otherwise) const {
    const auto found = numbers.find(name);
    return found == numbers.end() ? otherwise : found->second;
  }
  template <class T>
  T* pointer(const std::string& name) const {
    return reinterpret_cast<T*>(tensor(name).data);
  }
  // Copies what a plan says into an output, for tests.
  template <class T>
  void give(const std::string& name, const T& x) const {
    if (tensor(name).bytes() != sizeof(T))
      throw std::runtime_error(name + " has " + std::to_string(sizeof(T)) + " bytes in C++");
    std::memcpy(tensor(name).data, &x, sizeof(T));
  }
};

// Runs `kKernel(parameters)`, which may touch the tensors of `arguments` and nothing else.
template <auto kKernel, class P>
void launch(const Arguments& arguments, Index3 grid, Index3 block, size_t shared_bytes,
            const P& parameters) {
  Launch l{grid, block, shared_bytes, arguments.seed, {}};
  for (const auto& [name, t] : arguments.tensors)
    l.memory.push_back({name, t.data, t.bytes(), t.writable});
  auto* place = const_cast<char*>(reinterpret_cast<const char*>(&parameters));
  l.memory.push_back({"the parameters", place, sizeof(P), false});
  run(l, [](const void* p) { kKernel(*static_cast<const P*>(p)); }, &parameters);
}

// Scratch memory that kernels may use as the tensor `name`, full of NaN; `arguments` must not
// outlive it.
struct Workspace {
  std::vector<char> data;

  Workspace(Arguments& arguments, const std::string& name, size_t bytes) : data(bytes, '\xff') {
    const auto n = static_cast<int64_t>(bytes);
    arguments.tensors[name] = {data.data(), {n}, {1}, 1, true};
  }
};

using Program = void (*)(const Arguments&);

std::map<std::string, Program>& programs();

// `static const simt::Register r("name", function);` makes a program callable from Python.
struct Register {
  Register(const char* name, Program program) { programs()[name] = program; }
};

}  // namespace simt
