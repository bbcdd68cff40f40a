"""The operators as Triton kernels, a file each; installed as `sparse_attn.triton_kernels`.

Imported by an operator's first call on a GPU. With TRITON_INTERPRET=1 set before that they run on
the CPU, slowly: for tests.
"""
