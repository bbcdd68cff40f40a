"""What the Triton operators would launch on a GPU, seen through fake tensors: no GPU needed.

Fake tensors raise where the host reads a value, so these tests show that nothing is read too.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import aot
from bench.cases import (
    block_sparse_attention,
    flex_prefill_select,
    hip_prune_select,
    hip_select,
    sale_select,
    squeezed_attend,
    squeezed_lookup,
)
from sparse_attn.ops.block_sparse_attention import op
from tests.cases import TRITON, Shape, call, index, inputs
from tests.ops import all_of

pytestmark = pytest.mark.triton

SELECT = [
    "probe_extent_kernel", "probe_join_kernel", "probe_profile_kernel", "probe_profile_kernel",
    "mean_key_kernel", "block_sums_kernel", "choose_kernel", "pooled_scores_kernel", "list_kernel",
]  # fmt: skip


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def names(function, *args):
    return [kernel.__name__ for kernel, *_ in aot.launches("sm_90", function, *args)]


@pytest.mark.parametrize("block", [16, 64, 128])
def test_select_is_nine_launches_and_small(block):
    def select():
        with Largest() as mode:
            flex_prefill_select.compiled("bf16", 128, block)
        largest.append(mode.elements)

    largest = []
    assert names(select) == SELECT
    # query, key and the result are the largest; never heads x queries x keys
    length, heads = 131072, 8
    assert largest[0] <= max(heads * length * 128, heads * (length // block) ** 2)


def test_sale_is_small():
    def sale():
        with Largest() as mode:
            sale_select.compiled("bf16", 128)
        largest.append(mode.elements)

    largest = []
    of_codes = ["sale_sum_kernel", "sale_mean_kernel", "sale_code_kernel"]
    assert names(sale) == [
        *of_codes, *of_codes, "sale_threshold_kernel", "sale_expand_kernel", "sale_scale_kernel",
        "sale_estimate_kernel", "sale_list_kernel",
    ]  # fmt: skip
    # queries, keys and the lists are the largest; never heads x queries x keys
    assert largest[0] <= max(8 * 131072 * 128, 8 * (131072 // 64) * (131072 // 32))


def test_prefill_is_one_launch_and_decode_two():
    assert names(block_sparse_attention.compiled, "bf16", 128, 4096) == [
        "block_sparse_attention_kernel"
    ]
    decode = aot.launches("sm_90", block_sparse_attention.compiled, "bf16", 128, 1, 1, 16)
    assert [kernel.__name__ for kernel, *_ in decode] == [
        "block_sparse_attention_kernel", "join_splits_kernel"
    ]  # fmt: skip
    # eight query heads of two KV heads: a tile of queries per group, split over the keys
    assert decode[0][3]["HEADS"] == 4 and decode[0][1] == 2 * 32


def test_hip_is_one_launch_and_small():
    """A program per list of blocks; no memory but that of the result."""
    largest = []
    for function, heads in ((hip_select.compiled, 8), (hip_prune_select.compiled, 8)):

        def select(function=function):
            with Largest() as mode:
                function("bf16", 128)
            largest.append(mode.elements)

        (launched,) = aot.launches("sm_90", select)
        assert launched[0].__name__ in ("hip_select_kernel", "hip_prune_select_kernel")
        assert launched[1] == heads * 8192 // 64
    assert largest == [2 * 131072 * 128] * 2  # the keys
    # in decoding the heads that share keys are rows of one tile
    paged = aot.launches("sm_90", hip_select.paged, "bf16", 128)
    assert paged[0][1] == 4 * 2 and paged[0][3]["BLOCK_R"] == 16


KEPT = ["cluster_scores_kernel", "test_clusters_kernel"]
TWO_PASSES = ["cluster_scores_kernel", *KEPT]


@pytest.mark.parametrize("n_queries, level", [(1, KEPT), (16, KEPT), (17, TWO_PASSES)])
def test_a_lookup_of_two_levels(n_queries, level):
    found = aot.launches("sm_90", squeezed_lookup.compiled, "bf16", 128, n_queries)
    want = [*level, "mark_children_kernel", *level, "list_runs_kernel"]
    assert [kernel.__name__ for kernel, *_ in found] == want
    if n_queries == 1:  # eight query heads of two KV heads: one tile per group, split over clusters
        assert found[0][3]["HEADS"] == 4 and found[0][1] == 2 * -(-1300 // 64)


@pytest.mark.parametrize("n_queries", [1, 1024])
def test_attention_to_runs_has_a_fixed_grid(n_queries):
    found = aot.launches("sm_90", squeezed_attend.compiled, "bf16", 128, n_queries)
    assert [kernel.__name__ for kernel, *_ in found] == [
        "expand_runs_kernel", "squeezed_attend_kernel", "join_units_kernel"
    ]  # fmt: skip
    assert found[1][1] == (264 if n_queries == 1 else 132)  # of 132 multiprocessors


@pytest.mark.parametrize("kv_block", range(1, 9))
def test_gathered_tokens_fill_tiles(kv_block):
    """The tile is as full of small blocks as of large ones, for prefill and decode."""
    for n_queries, q_block in ((4096, 128), (1, 1)):
        (_, _, _, small), *_ = aot.launches(
            "sm_90", block_sparse_attention.compiled, "bf16", 128, n_queries, q_block, kv_block
        )
        (_, _, _, large), *_ = aot.launches(
            "sm_90", block_sparse_attention.compiled, "bf16", 128, n_queries, q_block, 32
        )
        assert small["BLOCK_N"] == large["BLOCK_N"] >= 64
        assert small["GATHER"] == (small["BLOCK_N"] % kv_block != 0 or kv_block < 64)


@pytest.mark.parametrize("arch, table", [
    ("sm_80", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_90", "sm_90"),
    ("sm_100", "sm_100"), ("sm_103", "sm_100"), ("sm_120", "sm_80"), ("sm_121", "sm_80"),
])  # fmt: skip
def test_architectures_that_are_not_listed(arch, table):
    from sparse_attn.triton_kernels.configs import nearest

    assert nearest(arch) == table


LENGTHS = """
import json, sys, torch
from bench import aot
from tests.ops import all_of

class New:
    def __init__(self, batch, transposed):
        self.batch, self.transposed = batch, transposed

    def empty(self, *shape, batch=0, dtype=torch.float32):
        batch = () if batch is None else (batch or self.batch,)
        return torch.empty((*batch, *shape), dtype=dtype, device="cuda")

    def __call__(self, heads, n):
        shape = (n, heads, 128) if self.transposed else (heads, n, 128)
        x = self.empty(*shape, dtype=torch.float16)
        return x.transpose(1, 2) if self.transposed else x

def calls(new, *lengths):
    for call in all_of("any_length").values():
        call(new, *lengths)

found = {}
for length in (8192, 8193, 16400, 32640):
    for batch in (1, 3):
        for n_queries in (length, 777):
            for transposed in (True, False):
                args = New(batch, transposed), n_queries, length
                for kernel, _, args, options in aot.launches("sm_90", calls, *args):
                    seen = found.setdefault(kernel.__name__, set())
                    seen.add(repr((aot.specialise(kernel, args, options), sorted(options.items()))))
print(json.dumps({k: len(v) for k, v in found.items()}))
"""


def test_lengths_and_batches_alone_compile_nothing_anew():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    text = subprocess.run(
        [sys.executable, "-c", LENGTHS], env=env, check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(text)
    assert {*SELECT, "join_units_kernel", "sale_threshold_kernel"} <= set(found)
    most = {kernel: n for table in all_of("COMPILED").values() for kernel, n in table.items()}
    assert set(most) <= set(found)
    assert not {k: n for k, n in found.items() if n > most.get(k, 1)}


def test_split_decode_gives_the_same_bits_each_time():
    shape = Shape(Tq=1, Tk=3000, Hq=4, Hkv=2, Hi=2, q_block=1, kv_block=16, share=0.5)
    args = (*inputs(shape, torch.float16), *index(shape))
    one, two = (call(op, TRITON, *args) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
