import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("sparse_attn/", "csrc/", "triton_kernels/")


def build(tmp_path, **env):
    """Copies the sources and builds a wheel from them; returns its name."""
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if name.startswith((*FOLDERS, "setup.py", "pyproject", "README", "LICENSE")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
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


def test_one_wheel_for_every_python(tmp_path):
    assert "-cp310-abi3-" in build(tmp_path, SPARSE_ATTN_BUILD="cpu").name


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
