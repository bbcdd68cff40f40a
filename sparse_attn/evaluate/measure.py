"""Runs a model with each method and writes down what it finds, piece by piece."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import __version__, api, cpu_isa, mass
from ..crossover import dense_is_faster
from ..demo.text import Prompt, corpus
from ..integrations.transformers import register_function
from ..methods.dense import Dense
from ..plot import plot_mass
from ..probe import BASELINE, Probe, clock, register_probe
from .memory import peak_of
from .points import NEEDLES_TELL_NOTHING, markdown, needles_tell, operating_points
from .prompts import TASKS, Maker, Source, depths
from .report import write_report
from .specs import Spec, defaults, parse

SCORED = 2048  # tokens at the end of the text whose bits are counted
PANELS = 16  # heads or layers drawn at most


def main(args: argparse.Namespace) -> None:
    try:
        specs = [parse(text) for text in args.methods] if args.methods else defaults()
        distinct(specs)
    except ValueError as error:
        raise SystemExit(f"--methods: {error}") from error
    lengths = sorted(set(args.lengths))
    text = read_text(args)
    results = open_results(args, specs)
    model, source = load(args, text)
    n_layers = model.config.get_text_config().num_hidden_layers
    for spec in specs:
        last = max(spec.settings.layers, default=-1)
        if last >= n_layers:
            raise SystemExit(
                f"--methods: {spec.label} has layer {last}, the model the layers 0 to "
                f"{n_layers - 1}"
            )
    try:  # before anything is measured
        for length in lengths:
            for make in prompts_of(Maker(source, length, args.samples), args.depths).values():
                make()
    except ValueError as error:
        raise SystemExit(f"--lengths or --text: {error}") from error
    evaluation = Evaluation(model, source, specs, args, results)
    evaluation.run(lengths)
    print(f"At {lengths[-1]:,} tokens, the fastest settings within the limits of the report:\n")
    print(markdown(operating_points(results, lengths[-1])))
    if not needles_tell(results["cells"][str(lengths[-1])][BASELINE]):
        print(f"\n{NEEDLES_TELL_NOTHING}")
    print(write_report(results, args.out))


def distinct(specs: list[Spec]) -> None:
    """ValueError if two would be one row of the results."""
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label} is given twice; files need names of their own")


def described(spec: Spec) -> dict[str, Any]:
    """What the results say of a method: all of its settings, whatever file they are from."""
    return {
        "config": repr(spec.settings.method),
        "layers": {str(i): repr(config) for i, config in sorted(spec.settings.layers.items())},
        "family": spec.family,
        "setting": spec.setting,
    }


def open_results(args: argparse.Namespace, specs: list[Spec]) -> dict[str, Any]:
    """The results in the folder, if they are of the same model, text, tasks, machine and settings
    of the methods, or new ones.
    """
    settings = {
        "model": str(args.model), "text": str(args.text or "Python's standard library"),
        "samples": args.samples, "depths": args.depths, "dtype": args.dtype,
        "device": device_of(args), "version": __version__,
        "machine": machine(torch.device(device_of(args))),
    }  # fmt: skip
    path = args.out / "results.json"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text()) if path.exists() else None
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"--out: {error}") from error
    if found is None:
        return {"settings": settings, "methods": {}, "cells": {}}
    other = [k for k, v in settings.items() if found["settings"].get(k) != v]
    old = found["methods"]
    other += [s.label for s in specs if old.get(s.label, described(s)) != described(s)]
    if other:
        raise SystemExit(
            f"--out: {path} holds results with another {', '.join(other)}; give another folder"
        )
    return found


def read_text(args: argparse.Namespace) -> str:
    return corpus(args.text).decode(errors="replace")


def device_of(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def load(args: argparse.Namespace, text: str) -> tuple[Any, Source]:
    """The model, and the text as its tokens: bytes for a vocabulary of 256."""
    if args.model.startswith((".", "/")) and not Path(args.model).exists():
        raise SystemExit(f"--model: there is no {args.model}")  # not to be looked for elsewhere
    try:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
        if model.config.get_text_config().vocab_size == 256:
            return model.to(device_of(args)).eval(), Source(text, lambda s: list(s.encode()))
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model: {error}") from error

    def encode(piece: str) -> list[int]:
        return tokenizer.encode(piece, add_special_tokens=False)

    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return model.to(device_of(args)).eval(), Source(text, encode, first)


def machine(device: torch.device) -> str:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = (names or [platform.processor() or platform.machine()])[0]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name += f" ({cpu_isa.BEST}), {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}, sparse_attn {__version__}"


def prompts_of(maker: Maker, n_depths: int) -> dict[str, Callable[[], Prompt]]:
    """How to make each prompt of a length, by its name."""
    made: dict[str, Callable[[], Prompt]] = {"text": lambda: maker.source.plain(maker.length)}
    for depth in depths(n_depths):
        made[f"needle {depth:.3f}"] = lambda depth=depth: maker.needle(depth)
    return made | {task: lambda task=task: maker.task(task) for task in TASKS}


def last_logits(model: Any, prompt: Prompt, keep: int) -> torch.Tensor:
    """Logits of the last `keep` tokens, [keep, vocabulary]."""
    ids = prompt.ids.to(model.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]


def bits(model: Any, prompt: Prompt) -> float:
    """Bits per token of the last `SCORED` tokens, given all before them."""
    n = min(SCORED, prompt.ids.shape[1] - 1)
    logits = last_logits(model, prompt, n + 1)[:-1]
    target = prompt.ids[0, -n:].to(logits.device)
    return F.cross_entropy(logits.float(), target).item() / math.log(2)


class Evaluation:
    """What is measured, by length and method; a piece that is there is not measured again."""

    def __init__(
        self, model: Any, source: Source, specs: list[Spec], args: argparse.Namespace,
        results: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.source, self.specs, self.args = model, source, specs, args
        self.results = results
        self.probes = {BASELINE: Probe(None)}
        for spec in specs:
            self.probes[spec.label] = Probe(*spec.settings, fallback=False)
            results["methods"][spec.label] = described(spec)
        for i, probe in enumerate(self.probes.values()):
            register_probe(probe, f"evaluate_{i}")

    def cell(self, length: int, label: str) -> dict[str, Any]:
        return self.results["cells"].setdefault(str(length), {}).setdefault(label, {})

    def save(self) -> None:
        path = self.args.out / "results.json"
        part = path.with_suffix(".part")  # a run that is stopped leaves a whole file
        part.write_text(json.dumps(self.results, indent=1) + "\n")
        part.replace(path)

    def run(self, lengths: list[int]) -> None:
        todo: list[tuple[str, Callable[[], None]]] = []
        for n in lengths:
            for label in self.probes:
                if "bits" not in self.cell(n, label):
                    what = f"{n:,} tokens, tasks, {label}"
                    todo.append((what, lambda n=n, label=label: self.tasks(n, label)))
            for spec in self.specs:
                if "layers" not in self.cell(n, spec.label):
                    what = f"{n:,} tokens, layers, {spec.label}"
                    todo.append((what, lambda n=n, spec=spec: self.look(n, spec, n == lengths[-1])))
            if any("prefill" not in self.cell(n, label) for label in self.probes):
                todo.append((f"{n:,} tokens, time", lambda n=n: self.time(n)))
        with torch.inference_mode(), tqdm(todo, unit="step", leave=False) as bar:
            for what, step in bar:
                bar.set_description(what)
                step()
                self.save()

    def forward(self, label: str, prompt: Prompt, keep: int) -> torch.Tensor:
        """Logits of the last `keep` tokens, with a method."""
        self.switch(label)
        return last_logits(self.model, prompt, keep)

    def switch(self, label: str) -> None:
        self.model.set_attn_implementation(f"evaluate_{list(self.probes).index(label)}")

    def tasks(self, length: int, label: str) -> None:
        """Bits per token of text, and the share of right answers in each task."""
        cell: dict[str, Any] = {"needles": {}}
        for name, make in prompts_of(self.maker(length), self.args.depths).items():
            prompt = make()
            try:
                if name == "text":
                    self.switch(label)
                    cell["bits"] = bits(self.model, prompt)
                    continue
                share = self.answered(label, prompt)
            except NotImplementedError as error:
                cell = {"refused": str(error), "bits": None}
                break
            task, _, depth = name.partition(" ")
            if task == "needle":
                cell["needles"][depth] = share
            else:
                cell[task] = share
        self.cell(length, label).update(cell)

    def maker(self, length: int) -> Maker:
        return Maker(self.source, length, self.args.samples)

    def answered(self, label: str, prompt: Prompt) -> float:
        """Share of the answers' tokens that are most likely, given the right ones before."""
        at = torch.tensor([i for answer in prompt.answers for i in answer])
        start = int(at[0]) - 1
        logits = self.forward(label, prompt, prompt.ids.shape[1] - start).cpu()
        return (logits[at - 1 - start].argmax(-1) == prompt.ids[0, at]).float().mean().item()

    def look(self, length: int, spec: Spec, draw: bool) -> None:
        """Each layer's density, error and kept mass, on what the model attends to when dense."""
        cell = self.cell(length, spec.label)
        if "refused" in cell:
            cell["layers"] = None
            return
        look = Look(
            spec, self.args.layer if draw and spec.settings.method.name != "dense" else None
        )
        register_function(look, "evaluate_look")
        self.model.set_attn_implementation("evaluate_look")
        ids = self.source.plain(length).ids.to(self.model.device)
        self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        n_layers = self.model.config.get_text_config().num_hidden_layers
        cell["layers"] = [look.layers.get(layer) for layer in range(n_layers)]
        cell["fallback"] = look.fallback
        cell["maps"] = look.draw(length, self.args.out / "maps", self.args.out)

    def time(self, length: int) -> None:
        """Seconds of a prefill and of its attention, in turn, and the peak memory of one."""
        prompt = self.source.plain(length)
        labels = [label for label in self.probes if "refused" not in self.cell(length, label)]
        taken: dict[str, list[tuple[float, float]]] = {label: [] for label in labels}
        for label in labels:
            self.forward(label, prompt, 1)
            peak = peak_of(lambda one=label: self.forward(one, prompt, 1), self.model.device)
            self.cell(length, label)["peak_bytes"] = peak
        for _ in range(self.args.repeats):
            for label in labels:  # in turn, so that a slow moment of the machine hits all alike
                self.probes[label].seconds = 0.0
                start = clock(prompt.ids)
                last = self.forward(label, prompt, 1)
                taken[label].append((clock(last) - start, self.probes[label].seconds))
        for label in self.probes:
            both = [statistics.median(x) for x in zip(*taken.get(label, []), strict=True)]
            cell = self.cell(length, label)
            cell["prefill"], cell["attention"] = both or (None, None)


class Look:
    """An attention function that is dense, and measures what a method would do instead."""

    def __init__(self, spec: Spec, layer: int | None) -> None:
        self.spec, self.drawn = spec, layer  # whose heads are drawn; None: no pictures
        self.layers: dict[int, dict[str, Any]] = {}
        self.fallback: str | None = None
        self.heads: Any = None  # cells of the heads of the layer that is drawn
        self.means: dict[int, Any] = {}  # by layer, cells that are means over heads

    def __call__(self, query, key, value, layer: int | None, causal: bool, scale: float | None):
        config = self.spec.settings.of(layer)
        options = {"causal": causal, "scale": scale}
        dense = api.attention(query, key, value, Dense(), **options)
        out, stats = api.attention(
            query, key, value, config, fallback=False, return_stats=True, **options
        )
        self.fallback = dense_is_faster(config.name, stats.backend, query, key.shape[2])
        layer = len(self.layers) if layer is None else layer
        error = (out.float() - dense.float()).norm() / dense.float().norm()
        found = {"density": stats.density, "error": error.item(), "recall": None, "pairs": None}
        self.layers[layer] = found
        if not hasattr(config, "select"):  # a method without lists
            return dense
        try:
            selection = config.select(query, key, **options)
        except NotImplementedError:
            return dense
        recall, pairs = mass.kept(query, key, selection, scale)
        found["recall"], found["pairs"] = recall.tolist(), pairs.tolist()
        if self.drawn is None:
            return dense
        cells = torch.stack(mass.cells(query, key, selection, scale)).cpu()
        self.means[layer] = cells.mean(1)
        if layer == self.drawn or self.heads is None:
            self.heads = (layer, cells[:, :: -(-cells.shape[1] // PANELS)], cells.shape[1])
        return dense

    def draw(self, length: int, folder: Path, base: Path) -> list[str]:
        """Writes the maps, of the heads of one layer and of all layers; their paths in `base`."""
        if self.heads is None:
            return []
        folder.mkdir(exist_ok=True)
        stem = "".join(c if c.isalnum() else "_" for c in self.spec.label)
        layer, cells, n_heads = self.heads
        step = -(-n_heads // PANELS)
        recall = self.layers[layer]["recall"]
        names = [f"head {h}: {recall[h]:.1%} kept" for h in range(0, n_heads, step)]
        title = f"{self.spec.label}: heads of layer {layer}, prompt of {length:,} tokens"
        drawn = [(f"{stem}_{length}_heads.png", cells, names, title)]
        layers = sorted(self.means)[:: -(-len(self.means) // PANELS)]
        means = torch.stack([self.means[i] for i in layers], 1)
        names = [f"layer {i}: {statistics.mean(self.layers[i]['recall']):.1%} kept" for i in layers]
        title = f"{self.spec.label}: layers, mean over heads, prompt of {length:,} tokens"
        drawn.append((f"{stem}_{length}_layers.png", means, names, title))
        for name, (whole, part), names, title in drawn:
            figure = plot_mass(whole, part, names, length, length, title)
            figure.savefig(folder / name, dpi=100)
        return [str((folder / name).relative_to(base)) for name, *_ in drawn]
