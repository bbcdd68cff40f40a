"""What is read from masks [B, 1, Tq, Tk]: padding, windows, and what is refused."""

import pytest
import torch

from sparse_attn.integrations import masks


def test_every_row_of_a_long_mask_is_read():
    n_queries, n_keys = 2 * masks.ROWS + 5, 2 * masks.ROWS + 50
    i, j = torch.arange(n_queries)[:, None], torch.arange(n_keys)
    seen = (j <= i + 45) & (j >= 60)
    assert masks.span(seen) == masks.Span(slice(15, n_queries), slice(60, n_keys))
    for row in (0, masks.ROWS - 1, masks.ROWS, n_queries - 1):
        other = seen.clone()
        other[row, 100] ^= True
        with pytest.raises(NotImplementedError, match="^attention_mask: "):
            masks.span(other)


def test_a_mask_changed_in_place_is_read_again():
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    x = torch.empty(1, 1, 8, 4)
    assert masks.spans(mask, x, x)[0].keys == slice(0, 8)
    mask[..., :3] = False
    assert masks.spans(mask, x, x)[0].keys == slice(3, 8)


def test_a_mask_changed_in_inference_mode_is_read_again():
    """Tensors made there do not count their changes."""
    x = torch.empty(1, 1, 8, 4)
    with torch.inference_mode():
        mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None].clone()
        assert masks.spans(mask, x, x)[0].keys == slice(0, 8)
        mask[..., :3] = False
        assert masks.spans(mask, x, x)[0].keys == slice(3, 8)


@pytest.mark.parametrize("window", [None, 1, 6, 40])
def test_the_real_part_is_found(window):
    """Every chunk of every padded sequence of 12 tokens."""
    n = 12
    for start in range(n):
        for end in range(start + 1, n + 1):
            for past in range(n):
                for chunk_end in range(past + 1, n + 1):
                    stand, j = torch.arange(past, chunk_end)[:, None], torch.arange(chunk_end)
                    seen = (j <= stand) & (j >= start) & (j < end)
                    if window is not None:
                        seen &= j > stand - window
                    queries, keys, last = masks.span(seen, window)
                    rows = torch.arange(past, chunk_end)
                    real = (rows >= start) & (rows < end)
                    got = torch.zeros(len(rows), dtype=torch.bool)
                    got[queries] = True
                    if not real.any():  # padding: what is computed for it is not looked at
                        continue
                    assert torch.equal(got, real)
                    behind = seen[-1].nonzero().flatten() if chunk_end > end else j[:0]
                    want = slice(int(behind[0]), int(behind[-1]) + 1) if len(behind) else None
                    assert last == want
                    # the last real query sees the last real key: aligned as attention wants it
                    assert keys.stop == rows[real][-1] + 1
                    assert torch.equal(seen[real].any(0).nonzero()[0], torch.tensor([keys.start]))


def test_a_window_of_another_size_is_refused():
    i, j = torch.arange(20)[:, None], torch.arange(20)
    seen = (j <= i) & (j > i - 5)
    assert masks.span(seen, 5) == masks.Span(slice(0, 20), slice(0, 20))
    for window in (None, 4, 6):
        with pytest.raises(NotImplementedError, match="^attention_mask: .*sliding windows that a"):
            masks.span(seen, window)
