"""What only a GPU can show: graphs, no waiting for the host. Skipped where there is none."""

import pytest
import torch

import sparse_attn
from sparse_attn.block_index import BlockIndex
from sparse_attn.methods.hip import HiP, HiPState
from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op as gradient
from sparse_attn.ops.flex_prefill_attention import op as flex_prefill
from sparse_attn.ops.flex_prefill_select import op as select
from sparse_attn.ops.hip_attention import op as hip
from sparse_attn.ops.hip_prune_select import op as hip_prune
from sparse_attn.ops.hip_select import op as hip_select
from sparse_attn.ops.merge_attention_states import op as merge
from sparse_attn.ops.sale_estimate import op as estimate
from sparse_attn.ops.sale_quantize import op as quantize
from sparse_attn.ops.squeezed_attention import op as squeezed
from sparse_attn.ops.squeezed_lookup import op as lookup
from tests.cases import Shape, index, inputs
from tests.ops.cases_block_sparse_attention import paged
from tests.ops.cases_sale_estimate import case as sale_case
from tests.squeezed_cases import Case, lookup_inputs

pytestmark = pytest.mark.gpu

BACKENDS = [pytest.param("triton", marks=pytest.mark.triton), "cuda"]


def require(name, backend):
    reason = sparse_attn.backends()[name][backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def on_gpu(*tensors):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in tensors]


def attention_call(q_block, n_queries, **options):
    shape = Shape(B=2, Hq=8, Hkv=2, Hi=2, Tq=n_queries, Tk=2000, D=128, Dv=128, q_block=q_block)
    return lambda: (attend, [*inputs(shape, torch.bfloat16), *index(shape)], options)


def paged_call(n_queries):
    def make():
        op, args, _ = attention_call(min(n_queries, 64), n_queries)()
        lengths = torch.tensor([2000, 777], dtype=torch.int32)
        key, value = (torch.nn.functional.pad(x, (0, 0, 0, 16)) for x in args[1:3])
        *args[1:3], table = paged(key, value, lengths, 32)
        return op, args, {"block_table": table, "kv_lengths": lengths}

    return make


def backward_call(**options):
    def make():
        shape = Shape(B=2, Hq=8, Hkv=2, Hi=2, Tq=500, Tk=700, D=128, Dv=128, q_block=64)
        args = [*inputs(shape, torch.bfloat16), *index(shape)]
        out, lse = attend(*args, **options, backend="reference")
        grads = [torch.randn_like(out), torch.randn_like(lse)]
        return gradient, [*grads, *args[:3], out, lse, *args[3:]], options

    return make


def select_call():
    shape = Shape(Hq=8, Hkv=2, Tq=2000, Tk=2000, D=128, Dv=128)
    return select, list(inputs(shape, torch.bfloat16)[:2]), {"min_budget": 128}


def whole_call():
    shape = Shape(Hq=8, Hkv=2, Tq=2000, Tk=2000, D=128, Dv=128)
    return flex_prefill, list(inputs(shape, torch.bfloat16)), {"min_budget": 128}


def hip_call(op, *options, n_queries=2000):
    def make():
        shape = Shape(Hq=8, Hkv=2, Tq=n_queries, Tk=2000, D=128, Dv=128)
        query, key, value = inputs(shape, torch.bfloat16)
        return op, [query, key, *([value] if op is hip else []), *options], {}

    return make


def merge_call():
    lse = torch.randn(2, 8, 100)
    return merge, [torch.randn(2, 8, 100, 128), lse, torch.randn(2, 8, 100, 128), lse + 1], {}


def quantize_call():
    return quantize, [inputs(Shape(Hq=8, Tq=2000, D=128), torch.bfloat16)[0]], {}


def estimate_call():
    """What a graph replays on is the codes of the queries: of any bytes."""
    *tensors, theta = sale_case(2000, 2000, 128, 8, 2)
    return estimate, [*tensors, theta], {}


def squeezed_call(whole, **case):
    def make():
        args = lookup_inputs(Case(B=2, Hq=8, K=700, K1=90, D=128, **case), torch.bfloat16)
        if not whole:
            return lookup, args, {}
        *level, shared, scale = args[1:]
        n = int(level[2].max())
        keys = [
            torch.randn(b, 2, m, 128).bfloat16() for b, m in ((1, n), (1, n), (2, 300), (2, 300))
        ]
        lengths = torch.tensor([200, 300], dtype=torch.int32)
        return squeezed, [args[0], *keys, *level, shared, lengths, scale], {}

    return make


CALLS = {
    "prefill": attention_call(64, 2000),
    "prefill with sink and window": attention_call(64, 2000, sink=100, window=300),
    "decode": attention_call(1, 1),
    "paged prefill": paged_call(300),
    "paged decode": paged_call(1),
    "backward": backward_call(),
    "backward, sink+window": backward_call(sink=100, window=300),
    "select": select_call,
    "flex_prefill_attention": whole_call,
    "hip": hip_call(hip, 128),
    "hip_select": hip_call(hip_select, 128),
    "hip_select, decode": hip_call(hip_select, 128, 1, 2, 1, n_queries=1),
    "hip_prune_select": hip_call(hip_prune, [64, 8], [512, 128], [2, 1]),
    "merge": merge_call,
    "sale quantize": quantize_call,
    "sale estimate": estimate_call,
    "squeezed lookup, decode": squeezed_call(False, Tq=1),
    "squeezed lookup": squeezed_call(False, Tq=150, shared=True),
    "squeezed_attention, decode": squeezed_call(True, Tq=1, shared=True),
    "squeezed_attention": squeezed_call(True, Tq=150),
}


@pytest.fixture(params=CALLS)
def prepared(request):
    """(operator, tensors on the GPU, options) for a backend that can be there."""

    def prepare(backend):
        op, args, options = CALLS[request.param]()
        require(op.name, backend)
        args = on_gpu(*args)
        options = dict(zip(options, on_gpu(*options.values()), strict=True))
        op(*args, **options, backend=backend)  # compiles
        torch.cuda.synchronize()
        return op, args, options

    return prepare


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_gpu(prepared, backend):
    op, args, options = prepared(backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args, **options, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_and_replay(prepared, backend):
    """A graph replayed on other inputs computes what a call would, bit for bit."""
    op, args, options = prepared(backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*args, **options, backend=backend)
    if args[0].is_floating_point():
        args[0].copy_(torch.randn_like(args[0]) * 2)
    else:
        args[0].copy_(args[0].flip(2))
    for x in captured:
        x.fill_(-1)
    graph.replay()
    expected = op(*args, **options, backend=backend)
    for got, want in zip(captured, expected, strict=True):
        if op is select and got.dim() == 4:  # entries past the counts are never read
            listed = torch.arange(got.shape[-1], device="cuda") < expected[1][..., None]
            got, want = got * listed, want * listed
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_with_a_choice_of_hip_are_replayed(backend):
    """In a cache of fixed size, whose lengths grow from step to step."""
    require("hip_attention", backend)
    shape = Shape(B=2, Hq=8, Hkv=2, Tq=1, Tk=2048, D=128, Dv=128)
    query, key, value = (x.cuda() for x in inputs(shape, torch.bfloat16))
    lengths = torch.tensor([2000, 700], dtype=torch.int32, device="cuda")
    config, cache = HiP(budget=128, share_kv_heads=True), {"kv_lengths": lengths}
    called, replayed = HiPState(config, 3), HiPState(config, 3)
    replayed.search(query, key, backend=backend, **cache)  # compiles, makes room
    replayed.attend(query, key, value, backend=backend, **cache)
    search, attend_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(search):
        replayed.search(query, key, backend=backend, **cache)
    with torch.cuda.graph(attend_graph):
        found = replayed.attend(query, key, value, backend=backend, **cache)
    searched = []
    for _ in range(8):
        query.copy_(torch.randn_like(query))
        want = called.attention(query, key, value, backend=backend, **cache)
        searched.append(replayed.advance(query, key, **cache))
        if searched[-1]:
            search.replay()
        attend_graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
        lengths += 1
    assert searched == [step % 3 == 0 for step in range(8)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_stream_and_the_same_bits(prepared, backend):
    op, args, options = prepared(backend)
    one = op(*args, **options, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        two = op(*args, **options, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(one[1:], two[1:], strict=True))
    if op is not select:
        assert torch.equal(one[0], two[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_two_billion_elements(backend):
    """The last head of a tensor whose elements cannot be counted in 32 bits."""
    require("block_sparse_attention", backend)
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of free memory")
    heads, length = 33, 2**19
    key = torch.empty(1, heads, length, 128, dtype=torch.float16, device="cuda")
    assert key.numel() > 2**31
    key[:, -1] = torch.randn(length, 128, dtype=torch.float16, device="cuda")
    query = torch.randn(1, heads, 16, 128, dtype=torch.float16, device="cuda")
    blocks = torch.tensor([0, 5000, length // 64 - 1], dtype=torch.int32, device="cuda")
    listed = BlockIndex(blocks.view(1, 1, 1, 3), blocks.new_full((1, 1, 1), 3), 16, 64)
    out, _ = attend(query, key, key, *listed.blocks, False, backend=backend)
    tokens = (blocks[:, None] * 64 + torch.arange(64, device="cuda")).flatten()
    keys = key[0, -1, tokens].double()
    weights = (query[0, -1].double() @ keys.T / 128**0.5).softmax(-1)
    torch.testing.assert_close(out[0, -1].double(), weights @ keys, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_compiled_by_inductor(backend):
    require("flex_prefill_select", backend)
    query, key, value = on_gpu(*inputs(Shape(Hq=8, Hkv=2, Tq=4096, Tk=4096), torch.bfloat16))

    def model(query, key, value):
        out = sparse_attn.attention(query * 2, key, value, backend=backend, fallback=False)
        return out.relu()

    got = torch.compile(model, fullgraph=True)(query, key, value)
    torch.testing.assert_close(got, model(query, key, value))
