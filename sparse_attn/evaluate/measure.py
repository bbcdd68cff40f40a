"""Runs a model with each method and writes down what it finds, piece by piece."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import __version__, cpu_isa
from ..brief import dtype_name
from ..cpu_isa import model_dtype
from ..demo.text import Prompt, corpus
from ..integrations import squeezed
from ..integrations.transformers import register_function
from ..methods.squeezed import Squeezed
from ..probe import BASELINE, Probe, clock, register_probe, register_timed
from ..settings import Settings
from ..squeezed.context import Parameters
from .caches import NewCache, context, context_cache, dense_cache, last_logits
from .look import Look
from .memory import peak_of
from .points import NEEDLES_TELL_NOTHING, behind, markdown, needles_tell, operating_points
from .prompts import TASKS, Maker, Source, depths
from .report import write_report
from .specs import Spec, defaults, parse

SCORED = 2048  # tokens at the end of the text whose bits are counted
DECODED = 64  # and that are given one at a time to measure decoding
TAIL = "tail"  # the baseline of methods that work behind a prepared context


def main(args: argparse.Namespace) -> None:
    try:
        specs = [parse(text) for text in args.methods] if args.methods else defaults()
        distinct(specs)
    except ValueError as error:
        raise SystemExit(f"--methods: {error}") from error
    lengths = sorted(set(args.lengths))
    text = read_text(args)
    model, source = load(args, text)
    results = open_results(args, specs, text, model)
    n_layers = model.config.get_text_config().num_hidden_layers
    if args.layer >= n_layers:
        raise SystemExit(f"--layer: got {args.layer}, the model has the layers 0 to {n_layers - 1}")
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
    print(behind(results, lengths[-1]))
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
        "config": repr(spec.context or spec.settings.method),
        "layers": {str(i): repr(config) for i, config in sorted(spec.settings.layers.items())},
        "family": spec.family,
        "setting": spec.setting,
    }


def open_results(
    args: argparse.Namespace, specs: list[Spec], text: str, model: Any
) -> dict[str, Any]:
    """The results in the folder, if they are of the same model, text, tasks, machine and settings
    of the methods, or new ones.
    """
    content = hashlib.sha256(text.encode()).hexdigest()[:16]
    settings = {
        "model": str(args.model), "weights": checksum(model),
        "text": f"{args.text or 'Python standard library'} (sha256 {content})",
        "samples": args.samples, "depths": args.depths, "dtype": dtype_of(args),
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


def checksum(model: Any) -> str:
    """Of a model's config and weights: of every tensor the sum of its bits as whole numbers, and
    64 of its values.
    """
    known = hashlib.sha256(repr(sorted(model.config.to_diff_dict().items())).encode())
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for name, tensor in model.state_dict().items():
        bits = tensor.detach().contiguous().flatten().view(kinds[tensor.element_size()])
        some = bits[:: max(1, len(bits) // 64)].tolist()
        known.update(f"{name} {tensor.shape} {bits.sum().item()} {some}".encode())
    return known.hexdigest()[:16]


def read_text(args: argparse.Namespace) -> str:
    return corpus(args.text).decode(errors="replace")


def device_of(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(args: argparse.Namespace) -> str:
    return args.dtype or dtype_name(model_dtype(torch.device(device_of(args)).type))


def load(args: argparse.Namespace, text: str) -> tuple[Any, Source]:
    """The model, and the text as its tokens: bytes for a vocabulary of 256."""
    if args.model.startswith((".", "/")) and not Path(args.model).exists():
        raise SystemExit(f"--model: there is no {args.model}")  # not to be looked for elsewhere
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, dtype_of(args))
        )
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


def scored(length: int) -> int:
    """Tokens of a prompt whose bits are counted: its last `SCORED`, or half of a shorter one."""
    return min(SCORED, length // 2)


def bits_of(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Bits per token of int64 [T], given logits [T, vocabulary]."""
    return F.cross_entropy(logits.float(), target.to(logits.device)).item() / math.log(2)


def bits(model: Any, prompt: Prompt) -> float:
    """Bits per token of the last tokens (`scored`), given all before them."""
    n = scored(prompt.ids.shape[1])
    logits = last_logits(model, prompt.ids.to(model.device), n + 1)
    return bits_of(logits[:-1], prompt.ids[0, -n:])


class Run(NamedTuple):
    """What is timed: ids [1, T] behind a cache, or without one."""

    label: str
    ids: torch.Tensor
    new_cache: NewCache | None


class Evaluation:
    """What is measured, by length and method; a piece that is there is not measured again."""

    def __init__(
        self, model: Any, source: Source, specs: list[Spec], args: argparse.Namespace,
        results: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.source, self.specs, self.args = model, source, specs, args
        self.results = results
        self.by_label = {spec.label: spec for spec in specs}
        self.probes = {BASELINE: Probe(None)}
        for spec in specs:
            self.probes[spec.label] = Probe(*spec.settings, fallback=False)
            results["methods"][spec.label] = described(spec)
        squeezed.register()
        for i, (label, probe) in enumerate(self.probes.items()):
            if self.parameters(label):
                register_timed(probe, f"evaluate_{i}", squeezed.NAME)
            else:
                register_probe(probe, f"evaluate_{i}")

    def parameters(self, label: str) -> Parameters | None:
        """How the context is prepared that a method works behind."""
        return None if label == BASELINE else self.by_label[label].context

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
            for what, step in (("prefill", self.time), ("decode", self.decode)):
                if any(what not in self.cell(n, label) for label in self.probes):
                    todo.append((f"{n:,} tokens, {what}", lambda n=n, step=step: step(n)))
        with torch.inference_mode(), tqdm(todo, unit="step", leave=False) as bar:
            for what, step in bar:
                bar.set_description(what)
                step()
                self.save()

    def forward(self, label: str, prompt: Prompt, keep: int) -> torch.Tensor:
        """Logits of the last `keep` tokens, with a method; one that works behind a context gets all
        before them as that.
        """
        ids, cache, parameters = prompt.ids.to(self.model.device), None, self.parameters(label)
        if parameters is not None:
            cache = context_cache(self.model, ids[:, :-keep], parameters)()
            ids = ids[:, -keep:]
        self.switch(label)
        return last_logits(self.model, ids, keep, cache)

    def switch(self, label: str) -> None:
        self.model.set_attn_implementation(f"evaluate_{list(self.probes).index(label)}")

    def tasks(self, length: int, label: str) -> None:
        """Bits per token of text, and the share of right answers in each task."""
        cell: dict[str, Any] = {"needles": {}}
        for name, make in prompts_of(self.maker(length), self.args.depths).items():
            prompt = make()
            try:
                if name == "text":
                    n = scored(length)
                    logits = self.forward(label, prompt, n + 1)
                    cell["bits"] = bits_of(logits[:-1], prompt.ids[0, -n:])
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
        start = prompt.text_end  # the questions, each with its answer
        logits = self.forward(label, prompt, prompt.ids.shape[1] - start).cpu()
        return (logits[at - 1 - start].argmax(-1) == prompt.ids[0, at]).float().mean().item()

    def look(self, length: int, spec: Spec, draw: bool) -> None:
        """Each layer's density, error and kept mass, on what the model attends to when dense."""
        cell = self.cell(length, spec.label)
        if "refused" in cell:
            cell["layers"] = None
            return
        ids = self.source.plain(length).ids.to(self.model.device)
        settings, tail = spec.settings, None
        if spec.context is not None:
            tail = scored(length) + 1
            prepared = context(self.model, ids[:, :-tail], spec.context)
            by_layer = {i: Squeezed(layer) for i, layer in enumerate(prepared.layers)}
            settings = Settings(spec.settings.method, by_layer)
        drawn = self.args.layer if draw and spec.settings.method.name != "dense" else None
        look = Look(spec.label, settings, drawn, tail)
        register_function(look, "evaluate_look")
        self.model.set_attn_implementation("evaluate_look")
        self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        n_layers = self.model.config.get_text_config().num_hidden_layers
        cell["layers"] = [look.layers.get(layer) for layer in range(n_layers)]
        cell["fallback"] = look.fallback
        cell["maps"] = look.draw(length, self.args.out / "maps", self.args.out)

    def served(self, length: int) -> list[str]:
        return [label for label in self.probes if "refused" not in self.cell(length, label)]

    def time(self, length: int) -> None:
        """Seconds of a prefill and of its attention, in turn, and the peak memory of one.

        Behind a prepared context: of the tail, and as its `baseline` what sdpa needs behind a dense
        cache of the same.
        """
        ids, n = self.source.plain(length).ids.to(self.model.device), scored(length) + 1
        runs: dict[str, Run] = {}
        for label in self.served(length):
            parameters = self.parameters(label)
            if parameters is None:
                runs[label] = Run(label, ids, None)
                continue
            start = clock(ids)
            new_cache = context_cache(self.model, ids[:, :-n], parameters)
            sizes = {"build": clock(ids) - start, "context": length - n, "tail": n}
            self.cell(length, label).update(sizes)
            runs[label] = Run(label, ids[:, -n:], new_cache)
        if any(run.new_cache for run in runs.values()):
            runs[TAIL] = Run(BASELINE, ids[:, -n:], dense_cache(self.model, ids[:, :-n]))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        peaks = {name: self.peak(length, run) for name, run in runs.items()}
        for _ in range(self.args.repeats):
            for name, run in runs.items():  # in turn, so that a slow moment hits all alike
                taken[name].append(self.seconds(length, run))
        found = {}
        for name, times in taken.items():
            both = [statistics.median(x) for x in zip(*times, strict=True)]
            found[name] = {"prefill": both[0], "attention": both[1], "peak_bytes": peaks[name]}
        for label in self.probes:
            cell = self.cell(length, label)
            cell.update(found.get(label, {"prefill": None, "attention": None}))
            if label in runs and runs[label].new_cache:
                cell["baseline"] = found[TAIL]
            base = {what: found[BASELINE][what] for what in ("prefill", "attention")}
            cell.setdefault("same_run", {}).update(base)  # a later run times sdpa anew

    def peak(self, length: int, run: Run) -> int | None:
        """The peak memory of a run, after one that warms up."""
        self.seconds(length, run)
        cache = run.new_cache and run.new_cache()
        call = lambda: last_logits(self.model, run.ids, 1, cache)  # noqa: E731
        return peak_of(call, self.model.device)

    def seconds(self, length: int, run: Run) -> tuple[float, float]:
        """Of the model and of its attention."""
        cache = run.new_cache and run.new_cache()
        self.switch(run.label)
        self.probes[run.label].seconds = 0.0
        start = clock(run.ids)
        last = last_logits(self.model, run.ids, 1, cache)
        seconds = clock(last) - start
        if self.parameters(run.label):
            cell = self.cell(length, run.label)
            cell["kept"] = [layer.prefill for layer in cache.kept()]
        return seconds, self.probes[run.label].seconds

    def decode(self, length: int) -> None:
        """Seconds per token behind a cache of the rest, and the bits of these tokens where the
        choice of a method tells in them.
        """
        ids, n = self.source.plain(length).ids.to(self.model.device), min(DECODED, length // 4)
        before, given, target = ids[:, : -n - 1], ids[:, -n - 1 : -1], ids[0, -n:]
        dense = dense_cache(self.model, before)
        caches: dict[str, NewCache] = {}
        for label in self.served(length):
            parameters = self.parameters(label)
            caches[label] = context_cache(self.model, before, parameters) if parameters else dense
        taken: dict[str, list[tuple[float, float]]] = {label: [] for label in caches}
        for _ in range(self.args.repeats):
            for label, new_cache in caches.items():
                cache, probe, logits = new_cache(), self.probes[label], []
                self.switch(label)
                for token in given.split(1, dim=1):
                    probe.seconds = 0.0
                    start = clock(ids)
                    logits.append(last_logits(self.model, token, 1, cache))
                    taken[label].append((clock(ids) - start, probe.seconds))
                cell = self.cell(length, label)
                tells = label == BASELINE or self.by_label[label].decodes
                cell["decode_bits"] = bits_of(torch.cat(logits), target) if tells else None
                if self.parameters(label):
                    cell["decode_kept"] = [layer.decode for layer in cache.kept()]
        for label in self.probes:
            both = [statistics.median(x) for x in zip(*taken.get(label, []), strict=True)]
            cell = self.cell(length, label)
            cell["decode"], cell["decode_attention"] = both or (None, None)
            base = self.cell(length, BASELINE)["decode"]
            cell.setdefault("same_run", {})["decode"] = base
