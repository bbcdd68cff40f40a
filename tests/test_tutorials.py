"""The code of the tutorials runs as it stands, from the root of the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))


def test_all_are_here():
    assert [page.stem for page in PAGES] == [
        "choose_a_method", "fixed_context", "speed_up_a_model", "write_a_selector",
    ]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_code_runs(page, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)  # what a page writes does not stay
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert blocks
    names = {"__name__": page.stem}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
