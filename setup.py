"""Builds the extensions against the torch found in this interpreter, without importing it.

SPARSE_ATTN_BUILD       auto (default) | none | cpu | cuda, see docs/env.md
SPARSE_ATTN_CUDA_ARCHS  the GPUs to compile for, such as "80;90a"
SPARSE_ATTN_TORCH_DIR   the directory of the torch package, where it is not found by itself
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020b000000000000"  # oldest torch that can load the extension: 2.11
OLDEST_TORCH = (2, 11)
OLDEST_NVCC = (12, 0)  # the first that compiles C++20
STABLE_HEADER = "include/torch/csrc/stable/library.h"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
AVX512BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512BF16, "-mamx-tile", "-mamx-bf16"]
CUDA_ARCHS = ("80", "90a", "100a")
ISA_FLAGS = {"_avx2": AVX2, "_avx512": AVX512, "_avx512bf16": AVX512BF16, "_amx": AMX}
# where they are in the package and in the checkout; a top-level triton_kernels would clash with
# Triton's own package of that name, and the device code is what sparse_attn/nvrtc compiles
EXTRA_PACKAGES = {
    "sparse_attn.triton_kernels": "triton_kernels",
    "sparse_attn.csrc.cuda": "csrc/cuda",
    "sparse_attn.csrc.common": "csrc/common",
}


@cache
def torch_dir():
    """The torch package that this interpreter would import, or None.

    pip's build isolation hides it by environment variables, which -E ignores: so it is found in
    the site-packages of a virtual environment, of the system, of the user or of a .pth file.
    """
    given = os.environ.get("SPARSE_ATTN_TORCH_DIR")
    if given:
        return Path(given)
    code = (
        "from importlib.util import find_spec as f; print(getattr(f('torch'), 'origin', 0) or '')"
    )
    for flags in ([], ["-E"]):
        command = [sys.executable, *flags, "-c", code]
        origin = subprocess.run(command, capture_output=True, text=True, cwd=sys.prefix).stdout
        if origin.strip():
            return Path(origin.strip()).parent
    return None


def why_no_torch():
    folder, again = torch_dir(), "then reinstall"
    if folder is None:
        return f"no torch at build time: install torch>=2.11 or set SPARSE_ATTN_TORCH_DIR, {again}"
    version = folder / "version.py"
    found = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", read(version))
    if found is None:
        return f"no torch in {folder}, where SPARSE_ATTN_TORCH_DIR points: correct it, {again}"
    if (int(found[2]), int(found[3])) < OLDEST_TORCH:
        return f"torch {found[1]} in {folder}, needed is torch>=2.11: upgrade it, {again}"
    if not (folder / STABLE_HEADER).exists():
        return f"torch in {folder} has no C++ headers: install a wheel of PyTorch's, {again}"
    return None


def read(path):
    return path.read_text() if path.exists() else ""


def has_compiler():
    return any(
        shutil.which(c) for c in (os.environ.get("CXX", "").split(" ")[0], "c++", "g++") if c
    )


def find_nvcc():
    """The CUDA compiler: CUDA_HOME decides where it is set."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which(os.path.join(home, "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def nvcc_says(question):
    return subprocess.run([find_nvcc(), question], capture_output=True, text=True).stdout


def why_no_nvcc():
    nvcc = find_nvcc()
    again = "install the CUDA toolkit 12.0 or newer or set CUDA_HOME, then reinstall"
    if nvcc is None:
        return f"no nvcc at build time: {again}"
    found = re.search(r"release (\d+)\.(\d+)", nvcc_says("--version"))
    if found is None:
        return f"{nvcc} does not say its version: {again}"
    if (int(found[1]), int(found[2])) < OLDEST_NVCC:
        return f"{nvcc} is of CUDA {found[1]}.{found[2]}, which is too old: {again}"
    if not cuda_archs():
        none = f"{nvcc} knows none of sm_{' sm_'.join(CUDA_ARCHS)}"
        return f"{none}: set SPARSE_ATTN_CUDA_ARCHS, then reinstall"
    return None


def cuda_archs():
    """The architectures to compile for; by default those of CUDA_ARCHS that nvcc knows."""
    asked = os.environ.get("SPARSE_ATTN_CUDA_ARCHS")
    if asked:
        archs = [a for a in re.split(r"[;, ]+", asked) if a]
        wrong = [a for a in archs if not re.fullmatch(r"[1-9][0-9]+[af]?", a)]
        if wrong or not archs:
            sys.exit(f"SPARSE_ATTN_CUDA_ARCHS: got {asked!r}, expected a list such as 80;90a")
        return archs
    known = nvcc_says("--list-gpu-arch")
    return [a for a in CUDA_ARCHS if f"compute_{a.rstrip('af')}" in known]


def gpu_code(archs):
    """nvcc's flags: machine code for each architecture, portable code of the newest."""
    newest = max(int(a.rstrip("af")) for a in archs)
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def why_no_cpu(wanted):
    if wanted == "none":
        return "SPARSE_ATTN_BUILD=none at build time: unset it, then reinstall"
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return "this Python is free-threaded: install in one with the GIL"
    if why_no_torch():
        return why_no_torch()
    if not has_compiler():
        return "no C++ compiler at build time: install g++ or clang, then reinstall"
    return None


def why_no_cuda(wanted):
    if wanted == "cpu":
        return "SPARSE_ATTN_BUILD=cpu at build time: unset it, then reinstall"
    if why_no_cpu(wanted):
        return why_no_cpu(wanted)
    if wanted == "auto" and not (torch_dir() / "lib" / "libtorch_cuda.so").exists():
        return "this torch has no CUDA: install one that has, then reinstall"
    if sys.platform != "linux":
        return "built on Linux only"
    return why_no_nvcc()


def plan():
    """For each extension None if it is to be built, or why not."""
    wanted = os.environ.get("SPARSE_ATTN_BUILD", "auto")
    if wanted not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"SPARSE_ATTN_BUILD: got {wanted!r}, expected auto, none, cpu or cuda")
    reasons = {"cpu": why_no_cpu(wanted), "cuda": why_no_cuda(wanted)}
    if reasons.get(wanted):
        sys.exit(f"SPARSE_ATTN_BUILD={wanted}, but {reasons[wanted]}")
    for name, reason in reasons.items():
        made = f"skipped, {reason}" if reason else "yes"
        made += f", for {' '.join(cuda_archs())}" if name == "cuda" and not reason else ""
        print(f"sparse_attn: {name.upper()} extension: {made}")
    return reasons


def isa_flags(source):
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    return next((f for suffix, f in ISA_FLAGS.items() if Path(source).stem.endswith(suffix)), [])


def newest_header():
    return max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.*h"))


class BuildExt(build_ext):
    """Compiles the sources in parallel, each with the flags of the instruction set it is for."""

    def build_extension(self, ext):
        if ext.name == "sparse_attn._C_cuda":
            self.build_with_nvcc(ext)
        else:
            self.build_with_cxx(ext)

    def build_with_nvcc(self, ext):
        """Without torch's own way to do it, which needs a CUDA build of torch."""
        archs = cuda_archs()
        folder = Path(self.build_temp) / f"cuda_{'_'.join(archs)}"
        folder.mkdir(parents=True, exist_ok=True)
        headers = newest_header()
        flags = [
            *gpu_code(archs),
            f"--threads={os.cpu_count()}",  # one per architecture
            *ext.extra_compile_args,
            *(f"-I{p}" for p in ext.include_dirs),
            *(f"-D{name}={value}" for name, value in ext.define_macros),
        ]

        def compile_one(source):
            made = folder / f"{Path(source).stem}.o"
            if not self.is_newer(made, source, headers):
                self.spawn([find_nvcc(), *flags, "-c", source, "-o", str(made)])
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        # the runtime is linked in statically: no version of it is needed where this runs
        self.spawn(
            [find_nvcc(), "-shared", "-cudart=static", *objects, "-o", target,
             "-Xlinker", "--no-as-needed", *(f"-L{p}" for p in ext.library_dirs),
             *(f"-l{name}" for name in ext.libraries)]
        )  # fmt: skip

    def build_with_cxx(self, ext):
        for compiler in ("compiler_so", "compiler_so_cxx"):
            command = getattr(self.compiler, compiler, None)
            if command:  # the flags Python itself was built with are not ours
                setattr(self.compiler, compiler, [a for a in command if not a.startswith("-W")])
        headers = newest_header()
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

    def is_newer(self, target, source, headers):
        newest = max(headers, Path(source).stat().st_mtime)
        return os.path.exists(target) and os.path.getmtime(target) > newest

    def build_temp_of(self, source):
        return str(Path(self.build_temp) / Path(source).with_suffix(".o"))

    def compile_one(self, ext, source, target, headers):
        if self.is_newer(target, source, headers):
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


def extension(name, sources, **options):
    torch = torch_dir()
    return Extension(
        f"sparse_attn.{name}",
        ["csrc/module.cpp", *sorted(str(p.relative_to(ROOT)) for p in sources)],
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch", "torch_cpu"],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("SA_MODULE", name),
        ],
        py_limited_api=True,
        language="c++",
        **options,
    )


def cpu_extension():
    return extension(
        "_C",
        (ROOT / "csrc/cpu").rglob("*.cpp"),
        extra_compile_args=["-O3", "-std=c++20", "-fvisibility=hidden"],
        extra_link_args=["-Wl,--no-as-needed"] if sys.platform == "linux" else [],
    )


def cuda_extension():
    return extension(
        "_C_cuda",
        (ROOT / "csrc/cuda").glob("*.cu"),
        # flushes subnormal numbers as CuPy does: the same bits from both
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-ftz=true",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
        ],
    )


why_not = plan()
ext_modules = [] if why_not["cpu"] else [cpu_extension()]
ext_modules += [] if why_not["cuda"] else [cuda_extension()]
(ROOT / "sparse_attn" / "_build_info.py").write_text(
    f'''"""Written by setup.py."""

CPU_EXTENSION_MISSING = {why_not["cpu"]!r}
CUDA_EXTENSION_MISSING = {why_not["cuda"]!r}
CUDA_ARCHS = {[] if why_not["cuda"] else cuda_archs()!r}
'''
)

setup(
    packages=[
        "sparse_attn",
        *(
            f"sparse_attn.{p.name}"
            for p in sorted((ROOT / "sparse_attn").iterdir())
            if (p / "__init__.py").exists()
        ),
        *EXTRA_PACKAGES,
    ],
    package_dir=EXTRA_PACKAGES,
    package_data={"": ["*.cuh", "*.h"]},
    ext_modules=ext_modules,
    cmdclass={"build_ext": BuildExt, "bdist_wheel": BdistWheel},
)
