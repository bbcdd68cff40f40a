// Python's door to the executor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host.h"

namespace py = pybind11;

std::map<std::string, simt::Program>& simt::programs() {
  static std::map<std::string, Program> all;
  return all;
}

PYBIND11_MODULE(SIMT_MODULE, m) {
  py::class_<simt::Tensor>(m, "Tensor")
      .def(py::init([](uintptr_t data, std::vector<int64_t> sizes, std::vector<int64_t> strides,
                       int64_t element_bytes, bool writable) {
        return simt::Tensor{reinterpret_cast<char*>(data), std::move(sizes), std::move(strides),
                            element_bytes, writable};
      }));
  m.def("run", [](const std::string& name, std::map<std::string, simt::Tensor> tensors,
                  std::map<std::string, double> numbers, uint64_t seed) {
    const auto found = simt::programs().find(name);
    if (found == simt::programs().end()) throw std::runtime_error("no program " + name);
    found->second({std::move(tensors), std::move(numbers), seed});
  });
}
