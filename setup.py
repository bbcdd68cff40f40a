"""Builds the C++ extension against the torch found in this interpreter, without importing it.

SPARSE_ATTN_BUILD      auto (default: what the machine can build) | none | cpu
SPARSE_ATTN_TORCH_DIR  the directory of the torch package, where it is not found by itself
"""

import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020b000000000000"  # oldest torch that can load the extension: 2.11
STABLE_HEADER = "include/torch/csrc/stable/library.h"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]
ISA_FLAGS = {"_avx2": AVX2, "_avx512": AVX512, "_avx512bf16": AVX512BF16, "_amx": AMX}


def torch_dir():
    """The torch package of this interpreter; pip's build isolation hides it from `import`."""
    places = [os.environ.get("SPARSE_ATTN_TORCH_DIR")]
    places += [os.path.join(sysconfig.get_path(p), "torch") for p in ("platlib", "purelib")]
    places += [os.path.join(p, "torch") for p in sys.path if p]
    return next((Path(p) for p in places if p and (Path(p) / STABLE_HEADER).exists()), None)


def has_compiler():
    return any(
        shutil.which(c) for c in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++") if c
    )


def plan():
    """Whether to build the CPU extension, and why not."""
    wanted = os.environ.get("SPARSE_ATTN_BUILD", "auto")
    if wanted not in ("auto", "none", "cpu"):
        sys.exit(f"SPARSE_ATTN_BUILD: got {wanted!r}, expected auto, none or cpu")
    reason = None
    if wanted == "none":
        reason = "SPARSE_ATTN_BUILD=none"
    elif torch_dir() is None:
        reason = "no torch>=2.11 in this interpreter at build time: install torch, then reinstall"
    elif not has_compiler():
        reason = "no C++ compiler at build time: install g++ or clang, then reinstall"
    if wanted == "cpu" and reason:
        sys.exit(f"SPARSE_ATTN_BUILD=cpu, but {reason}")
    print(f"sparse_attn: CPU extension: {'skipped, ' + reason if reason else 'yes'}")
    return reason


def isa_flags(source):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    return next((f for suffix, f in ISA_FLAGS.items() if Path(source).stem.endswith(suffix)), [])


class BuildExt(build_ext):
    """Compiles the sources in parallel, each with the flags of the instruction set it is for."""

    def build_extension(self, ext):
        for compiler in ("compiler_so", "compiler_so_cxx"):
            command = getattr(self.compiler, compiler, None)
            if command:  # the flags Python itself was built with are not ours
                setattr(self.compiler, compiler, [a for a in command if not a.startswith("-W")])
        headers = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.h"))
        objects = [self.build_temp_of(s) for s in ext.sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda s, o: self.compile_one(ext, s, o, headers), ext.sources, objects))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=ext.libraries,
            library_dirs=ext.library_dirs,
            extra_postargs=ext.extra_link_args,
            target_lang="c++",
        )

    def build_temp_of(self, source):
        return str(Path(self.build_temp) / Path(source).with_suffix(".o"))

    def compile_one(self, ext, source, target, headers):
        newest = max(headers, Path(source).stat().st_mtime)
        if os.path.exists(target) and os.path.getmtime(target) > newest:
            return
        self.compiler.compile(
            [source],
            output_dir=self.build_temp,
            macros=ext.define_macros,
            include_dirs=ext.include_dirs,
            extra_postargs=[*ext.extra_compile_args, *isa_flags(source)],
        )


class BdistWheel(bdist_wheel):
    """One wheel for every Python from 3.10 where there is an extension, else pure Python."""

    def get_tag(self):
        _, _, system = super().get_tag()
        return ("cp310", "abi3", system) if ext_modules else ("py3", "none", "any")


def extension(torch):
    sources = [
        "csrc/module.cpp",
        *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").rglob("*.cpp")),
    ]
    return Extension(
        "sparse_attn._C",
        sources,
        include_dirs=[str(torch / "include"), sysconfig.get_path("include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch", "torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("Py_LIMITED_API", "0x030a0000"),
        ],
        extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden"],
        extra_link_args=["-Wl,--no-as-needed"] if sys.platform == "linux" else [],
        py_limited_api=True,
        language="c++",
    )


why_not = plan()
ext_modules = [] if why_not else [extension(torch_dir())]
(ROOT / "sparse_attn" / "_build_info.py").write_text(
    f'"""Written by setup.py."""\n\nCPU_EXTENSION_MISSING = {why_not!r}\n'
)

setup(
    packages=[
        "sparse_attn",
        *(
            f"sparse_attn.{p.name}"
            for p in sorted((ROOT / "sparse_attn").iterdir())
            if (p / "__init__.py").exists()
        ),
        "sparse_attn.triton_kernels",
    ],
    # a top-level triton_kernels would clash with Triton's own package of that name
    package_dir={"sparse_attn.triton_kernels": "triton_kernels"},
    ext_modules=ext_modules,
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
