import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(tmp_path, **env):
    """Copies the sources and builds a wheel from them; returns its name."""
    source = tmp_path / "source"
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if name.startswith(("sparse_attn/", "csrc/", "setup.py", "pyproject", "README", "LICENSE")):
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q",
         "-w", tmp_path / "out", source],
        env={**os.environ, **env}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "out").glob("*.whl")
    return wheel.name


def test_pure_python_wheel(tmp_path):
    assert build(tmp_path, SPARSE_ATTN_BUILD="none").endswith("py3-none-any.whl")


def test_one_wheel_for_every_python(tmp_path):
    name = build(tmp_path, SPARSE_ATTN_BUILD="cpu")
    assert "-cp310-abi3-" in name


def test_unknown_build_is_refused(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        build(tmp_path, SPARSE_ATTN_BUILD="fast")
    assert "SPARSE_ATTN_BUILD: got 'fast'" in error.value.stdout + error.value.stderr
