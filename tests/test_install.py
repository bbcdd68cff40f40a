import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDERS = ("sparse_attn/", "csrc/", "triton_kernels/")


def copy(tmp_path, without=()):
    """Copies the sources, but for the C++ and CUDA files that match; returns where they are."""
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if name.startswith((*FOLDERS, "setup.py", "pyproject", "README", "LICENSE")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    for path in (path for pattern in without for path in source.glob(pattern)):
        path.unlink()
    return source


def build(tmp_path, without=(), **env):
    """Builds a wheel from a copy of the sources; returns its name."""
    source = copy(tmp_path, without)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
         "-w", tmp_path / "out", source],
        env={**os.environ, **env}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "out").glob("*.whl")
    return wheel


def test_pure_python_wheel(tmp_path):
    wheel = build(tmp_path, SPARSE_ATTN_BUILD="none")
    assert wheel.name.endswith("py3-none-any.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert "sparse_attn/triton_kernels/merge_attention_states.py" in files
    headers = [*(ROOT / "csrc/cuda").glob("*.*h"), ROOT / "csrc/common/params.h"]  # for NVRTC
    wanted = {f"sparse_attn/{header.relative_to(ROOT)}" for header in headers}
    assert len(wanted) > 5 and not wanted - set(files)


def test_one_wheel_for_every_python(tmp_path):
    assert "-cp310-abi3-" in build(tmp_path, SPARSE_ATTN_BUILD="cpu").name


def test_the_installed_package_finds_the_triton_kernels():
    """Without importing Triton: the mapping of the folder holds for an editable install too."""
    found = importlib.util.find_spec("sparse_attn.triton_kernels")
    assert Path(found.origin).parent.name == "triton_kernels"


def test_unknown_build_is_refused(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        build(tmp_path, SPARSE_ATTN_BUILD="fast")
    assert "SPARSE_ATTN_BUILD: got 'fast'" in error.value.stdout + error.value.stderr


def test_cuda_is_compiled_without_a_gpu_and_beside_a_torch_without_cuda(tmp_path):
    """One operator for one architecture: the way to build it and to load it, not all of it."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    others = ("csrc/cpu/[!c]*.cpp", "csrc/cuda/[!m]*.cu")
    wheel = build(tmp_path, others, SPARSE_ATTN_BUILD="cuda", SPARSE_ATTN_CUDA_ARCHS="80")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = """
import torch, sparse_attn
print(sparse_attn.__file__, sparse_attn.info())
name = "sparse_attn::merge_attention_states.cuda"
print("registered:", torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))
"""
    text = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert text.startswith(str(tmp_path))
    assert "CUDA extension: loaded, for sm_80\n" in text and "registered: True" in text


@pytest.mark.parametrize(
    "env, message",
    [
        ({"SPARSE_ATTN_BUILD": "none"}, "CUDA extension: skipped, SPARSE_ATTN_BUILD=none"),
        ({"SPARSE_ATTN_BUILD": "cpu"}, "CUDA extension: skipped, SPARSE_ATTN_BUILD=cpu"),
        ({"SPARSE_ATTN_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "cuda, but no nvcc at build time"),
        ({"SPARSE_ATTN_BUILD": "cuda", "SPARSE_ATTN_CUDA_ARCHS": "hopper"}, "got 'hopper'"),
        ({}, "this torch has no CUDA"),
    ],
)
def test_what_is_built(tmp_path, env, message):
    """`auto` compiles CUDA where it can be used: nvcc takes minutes that others need not pay."""
    if not env and torch.version.cuda:
        pytest.skip("this torch has CUDA: auto builds it")
    if "SPARSE_ATTN_CUDA_ARCHS" in env and shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "--name"],
        cwd=copy(tmp_path), env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip
    assert message in done.stdout + done.stderr
