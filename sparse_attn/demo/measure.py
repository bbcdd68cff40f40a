"""Times and scores each method on growing prompts."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM

from .. import METHODS, api, mass
from ..brief import dtype_name
from ..cpu_isa import model_dtype
from ..methods import meant
from ..plot import plot_mass
from ..probe import BASELINE, Probe, register_probe
from . import LENGTHS
from .text import Prompt, corpus, prompt

PICTURE_LAYER = 1
HEAD = ("bytes", "method", "prefill", "speed-up", "attention", "speed-up", "density",
        "bits/byte", "needles")  # fmt: skip
LINE = "{:>7}  {:<14} {:>9} {:>9} {:>10} {:>9} {:>8} {:>10} {:>8}"
LONG = 15.0  # seconds of a turn that is not repeated: long runs differ little
VERY_LONG = 60.0  # of a first turn that needs no other: what warms up is short beside it
TOO_LONG = 240.0  # of a turn that nobody has asked for


def register_all(wanted: list[str] | None) -> dict[str, Probe]:
    """One registered attention implementation per method, and the baseline."""
    alone = [n for n, m in METHODS.items() if not getattr(m, "needs_context", False)]
    names = wanted or alone
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        near = meant(unknown[0], METHODS)
        raise SystemExit(f"--method: no such method {unknown}; there are {list(METHODS)}{near}")
    if not set(names) <= set(alone):
        raise SystemExit(
            "--method: squeezed works behind a prepared context: python -m sparse_attn squeeze run"
        )
    probes = {BASELINE: Probe(None), **{name: Probe(METHODS[name]()) for name in names}}
    for name, probe in probes.items():
        register_probe(probe, f"demo_{name}")
    return probes


def forward(model: LlamaForCausalLM, name: str, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Logits of a whole prompt and the seconds it took."""
    model.set_attn_implementation(f"demo_{name}")
    start = time.perf_counter()
    logits = model(input_ids=ids, use_cache=False).logits
    return logits, time.perf_counter() - start


def score(logits: torch.Tensor, given: Prompt) -> tuple[float, float]:
    """Bits per byte of the text and the share of the planted digits predicted at the end."""
    target = given.ids[0, 1 : given.text_end]
    loss = F.cross_entropy(logits[0, : given.text_end - 1].float(), target)
    digits = [i for answer in given.answers for i in answer]
    right = logits[0, [i - 1 for i in digits]].argmax(-1) == given.ids[0, digits]
    return loss.item() / math.log(2), right.float().mean().item()


def main(args: argparse.Namespace) -> None:
    probes = register_all(args.method)
    text = corpus(args.text)
    prompts = [prompt(text, length) for length in sorted(set(args.lengths or LENGTHS))]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out: {error}") from error
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=model_dtype()).eval()
    print(f"{api.info()}\n")
    print(LINE.format(*HEAD))
    notes: set[str] = set()
    steps = len(prompts) * len(probes) * (args.repeats + 1)
    with torch.inference_mode(), tqdm(total=steps, unit="run", leave=False) as bar:
        turn, of_length = 0.0, 1
        for given in prompts:
            length = given.ids.shape[1]
            expected = turn * (length / of_length) ** 2
            if expected > TOO_LONG and args.lengths is None:
                notes.add(
                    f"{length:,} bytes and more were left out, {expected / 60:.1f} minutes here: "
                    f"--lengths {length} measures them"
                )
                break
            bar.set_description(f"{length:,} bytes")
            rows, turn = measure_length(model, probes, given, args.repeats, bar)
            of_length = length
            print_rows(rows, bar)
            notes |= {f"* {row['fallback']}" for row in rows if row["fallback"]}
    print_notes(probes, notes)
    picture(probes, args.out)


def measure_length(
    model: LlamaForCausalLM, probes: dict[str, Probe], given: Prompt, repeats: int, bar: tqdm
) -> tuple[list[dict[str, Any]], float]:
    """The rows of one length, and the seconds of its first turn."""
    rows, begin = [], time.perf_counter()
    for name, probe in probes.items():
        probe.densities, probe.recorded, probe.record, probe.seconds = [], [], True, 0.0
        logits, seconds = forward(model, name, given.ids)  # also the warm-up
        probe.record = False
        bits, recall = score(logits, given)
        density = statistics.mean(probe.densities) if probe.densities else 1.0
        rows.append({"length": given.ids.shape[1], "method": name, "density": density,
                     "bits": bits, "recall": recall, "fallback": probe.fallback,
                     "seconds": [seconds], "attention": [probe.seconds]})  # fmt: skip
        bar.update()
    first = time.perf_counter() - begin
    if first > VERY_LONG:
        bar.update(repeats * len(rows))
        repeats = 0
    else:
        for row in rows:
            row["seconds"], row["attention"] = [], []
    for turn in range(repeats):
        start = time.perf_counter()
        for row in rows:  # in turn, so that a slow moment of the machine hits all alike
            probe = probes[row["method"]]
            probe.seconds = 0.0
            _, seconds = forward(model, row["method"], given.ids)
            row["seconds"].append(seconds)
            row["attention"].append(probe.seconds)
            bar.update()
        if time.perf_counter() - start > LONG:
            bar.update((repeats - 1 - turn) * len(rows))
            break
    for row in rows:
        row["seconds"] = statistics.median(row["seconds"])
        row["attention"] = statistics.median(row["attention"])
    return rows, first


def print_rows(rows: list[dict[str, Any]], bar: tqdm) -> None:
    """The rows of one length, above the bar; the first is the baseline."""
    base = rows[0]
    for row in rows:
        bar.write(
            LINE.format(
                f"{row['length']:,}",
                row["method"] + " *" * (row["fallback"] is not None),
                f"{row['seconds']:.3f} s",
                f"{base['seconds'] / row['seconds']:.2f}x",
                f"{row['attention']:.3f} s",
                f"{base['attention'] / row['attention']:.2f}x",
                f"{row['density']:.1%}",
                f"{row['bits']:.4f}",
                f"{row['recall']:.1%}",
            )
        )


def print_notes(probes: dict[str, Probe], notes: set[str]) -> None:
    print(
        f"\n{BASELINE}: dense attention of PyTorch, the baseline of both speed-ups, all in "
        f"{dtype_name(model_dtype())}. density: share "
        "of the causal blocks computed.\nneedles: share of the planted digits predicted at the end "
        "of the prompt. The model was trained on up to 4,096 bytes:\nbeyond that dense attention "
        "loses needles too, so compare each method with sdpa at the same length."
    )
    for name, probe in probes.items():
        if probe.config is not None:
            print(f"{name}: {probe.config}")
    print(*sorted(notes), sep="\n")


def picture(probes: dict[str, Probe], out: Path) -> None:
    """Draws what each method chose in one layer at the longest prompt, over the attention there."""
    for name, probe in probes.items():
        if probe.config is None or name == "dense":
            continue
        layer = min(PICTURE_LAYER, len(probe.recorded) - 1)
        query, key = probe.recorded[layer]
        try:
            index = probe.config.select(query, key)
        except NotImplementedError as error:  # a method without a list of blocks
            print(f"no picture: {error}")
            continue
        whole, part = mass.cells(query, key, index)
        shares, pairs = mass.kept(query, key, index)
        names = [f"head {h}: {share:.1%} kept" for h, share in enumerate(shares.tolist())]
        title = (
            f"{name}: heads of layer {layer} (of 0–{len(probe.recorded) - 1}), "
            f"prompt of {key.shape[2]:,} bytes, a token each\n"
            f"blue: computed, {pairs.mean():.0%} of all pairs; red: left out, "
            f"{1 - shares.mean():.0%} of the attention; white: next to no attention"
        )
        if probe.fallback:
            title += f"\nnot used: {probe.fallback}"
        figure = plot_mass(whole, part, names, query.shape[2], key.shape[2], title)
        path = out / f"{name}.png"
        figure.savefig(path, dpi=110)
        print(f"what {name} computes: {path}")
