"""A reader who knows an operator's name finds everything of it: the rule that keeps it so."""

import re
from pathlib import Path

import pytest

import sparse_attn  # noqa: F401
from sparse_attn.methods import METHODS
from sparse_attn.registry import OPS
from tests.ops import all_of

ROOT = Path(__file__).parent.parent
CODE = [
    p
    for folder in ("sparse_attn", "csrc", "tests", "bench", "triton_kernels")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") and p.name != "_build_info.py"
]


@pytest.mark.parametrize("name", sorted(OPS))
def test_each_operator_has_its_files(name):
    wanted = [f"sparse_attn/ops/{name}.py", f"tests/ops/test_{name}.py", f"docs/ops/{name}.md"]
    if not OPS[name].is_composite:
        wanted += [f"sparse_attn/reference/{name}.py"]
        for row in OPS[name].impls:
            if row.backend == "cpp":
                wanted.append(f"csrc/cpu/{name}.cpp")
            if row.backend == "triton":
                wanted.append(f"triton_kernels/{name}.py")
            if row.backend == "cuda":
                wanted += [f"csrc/cuda/{name}{end}" for end in (".cuh", "_plan.h", ".cu")]
                wanted += [f"tests/simt/ops/{name}.cpp", f"sparse_attn/nvrtc/{name}.py"]
    if OPS[name].impls and not OPS[name].is_composite:
        wanted += [f"bench/cases/{name}.py", f"tests/ops/cases_{name}.py"]
    missing = [path for path in wanted if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("file", [
    "bench/aot.py", "bench/cuda_aot.py", "bench/gpu/check.py", "bench/gpu/operators.py",
    "tests/guard_pages.py", "tests/ops/__init__.py", "bench/cases/__init__.py",
])  # fmt: skip
def test_shared_machinery_names_no_operator(file):
    """A new operator brings its cases in files of its own."""
    text = (ROOT / file).read_text()
    assert not [name for name in OPS if name != "attention" and re.search(rf"\b{name}\b", text)]


def test_cases_are_complete():
    """What has Triton or CUDA kernels is compiled ahead of time; plans are compared."""
    code = {n: (ROOT / f"bench/cases/{n}.py").read_text() for n in OPS if
            (ROOT / f"bench/cases/{n}.py").exists()}  # fmt: skip
    own = {folder: {p.stem for p in (ROOT / folder).glob("*.py")} & set(OPS)
           for folder in ("triton_kernels", "sparse_attn/nvrtc")}  # fmt: skip
    for folder, names in own.items():
        module = rf"\.{Path(folder).name}\.(\w+)"
        assert {n for text in code.values() for n in re.findall(module, text)} == names
    assert set(all_of("any_length")) == own["triton_kernels"]
    assert set(all_of("arguments")) == set(all_of("direct_call")) == own["sparse_attn/nvrtc"]


@pytest.mark.parametrize("name", sorted(OPS))
def test_each_argument_is_documented(name):
    page = (ROOT / f"docs/ops/{name}.md").read_text()
    arguments = re.findall(r"(\w+)(?:=[^,)]*)?[,)]", OPS[name].schema.split("->")[0])
    assert arguments and not [a for a in arguments if not re.search(rf"\b{a}\b", page)]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_has_its_files(name):
    wanted = [f"tests/methods/test_{name}.py", f"bench/methods/bench_{name}.py",
              f"docs/methods/{name}.md"]  # fmt: skip
    assert not [path for path in wanted if not (ROOT / path).exists()]


def test_no_file_without_an_operator():
    for folder, pattern in (("sparse_attn/ops", "[!_]*.py"), ("sparse_attn/reference", "[!_]*.py"),
                            ("docs/ops", "*.md"), ("csrc/cuda", "*.cu"),
                            ("bench/cases", "[!_]*.py"), ("tests/ops", "cases_*.py")):  # fmt: skip
        stems = {p.stem.removeprefix("cases_") for p in (ROOT / folder).glob(pattern)}
        assert stems <= set(OPS), folder


def test_files_stay_small():
    long = {
        str(p.relative_to(ROOT)): n for p in CODE if (n := len(p.read_text().split("\n"))) > 450
    }
    assert not long


def test_links_in_the_docs_lead_somewhere():
    broken = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken
