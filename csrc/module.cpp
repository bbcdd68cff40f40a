// `import sparse_attn._C` loads the library, whose static initialisers register the operators.
#include <Python.h>

#ifndef SA_MODULE
#define SA_MODULE _C
#endif
#define SA_TEXT_OF(x) #x
#define SA_TEXT(x) SA_TEXT_OF(x)
#define SA_JOIN_OF(a, b) a##b
#define SA_JOIN(a, b) SA_JOIN_OF(a, b)

PyMODINIT_FUNC SA_JOIN(PyInit_, SA_MODULE)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, SA_TEXT(SA_MODULE), nullptr, -1, nullptr,
                               nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
