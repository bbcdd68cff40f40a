import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from sparse_attn import _ext

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
    """How it is built, with one source: what installed the checkout has compiled the others."""
    wheel = build(tmp_path, ["csrc/cpu/[!c]*.cpp"], SPARSE_ATTN_BUILD="cpu")
    assert "-cp310-abi3-" in wheel.name
    assert "sparse_attn/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()


def test_the_installed_package_finds_the_triton_kernels():
    """Without importing Triton: the mapping of the folder holds for an editable install too."""
    found = importlib.util.find_spec("sparse_attn.triton_kernels")
    assert Path(found.origin).parent.name == "triton_kernels"


def test_a_checkout_that_is_not_installed_finds_the_triton_kernels():
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, {str(ROOT)!r})
import sparse_attn
from sparse_attn.triton_kernels import launch
print(sparse_attn.__file__, launch.__file__)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True
    ).stdout.split()
    assert found == [
        str(ROOT / "sparse_attn" / "__init__.py"), str(ROOT / "triton_kernels" / "launch.py")
    ]  # fmt: skip


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
merge = torch.ops.sparse_attn.merge_attention_states.cuda  # called as with one CUDA tensor
for n in (0, 3):
    try:
        x = torch.zeros(1, 1, n, 8, dtype=torch.float16)
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        merge.redispatch(cuda, x, x[..., 0].float(), x, x[..., 0].float())
    except RuntimeError as error:
        print("refused:", str(error).split("\\n")[0])
"""
    text = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert text.startswith(str(tmp_path))
    assert "CUDA extension: loaded, for sm_80\n" in text and "registered: True" in text
    refused = [line for line in text.split("\n") if line.startswith("refused: ")]
    assert refused[0].endswith("out_a: expected [B, H, T, Dv], not empty")
    assert refused[1].endswith("out_a: expected a CUDA tensor")


@pytest.mark.parametrize(
    "env, message",
    [
        ({"SPARSE_ATTN_BUILD": "none"}, "CUDA extension: skipped, SPARSE_ATTN_BUILD=none"),
        ({"SPARSE_ATTN_BUILD": "cpu"}, "CUDA extension: skipped, SPARSE_ATTN_BUILD=cpu"),
        ({"SPARSE_ATTN_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "cuda, but no nvcc at build time"),
        ({"SPARSE_ATTN_BUILD": "cuda", "SPARSE_ATTN_CUDA_ARCHS": "hopper"}, "got 'hopper'"),
        ({"SPARSE_ATTN_BUILD": "cuda", "SPARSE_ATTN_CUDA_ARCHS": ";"}, "got ';', expected a list"),
        ({}, "this torch has no CUDA"),
        ({"SPARSE_ATTN_BUILD": "none"}, "CPU extension: skipped, SPARSE_ATTN_BUILD=none at build"),
        (
            {"SPARSE_ATTN_BUILD": "cpu", "SPARSE_ATTN_TORCH_DIR": "/nowhere"},
            "SPARSE_ATTN_BUILD=cpu, but no torch in /nowhere, where SPARSE_ATTN_TORCH_DIR points",
        ),
        (
            {"PATH": "/nowhere", "CXX": ""},
            "CPU extension: skipped, no C++ compiler at build time: ",
        ),
    ],
)
def test_what_is_built(tmp_path, env, message):
    """`auto` compiles CUDA where it can be used: nvcc takes minutes that others need not pay."""
    if not env and torch.version.cuda:
        pytest.skip("this torch has CUDA: auto builds it")
    if "SPARSE_ATTN_CUDA_ARCHS" in env and shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    assert message in plan_of(copy(tmp_path), **env)


@pytest.mark.parametrize(
    "release, archs, message",
    [
        ("release 11.8, V11.8.89", "compute_80", "is of CUDA 11.8, which is too old: install the"),
        ("command failed", "compute_80", "does not say its version: install the CUDA toolkit 12.0"),
        ("release 12.0, V12.0.1", "compute_35", "knows none of sm_80 sm_90a sm_100a: set SPARSE"),
    ],
)
def test_an_nvcc_that_cannot_compile_the_kernels(tmp_path, release, archs, message):
    """Beside a torch with CUDA: by itself the install goes on, cuda was asked for by name."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{release}' || echo {archs}\n")
    nvcc.chmod(0o755)
    torch_dir = fake_torch(tmp_path / "site", "2.11.0+cu130") / "torch"
    for name in ("include/torch/csrc/stable/library.h", "lib/libtorch_cuda.so"):
        (torch_dir / name).parent.mkdir(parents=True)
        (torch_dir / name).touch()
    env = {"CUDA_HOME": str(tmp_path), "SPARSE_ATTN_TORCH_DIR": str(torch_dir)}
    source = copy(tmp_path)
    assert f"CUDA extension: skipped, {nvcc} {message}" in plan_of(source, **env)
    text = plan_of(source, **env, SPARSE_ATTN_BUILD="cuda")
    assert f"SPARSE_ATTN_BUILD=cuda, but {nvcc} {message}" in text and "Traceback" not in text


def plan_of(source, python=sys.executable, **env):
    """What setup.py says that it will build."""
    done = subprocess.run(
        [python, "setup.py", "-q", "--name"],
        cwd=source, env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def fake_torch(folder, version):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder


@pytest.mark.parametrize(
    "version, message",
    [("2.10.1+cpu", "needed is torch>=2.11: upgrade it"), ("2.11.0", "has no C++ headers")],
)
def test_a_torch_that_cannot_be_built_against(tmp_path, version, message):
    folder = fake_torch(tmp_path / "site", version) / "torch"
    text = plan_of(copy(tmp_path), SPARSE_ATTN_TORCH_DIR=str(folder))
    assert f"in {folder}" in text and message in text


def test_torch_is_found_under_build_isolation(tmp_path):
    """Wherever this interpreter has it, here by a .pth file; isolation works by PYTHONPATH."""
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    site.joinpath("a.pth").write_text(f"{fake_torch(tmp_path / 'elsewhere', '2.10.0')}\n")
    site.joinpath("b.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # setuptools
    blocked = tmp_path / "isolation" / "sitecustomize.py"
    blocked.parent.mkdir()
    blocked.write_text("import sys\nsys.modules['torch'] = None\n")
    text = plan_of(
        copy(tmp_path), tmp_path / "venv" / "bin" / "python", PYTHONPATH=str(blocked.parent)
    )
    assert f"torch 2.10.0 in {tmp_path / 'elsewhere' / 'torch'}, needed is torch>=2.11" in text


def test_no_headers_of_python_are_needed():
    """Many machines have Python without them."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    module = ROOT / "csrc" / "module.cpp"
    subprocess.run([compiler, "-std=c++20", "-fsyntax-only", module], check=True)


def test_what_was_not_built_says_what_helps(tmp_path):
    """`info` of a package that was built without its extension."""
    source = copy(tmp_path)
    assert "skipped" in plan_of(source, SPARSE_ATTN_BUILD="none")
    text = subprocess.run(
        [sys.executable, "-m", "sparse_attn", "info"], cwd=source, check=True,
        env={**os.environ, "PYTHONPATH": str(source)}, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "not built (SPARSE_ATTN_BUILD=none at build time: unset it, then reinstall)" in text


def test_a_checkout_that_hides_an_installation(tmp_path, monkeypatch):
    """Such as `pip install .` and then `python -m sparse_attn` in the same folder."""
    site, checkout = tmp_path / "site", tmp_path / "checkout"
    for folder in (site, checkout):
        (folder / "sparse_attn").mkdir(parents=True)
    monkeypatch.setattr(_ext, "__file__", str(checkout / "sparse_attn" / "_ext.py"))
    monkeypatch.setattr(sys, "path", ["", str(checkout), str(site)])
    (site / "sparse_attn" / "_C.abi3.so").touch()
    assert _ext._hidden() is None  # not a checkout: nothing is hidden by one
    (checkout / "setup.py").touch()
    assert _ext._hidden() == site / "sparse_attn"
    with pytest.warns(UserWarning, match=f"checkout {checkout}, which hides {site}.*install -e"):
        monkeypatch.setattr(_ext, "import_module", _absent)
        assert "start elsewhere" in _ext._load("_C", "C++ extension", "CPU_EXTENSION_MISSING")
    (site / "sparse_attn" / "_C.abi3.so").unlink()
    assert _ext._hidden() is None


def _absent(name):
    raise ModuleNotFoundError(name)
