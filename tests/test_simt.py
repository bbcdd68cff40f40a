"""The SIMT executor finds what it is for: faults one line away from a kernel that is right."""

import pytest
import torch

from tests import simt

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
SEEDS = range(4)


def run(program, data, out, broken, threads=64, seed=0):
    numbers = {"n": len(data), "threads": threads, "shared_bytes": 2 * len(data), "broken": broken}
    simt.run(program, {"in": data}, {"out": out}, numbers, seed)
    return out


FAULTS = {  # program: (elements per thread, what it makes of its input, the report)
    "missing_syncthreads": (1, lambda x: x.flip(0), "shared memory at offset .* (nobody|race)"),
    "missing_syncwarp": (1, lambda x: x.view(-1, 2).flip(1).flatten(), "nobody has written|race"),
    "missing_wait": (8, lambda x: x.flip(0), "a cp.async of thread .* no wait for it"),
    "missing_barrier_after_wait": (8, lambda x: x.flip(0), "nobody has written|cp.async|race"),
    "read_out_of_bounds": (1, lambda x: x, "thread 63: reads 2 bytes out of bounds.* of in,"),
    "shared_out_of_bounds": (1, lambda x: x, "thread 63: writes 2 bytes out of bounds.*shared"),
    "write_input": (1, lambda x: x, "writes 2 bytes of in, which is an input"),
    "read_unwritten": (1, lambda x: x, "thread 5: reads .* that nobody has written"),
    "misaligned": (1, None, "thread 0: reads 16 bytes at an address that is no multiple"),
    "divergent_barrier": (1, lambda x: x, "divergent barrier: thread 0 waits .* thread 7 waits"),
    "deadlock": (1, None, "deadlock: thread 0 waits at __shfl_xor_sync.* thread 3 has returned"),
    "lane_outside_of_mask": (1, None, "a shuffle reads a lane that is not in its mask"),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("program", FAULTS)
def test_finds(program, seed):
    each, expected, message = FAULTS[program]
    data = torch.arange(64 * each).to(torch.int16)
    out = run(program, data, torch.full_like(data, -1), False, seed=seed)
    assert expected is None or torch.equal(out, expected(data))
    with pytest.raises(RuntimeError, match=message) as error:
        run(program, data, torch.full_like(data, -1), True, seed=seed)
    assert "block (0, 0, 0)" in str(error.value) and "faults.cpp:" in str(error.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_fragment_index_shows(seed):
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    data = torch.cat([a.flatten(), b.T.flatten()]).view(torch.int16)
    got, wrong = (
        run("wrong_fragment", data, torch.zeros(128, dtype=torch.int16), broken, 32, seed)
        for broken in (False, True)
    )
    want = (a.float() @ b.float()).bfloat16().flatten()
    torch.testing.assert_close(got.view(torch.bfloat16), want, rtol=1e-2, atol=1e-6)
    assert not torch.allclose(wrong.view(torch.bfloat16), want, rtol=0.1, atol=0.1)


def test_the_seed_decides_the_order_of_threads():
    data = torch.zeros(64, dtype=torch.int16)
    orders = [
        run("order_of_threads", data, torch.zeros(66, dtype=torch.int16), False, seed=seed)[2:]
        for seed in (*SEEDS, 0)
    ]
    assert all(torch.equal(x.sort()[0], torch.arange(64).short()) for x in orders)
    assert torch.equal(orders[0], orders[-1])
    assert len({tuple(x.tolist()) for x in orders}) == len(SEEDS)


def test_conversions_round_as_torch_does():
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    near = torch.randn(20000) * 2.0 ** torch.randint(-26, 17, (20000,))
    halves = bits.view(torch.float16).float()
    for x in (halves, halves * (1 + 2**-11), bits.view(torch.bfloat16).float(), near):
        x = x.contiguous()
        for name, dtype in (("to_half", torch.float16), ("to_bfloat16", torch.bfloat16)):
            out = torch.empty(len(x), dtype=dtype)
            numbers = {"n": len(x), "threads": 256, "shared_bytes": 0, "broken": 0}
            simt.run(name, {"in": x}, {"out": out.view(torch.int16)}, numbers)
            assert torch.equal(out.nan_to_num(7, 8, 9), x.to(dtype).nan_to_num(7, 8, 9))
