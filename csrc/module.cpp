// `import sparse_attn._C` loads the library, whose static initialisers register the operators.
//
// What that takes of Python's stable ABI is declared here: no headers of Python need be installed.
#include <cstdint>

#ifndef SA_MODULE
#define SA_MODULE _C
#endif
#define SA_TEXT_OF(x) #x
#define SA_TEXT(x) SA_TEXT_OF(x)
#define SA_JOIN_OF(a, b) a##b
#define SA_JOIN(a, b) SA_JOIN_OF(a, b)

extern "C" {

struct PyObject;

struct PyModuleDef {
  struct {
    intptr_t references;
    void* type;
    PyObject* (*init)();
    intptr_t index;
    PyObject* copy;
  } base;
  const char* name;
  const char* doc;
  intptr_t state_bytes;  // -1: one module, which sub-interpreters share
  void *methods, *slots, *traverse, *clear, *free;
};

PyObject* PyModule_Create2(PyModuleDef* module, int abi_version);

__attribute__((visibility("default"))) PyObject* SA_JOIN(PyInit_, SA_MODULE)() {
  static PyModuleDef module = {{1, nullptr, nullptr, 0, nullptr},
                               SA_TEXT(SA_MODULE),
                               nullptr,
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  constexpr int kStableAbi = 3;
  return PyModule_Create2(&module, kStableAbi);
}

}  // extern "C"
