import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import sparse_attn
from sparse_attn import _ext
from sparse_attn.methods.dense import Dense
from sparse_attn.ops import attention as named
from sparse_attn.ops import flex_prefill_attention as fused
from sparse_attn.ops import flex_prefill_select as select
from sparse_attn.ops import merge_attention_states as merge
from sparse_attn.ops._checks import cuda_kernels_serve
from sparse_attn.ops.block_sparse_attention import op
from tests.cases import Shape, index, inputs

SHAPE = Shape(Tq=64, Tk=64, q_block=32, kv_block=32, share=1.0)


def python(code):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_brings_in_nothing_optional():
    python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import sparse_attn
        new = {m.split(".")[0] for m in set(sys.modules) - before}
        assert not new & {"triton", "matplotlib", "transformers", "safetensors", "tqdm"}, new
        """
    )


def test_works_without_the_extension():
    python(
        """
        import sys
        sys.modules["sparse_attn._C"] = None
        import torch, sparse_attn
        q = torch.randn(1, 2, 40, 16)
        out, stats = sparse_attn.attention(q, q, q, "dense", return_stats=True)
        assert stats.backend == "reference"
        assert "not built" in sparse_attn.info() or "does not load" in sparse_attn.info()
        try:
            sparse_attn.attention(q, q, q, "dense", backend="cpp")
        except NotImplementedError as error:
            assert "cpp: C++ extension" in str(error)
        else:
            raise AssertionError("a forced backend fell back")
        """
    )


def test_an_extension_that_does_not_load_is_named_with_the_remedy():
    python(
        """
        import sys

        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "sparse_attn._C_cuda":
                    raise ImportError("undefined symbol: aoti_something")

        sys.meta_path.insert(0, Broken())
        sys.modules["cupy"] = None
        import torch, sparse_attn
        why = "CUDA extension does not load (undefined symbol: aoti_something): reinstall against"
        assert why in sparse_attn.info()
        assert why in sparse_attn.backends()["merge_attention_states"]["cuda"]
        assert sparse_attn.backends()["merge_attention_states"]["reference"] is None
        """
    )


def test_forced_backends_never_fall_back():
    args = (*inputs(SHAPE), *index(SHAPE))
    with pytest.raises(NotImplementedError, match="cuda: runs on cuda tensors"):
        op(*args, backend="cuda")
    with pytest.raises(ValueError, match="backend: got 'gpu'"):
        op(*args, backend="gpu")
    double = [x.double() for x in args[:3]]
    with pytest.raises(NotImplementedError, match="cpp: float64"):
        op(*double, *args[3:], backend="cpp")


@pytest.mark.triton
def test_why_triton_cannot_serve(monkeypatch):
    wide = [x.repeat(1, 1, 1, 5) for x in inputs(SHAPE)]
    call_of = lambda *x: op(*x, *index(SHAPE), backend="triton")  # noqa: E731
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(NotImplementedError, match="triton: head_dim 320"):
        call_of(*wide)
    with pytest.raises(NotImplementedError, match="triton: float64"):
        call_of(*(x.double() for x in inputs(SHAPE)))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(NotImplementedError, match="triton: runs on cuda tensors"):
        call_of(*inputs(SHAPE))


def test_without_triton():
    python(
        """
        import sys
        sys.modules["triton"] = None
        import torch, sparse_attn
        assert "pip install triton" in sparse_attn.backends()["attention"]["triton"]
        """
    )


@pytest.mark.parametrize(
    "archs, gpu, served",
    [
        ("80 90a 100a", (8, 0), True),
        ("80 90a 100a", (8, 9), True),  # the code of sm_80
        ("80 90a 100a", (9, 0), True),
        ("80 90a 100a", (10, 3), True),  # portable code of the newest, as on all that follow
        ("90a", (8, 6), False),
        ("80 120", (9, 0), False),  # another generation than sm_80's
        ("90a", (9, 0), True),
        ("103a 120", (10, 0), False),
        ("100a 120", (10, 3), False),
        ("100f 120", (10, 3), True),
        ("", (8, 6), True),  # NVRTC
        ("", (7, 5), False),
    ],
)
def test_a_gpu_that_the_cuda_extension_has_no_code_for(archs, gpu, served, monkeypatch):
    found = SimpleNamespace(major=gpu[0], minor=gpu[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(_ext, "CUDA_ARCHS", tuple(archs.split()))
    first = SimpleNamespace(dtype=torch.float16, is_cuda=True, device="cuda:0")
    why = cuda_kernels_serve(first)
    assert (why is True) == served
    if archs and not served:
        assert f"this GPU is sm_{gpu[0]}{gpu[1]}: reinstall with SPARSE_ATTN_CUDA_ARCHS=" in why


def test_how_long_the_cuda_kernel_can_be():
    (when,) = (row.when for row in op.impls if row.backend == "cuda")
    for n, served in ((2**30 - 1, True), (2**30, "1073741824 tokens, served: less than 2**30")):
        x = torch.zeros(1, 1, 1, 64, dtype=torch.float16).expand(1, 1, n, 64)
        for args in ((x, x[:, :, :9], x[:, :, :9]), (x[:, :, :9], x, x)):
            assert str(when(*args)).startswith(str(served))


def test_environment_forces_a_backend(monkeypatch):
    query, key, value = inputs(SHAPE)
    monkeypatch.setenv("SPARSE_ATTN_BACKEND", "reference")
    assert op.select(op.bind(query, key, value, *index(SHAPE))).backend == "reference"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes(mode):
    with mode():
        out, lse = op(*inputs(SHAPE), *index(SHAPE))
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "reference", "default overload", "reference overload"])
def test_forward_mode_is_refused(backend):
    query, key, value = inputs(SHAPE)
    name, _, overload = backend.partition(" ")
    run = getattr(op.default._overloadpacket, name) if overload else partial(op, backend=name)
    call_of = lambda q: run(q, key, value, *index(SHAPE))[0]  # noqa: E731
    if not overload:
        with pytest.raises(NotImplementedError, match="block_sparse_attention has no forward-mode"):
            torch.func.jvp(call_of, (query,), (torch.ones_like(query),))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="no forward-mode"):
            call_of(forward_ad.make_dual(query, torch.ones_like(query)))
        assert call_of(query).isfinite().all(), "no tangent, nothing to lose"


def test_autocast():
    query, key, value = inputs(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = torch.ops.sparse_attn.block_sparse_attention(query, key, value, *index(SHAPE))
        mixed = sparse_attn.attention(query.bfloat16(), key, value, "dense")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert mixed.dtype == torch.bfloat16


def test_compile_and_export():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return sparse_attn.attention(q, k, v, "flex_prefill", fallback=False)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for n in (200, 333):
        q, k, v = inputs(Shape(Tq=n, Tk=n, Hq=4, Hkv=2))
        assert torch.equal(compiled(q, k, v), model(q, k, v))
    exported = torch.export.export(model, (q, k, v)).module()
    assert torch.equal(exported(q, k, v), model(q, k, v))


OPERATORS = {
    "block_sparse_attention": lambda q, k, v: op(q, k, v, *Dense().select(q, k).blocks, sink=150),
    "flex_prefill_select": lambda q, k, v: select.op(q, k, 0.6, 0.0, 16, None, 16)[1:],
    "flex_prefill_attention": lambda q, k, v: fused.op(q, k, v, 0.6, 0.0, 16, None, 16),
    "attention": lambda q, k, v: named.op.default(q, k, v, "flex_prefill", '{"gamma": 0.6}'),
    "merge_attention_states": lambda q, k, v: merge.op(q, q.sum(-1), 2 * q, q.sum(-1)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_compiles_and_is_exported_with_dynamic_lengths(name):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return OPERATORS[name](q, k, v)

    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    given = inputs(Shape(Tq=200, Tk=200, Hq=4, Hkv=2))
    length = torch.export.Dim("length", min=129, max=2**20)
    shapes = {n: {2: length} for n in "qkv"}
    exported = torch.export.export(model, given, dynamic_shapes=shapes).module()
    for n in (200, 333):
        args = inputs(Shape(Tq=n, Tk=n, Hq=4, Hkv=2))
        for x, y, z in zip(model(*args), compiled(*args), exported(*args), strict=True):
            assert torch.equal(x, y) and torch.equal(x, z)


def test_backends_and_info():
    table = sparse_attn.backends()
    assert set(table["block_sparse_attention"]) == {"cuda", "triton", "cpp", "reference"}
    assert table["block_sparse_attention"]["reference"] is None
    text = subprocess.run(
        [sys.executable, "-m", "sparse_attn", "info"], capture_output=True, text=True, check=True
    ).stdout
    assert "instruction set" in text and "block_sparse_attention" in text
