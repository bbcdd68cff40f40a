"""The CUDA kernels where no CUDA extension was built: compiled by NVRTC, through CuPy.

A file per operator repeats what csrc/cuda/<op>_plan.h and csrc/cuda/<op>.cu do; tests compare
both. Imported at the first call.
"""
