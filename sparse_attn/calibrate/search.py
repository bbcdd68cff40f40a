"""Tries the values of an option in every layer and takes the cheapest that keep enough."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .. import api, mass, settings
from ..evaluate.measure import bits, load, read_text
from ..evaluate.specs import parse
from ..integrations.transformers import register_function
from ..methods.dense import Dense
from ..probe import Probe, register_probe
from ..settings import Settings

# the option that trades quality for speed, and values worth trying: the least computed first
SEARCHED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "flex_prefill": ("gamma", (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)),
    "hip": ("budget", (64, 128, 256, 512, 1024, 2048, 4096)),
    "infinite_hip": (  # the last is the budget; those before in the default's proportion
        "keeps",
        tuple((16 * n, 4 * n, n) for n in (64, 128, 256, 512, 1024, 2048, 4096)),
    ),
    "sale": ("threshold", (0.1, 0.03, 0.016, 0.008, 0.004, 0.002, 0.001, 0.0003)),
}
# what makes a single head dense
DENSE = {("sale", "threshold"): 0.0, ("flex_prefill", "gamma"): 1.0}
MASSES = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998)  # tried for a loss


class Trial(NamedTuple):
    """What one value does in one layer, by head."""

    value: Any  # a number, or a tuple for an option that is one
    kept: list[float]  # share of the attention mass
    pairs: list[float]  # share of the pairs computed


class Trials:
    """An attention function that is dense, and tries every value of the option on its inputs."""

    def __init__(self, config: Any, field: str, values: Sequence[Any]) -> None:
        self.config, self.field, self.values = config, field, values
        self.layers: dict[int, list[Trial]] = {}
        self.refused: dict[Any, str] = {}  # values that no backend serves, and why

    def __call__(self, query, key, value, layer: int | None, causal: bool, scale: float | None):
        layer = len(self.layers) if layer is None else layer
        tried = self.layers.setdefault(layer, [])
        for option in self.values:
            config = dataclasses.replace(self.config, **{self.field: option})
            try:
                index = config.select(query, key, causal=causal, scale=scale)
            except NotImplementedError as error:
                self.refused[option] = str(error)
                continue
            kept, pairs = mass.kept(query, key, index, scale)
            tried.append(Trial(option, kept.tolist(), pairs.tolist()))
        if not tried:
            raise SystemExit(f"--values: none is served: {self.refused[self.values[-1]]}")
        return api.attention(query, key, value, Dense(), causal=causal, scale=scale)


def cheapest(trials: list[Trial], target: float, heads: bool, everything: Any = None) -> Any:
    """The value that computes least among those that keep `target` of the mass; None if none does.

    For the mean over the heads of a layer, or a tuple with a value for each head; there a head that
    no value satisfies gets `everything`, the value that computes all, or without one the layer has
    None.
    """
    if not heads:
        enough = [t for t in trials if statistics.mean(t.kept) >= target]
        best = min(enough, key=lambda t: statistics.mean(t.pairs), default=None)
        return best and best.value
    found = []
    for h in range(len(trials[0].kept)):
        enough = [t for t in trials if t.kept[h] >= target]
        best = min(enough, key=lambda t: t.pairs[h], default=None)
        found.append(everything if best is None else best.value)
    return None if None in found else tuple(found)


def assemble(trials: Trials, target: float, heads: bool = False) -> Settings:
    """The methods of all layers for a share of the mass; layers that cannot keep it are dense."""
    layers: dict[int, Any] = {}
    for layer, tried in trials.layers.items():
        value = cheapest(tried, target, heads, DENSE.get((trials.config.name, trials.field)))
        layers[layer] = (
            Dense()
            if value is None
            else dataclasses.replace(trials.config, **{trials.field: value})
        )
    return Settings(trials.config, layers)


def report(trials: Trials, found: Settings) -> dict[str, Any]:
    """What the chosen values keep and compute, by layer, for readers of the file."""
    by_layer = {}
    for layer, tried in trials.layers.items():
        chosen = getattr(found.of(layer), trials.field, None)
        if chosen is None:
            by_layer[str(layer)] = {"kept": 1.0, "pairs": 1.0}
            continue
        n_heads = len(tried[0].kept)
        by_value = {t.value: t for t in tried}
        all_of_it = Trial(None, [1.0] * n_heads, [1.0] * n_heads)
        values = (chosen,) * n_heads if chosen in by_value else chosen  # else one for each head
        by_layer[str(layer)] = {
            what: round(
                statistics.mean(
                    getattr(by_value.get(v, all_of_it), what)[h] for h, v in enumerate(values)
                ), 5,
            )
            for what in ("kept", "pairs")
        }  # fmt: skip
    return by_layer


def main(args: argparse.Namespace) -> None:
    if args.mass is not None and not 0 < args.mass <= 1:
        raise SystemExit(f"--mass: got {args.mass}, expected a number above 0, 1 at most")
    if args.loss is not None and not args.loss > 0:
        raise SystemExit(f"--loss: got {args.loss}, expected a number above 0")
    if args.length < 2:
        raise SystemExit(f"--length: got {args.length}, expected 2 or more")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise SystemExit(f"--out: got {args.out}, expected a file in a folder that exists")
    config, field, values = options(args)
    model, source = load(args, read_text(args))
    try:
        prompt = source.plain(args.length)
    except ValueError as error:
        raise SystemExit(f"--length or --text: {error}") from error
    trials = Trials(config, field, values)
    with torch.inference_mode():
        bar = tqdm(unit="layer", leave=False, desc=f"{field} of {config.name}")

        def watched(*inputs: Any, **given: Any) -> torch.Tensor:
            bar.update()
            return trials(*inputs, **given)

        register_function(watched, "calibrate")
        model.set_attn_implementation("calibrate")
        model(input_ids=prompt.ids.to(model.device), use_cache=False, logits_to_keep=1)
        bar.close()
        if not trials.layers:
            raise SystemExit("--model: no layer uses a method: all have sliding windows")
        for value, why in trials.refused.items():
            print(f"left out, since it is not served: {field}={value}: {why}")
        target = {"mass": args.mass or 0.98}
        if args.loss is None:
            found = assemble(trials, target["mass"], args.heads)
        else:
            found, target = for_loss(model, prompt, trials, args)
    measured = {"model": args.model, "tokens": args.length, "target": target}
    settings.write(args.out, found, measured | {"layers": report(trials, found)})
    for layer, config in sorted(found.layers.items()):
        print(f"layer {layer}: {config}")
    print(f"for register, and evaluate --methods: {args.out}")


def options(args: argparse.Namespace) -> tuple[Any, str, list[Any]]:
    """The method with its fixed options, the option to search and the values to try."""
    try:
        config = parse(args.method).settings.method
    except ValueError as error:
        raise SystemExit(f"--method: {error}") from error
    own = SEARCHED.get(config.name)
    field, values = args.field or (own and own[0]), args.values or (own and own[1])
    if field is None or values is None or (own and field != own[0] and not args.values):
        raise SystemExit(
            f"--field and --values: what to search in {config.name} is not known; it is for "
            + ", ".join(f"{name} ({option})" for name, (option, _) in SEARCHED.items())
        )
    known = {f.name for f in dataclasses.fields(config)}
    if field not in known:
        raise SystemExit(f"--field: {config.name} has no {field!r}; it has {sorted(known)}")
    if isinstance(getattr(type(config)(), field), int):
        values = [int(v) for v in values]
    try:
        for value in values:
            dataclasses.replace(config, **{field: (value,) if args.heads else value})
    except (TypeError, ValueError) as error:
        raise SystemExit(f"--values{' with --heads' * args.heads}: {error}") from error
    return config, field, list(values)


def for_loss(
    model: Any, prompt: Any, trials: Trials, args: argparse.Namespace
) -> tuple[Settings, dict[str, float]]:
    """The settings for the smallest of `MASSES` with which the model loses at most `args.loss`."""
    model.set_attn_implementation("sdpa")
    base = bits(model, prompt)
    for share in tqdm(MASSES, unit="target", leave=False):
        found = assemble(trials, share, args.heads)
        register_probe(Probe(*found, fallback=False), "calibrate")
        model.set_attn_implementation("calibrate")
        lost = bits(model, prompt) - base
        if lost <= args.loss:
            return found, {"loss": args.loss, "lost": round(lost, 6), "mass": share}
    raise SystemExit(
        f"--loss: {lost:.4f} bits per token are lost where {MASSES[-1]:.1%} of the attention is "
        "kept; give other --values"
    )
