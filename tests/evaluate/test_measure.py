"""What is counted in a model's logits, on one whose logits are known, and what is timed."""

import argparse
import math
import types

import pytest
import torch

transformers = pytest.importorskip("transformers")
for module in ("tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(module)
from sparse_attn import Dense, probe  # noqa: E402
from sparse_attn.demo.text import Prompt  # noqa: E402
from sparse_attn.evaluate.measure import BASELINE, Evaluation, bits  # noqa: E402

RIGHT = 0.9  # what the model gives the next token at even places; at odd places it is wrong


class Oracle:
    """A model that knows the prompt, with logits for the next token of every other place."""

    device = torch.device("cpu")

    def __call__(self, input_ids, logits_to_keep, use_cache):
        n = input_ids.shape[1]
        logits = torch.full((1, n, 256), (1 - RIGHT) / 255).log()
        for i in range(n - 1):
            token = int(input_ids[0, i + 1])
            logits[0, i, token if i % 2 == 0 else (token + 1) % 256] = math.log(RIGHT)
        return types.SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def set_attn_implementation(self, name):
        pass


def prompt():
    """100 different bytes; the answers are at 90 (known, from 89 wrong), 91, 93 and 95."""
    ids = torch.arange(100)[None] + 7
    return Prompt(ids, [range(90, 92), range(93, 94), range(95, 96)], 80)


def test_bits_are_those_of_the_next_token():
    right, wrong = -math.log2(RIGHT), -math.log2((1 - RIGHT) / 255)
    assert bits(Oracle(), prompt()) == pytest.approx((right + wrong) / 2, rel=1e-5)


def test_answers_and_bits_of_a_task():
    given = prompt()
    source = types.SimpleNamespace(plain=lambda length: given)
    evaluation = Evaluation(
        Oracle(), source, [], argparse.Namespace(depths=1, samples=1), {"methods": {}, "cells": {}}
    )
    assert evaluation.answered(BASELINE, given) == 0.75  # 91, 93 and 95 are right, 90 is not
    evaluation.maker = lambda length: types.SimpleNamespace(
        length=length, source=source, needle=lambda depth: given, task=lambda task: given
    )
    evaluation.tasks(100, BASELINE)
    cell = evaluation.results["cells"]["100"][BASELINE]
    right, wrong = -math.log2(RIGHT), -math.log2((1 - RIGHT) / 255)
    assert cell["bits"] == pytest.approx((right + wrong) / 2, rel=1e-5)
    assert set(cell["needles"].values()) == {0.75} == {cell["copying"]}


def test_all_attention_is_timed(monkeypatch):
    """That of layers with a sliding window too, with a method as in the baseline."""
    config = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    ticks = iter(range(1000))
    monkeypatch.setattr(probe, "clock", lambda x: next(ticks))  # a second for each call
    for method in (None, Dense()):
        timed = probe.Probe(method, fallback=False)
        probe.register_probe(timed, "timed")
        model.set_attn_implementation("timed")
        with torch.no_grad():
            model(input_ids=torch.arange(50)[None], use_cache=False)
        assert timed.seconds == 3
