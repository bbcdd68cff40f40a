"""Models for a GPU compile without a graph break: traced here through fake tensors, no GPU needed.

The graph must hold the kernels' own overloads: the choice of a backend happened while tracing.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_attn

OPS = torch.ops.sparse_attn


class Layer(torch.nn.Module):
    """Attention between two projections, four query heads to two KV heads."""

    def __init__(self, method):
        super().__init__()
        self.method = method
        self.project = torch.nn.Parameter(torch.empty(8 * 32, 64, device="cuda"))
        self.out = torch.nn.Parameter(torch.empty(64, 4 * 32, device="cuda"))
        self.requires_grad_(False)

    def forward(self, x):
        heads = torch.nn.functional.linear(x, self.project).unflatten(2, (8, 32)).transpose(1, 2)
        query, key, value = heads.split((4, 2, 2), 1)
        out = sparse_attn.attention(query, key, value, self.method, backend="triton")
        return x + torch.nn.functional.linear(out.transpose(1, 2).flatten(2), self.out)


def trace(method, lengths, **options):
    """The overloads of ours in each graph that a model is compiled to."""
    graphs = []

    def capture(module, example_inputs):
        graphs.append({n.target for n in module.graph.nodes if "sparse_attn" in str(n.target)})
        return module.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = Layer(method)
        model = torch.compile(lambda x: layer(layer(x)), fullgraph=True, backend=capture, **options)
        for length in lengths:
            out = model(torch.empty(1, length, 64, device="cuda"))
            assert out.shape == (1, length, 64) and out.device.type == "cuda"
    return graphs


@pytest.mark.triton
@pytest.mark.parametrize(
    "method, length, overloads",
    [
        (
            "flex_prefill",
            16384,
            {OPS.flex_prefill_select.triton, OPS.block_sparse_attention.triton},
        ),
        ("flex_prefill", 100, {OPS.block_sparse_attention.triton}),  # below the crossover
        ("dense", 1, {OPS.block_sparse_attention.triton}),
    ],
)
def test_a_model_compiles_to_one_graph(method, length, overloads):
    assert trace(method, [length]) == [overloads]


@pytest.mark.triton
def test_lengths_are_symbols():
    """Another length runs the same graph."""
    assert len(trace("flex_prefill", [16400, 18000, 40001], dynamic=True)) == 1
