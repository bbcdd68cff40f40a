"""The parts of bench/gpu_check.py, functions of a `Context`, each run in a process of its own.

They import nothing but torch, sparse_attn and the standard library before they need it.
"""
