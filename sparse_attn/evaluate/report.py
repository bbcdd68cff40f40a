"""The report: one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
import statistics
from html import escape
from pathlib import Path
from typing import Any

from ..plot import plot_density, plot_heads, plot_needles, plot_pareto, plot_time
from ..probe import BASELINE
from .points import (
    FEWER_NEEDLES,
    HEAD,
    MORE_BITS,
    NEEDLES_TELL_NOTHING,
    bits_lost,
    complete,
    density,
    fastest,
    gain,
    mean_needles,
    measured,
    needles_lost,
    needles_tell,
    operating_points,
    signed,
    within_limits,
)
from .prompts import TASKS
from .specs import separate

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff;
  max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; font-size: 1.25rem; }
h3 { font-size: 1rem; }
p.note, figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .55rem; text-align: right; border-bottom: 1px solid #e3e3e3;
  white-space: nowrap; }
th { border-bottom: 2px solid #888; font-weight: 600; } th:first-child,
td:first-child { text-align: left; }
td:first-child { white-space: normal; }
tr.base td { background: #f4f4f4; } tr.good td { background: #eaf6ef; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; }
.pair figure { flex: 1 1 30rem; } figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
nav a { margin-right: 1rem; }
summary { cursor: pointer; margin: .5rem 0; }
code { background: #f4f4f4; padding: 0 .25em; }
"""


DECODE = ("decode", "decode_attention")
MOST_LINES = 9  # settings in one picture
SOME = f" Of more than {MOST_LINES - 1} settings the fastest of each method within the limits."


def write_report(results: dict[str, Any], out: Path) -> str:
    """Writes report.html beside the results and returns its path in a sentence."""
    path = out / "report.html"
    path.write_text(report(results, out), encoding="utf-8")
    return f"report: {path}"


def report(results: dict[str, Any], out: Path) -> str:
    """The page; pictures of maps are read from `out`."""
    lengths = complete(results)
    longest = lengths[-1]
    settings = results["settings"]
    sections = [
        ("summary", f"At {longest:,} tokens", summary(results, longest)),
        ("trade", "Quality against speed", trade(results, longest)),
        ("needles", "Needles", needles(results, lengths)),
        ("tasks", "Other tasks", tasks(results, lengths)),
        ("time", "Time and memory", times(results, lengths)),
        ("layers", "Layers and heads", layers(results, longest)),
        ("maps", "Where the attention is", maps(results, longest, out)),
        ("methods", "Methods and settings", methods(results)),
    ]
    links = "".join(f'<a href="#{i}">{escape(title)}</a>' for i, title, _ in sections)
    body = "".join(f'<h2 id="{i}">{escape(t)}</h2>\n{html}\n' for i, t, html in sections)
    title = f"Sparse attention in {'/'.join(Path(settings['model']).parts[-2:])}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{escape(title)}</h1><p class="note">{escape(settings["machine"])}. '
        f"{escape(settings['dtype'])}, text: {escape(settings['text'])}.</p>"
        f"<nav>{links}</nav>\n{body}</body></html>\n"
    )


def table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """A table; each row has a class and its cells, the first of them a name."""
    top = "".join(f"<th>{escape(x)}</th>" for x in head)
    lines = [
        f'<tr class="{kind}">' + "".join(f"<td>{breakable(x)}</td>" for x in cells) + "</tr>"
        for kind, cells in rows
    ]
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def breakable(text: str) -> str:
    """Escaped; a long label may be broken between its options."""
    return (
        escape(text).replace(":", ":<wbr>").replace(",", ",<wbr>") if "=" in text else escape(text)
    )


def picture(figure: Any, caption: str) -> str:
    """A figure of matplotlib as part of the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return image(buffer.getvalue(), "image/svg+xml", caption)


def image(content: bytes, kind: str, caption: str) -> str:
    data = base64.b64encode(content).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:{kind};base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def folded(title: str, html: str, unfolded: bool = False) -> str:
    """A part that a click opens and closes."""
    return f"<details{' open' * unfolded}><summary>{escape(title)}</summary>{html}</details>"


def summary(results: dict[str, Any], length: int) -> str:
    cells = measured(results, length)
    base = cells[BASELINE]
    yes = "yes" if needles_tell(base) else "bits only"
    rows = []
    for label, cell in cells.items():
        within = within_limits(cell, base)
        kind = "base" if label == BASELINE else "good" if within else ""
        found = [layer["recall"] for layer in cell.get("layers") or [] if layer]
        recall = [x for heads in found if heads for x in heads]
        rows.append((kind, [
            label,
            f"{density(cell):.1%}",
            f"{gain(cell, base, 'prefill'):.2f}×",
            f"{gain(cell, base, 'attention'):.2f}×",
            f"{gain(cell, base, 'decode'):.2f}×" if cell.get("decode") else "–",
            f"{cell['bits']:.4f}",
            signed(bits_lost(cell, base), 4),
            f"{mean_needles(cell):.1%}",
            signed(-needles_lost(cell, base), 1),
            f"{statistics.mean(recall):.1%}" if recall else "–",
            yes if within and label != BASELINE else "–" if label == BASELINE else "no",
        ]))  # fmt: skip
    head = ["method", "density", "prefill", "attention", "decoding", "bits/token", "change",
            "needles", "points", "mass kept", "within limits"]  # fmt: skip
    text = table(head, rows) + note(
        f"{BASELINE}: dense attention of PyTorch, the baseline of the speed-ups (whole prefill, "
        "attention alone in it, a token in decoding). Density: share of the causal blocks "
        "computed, mean over layers. "
        "Needles: share of the planted digits that the model finds most likely. Within limits: "
        f"bits per token rise by less than {MORE_BITS:g} and needles fall by less than "
        f"{FEWER_NEEDLES:g} point."
    )
    if not needles_tell(base):
        text += note(NEEDLES_TELL_NOTHING)
    text += behind_contexts(cells)
    text += "<h3>The fastest setting of each method within the limits</h3>" + table(
        HEAD, [("", row) for row in operating_points(results, length)]
    )
    forced: dict[str, list[str]] = {}
    for label, cell in results["cells"][str(length)].items():
        if "refused" in cell:
            text += note(f"{label} was not measured: {cell['refused']}")
        elif cell.get("fallback"):
            forced.setdefault(cell["fallback"], []).append(label)
    for reason, labels in forced.items():
        text += note(
            f"Forced here: {'; '.join(labels)}. By default attention() takes the dense path at "
            f"this length: {reason}."
        )
    return text


def behind_contexts(cells: dict[str, dict[str, Any]]) -> str:
    """What the numbers of methods that work behind a prepared context are numbers of."""
    rows = []
    for label, cell in cells.items():
        if "baseline" in cell:
            kept = [cell["kept"], cell.get("decode_kept") or []]
            shares = [f"{statistics.mean(x):.1%}" if x else "–" for x in kept]
            seconds = [cell["build"], cell["prefill"], cell["baseline"]["prefill"]]
            sizes = [f"{cell[size]:,}" for size in ("context", "tail")]
            rows.append(("", [label, *sizes, *shares, *(f"{x:.3f} s" for x in seconds)]))
    if not rows:
        return ""
    head = ["method", "context", "tail", "kept by the tail", "kept in decoding", "build",
            "tail's prefill", f"{BASELINE}'s"]  # fmt: skip
    return (
        "<h3>Behind a prepared context</h3>"
        + table(head, rows)
        + note(
            "The first tokens of a prompt are prepared once, as a context (build: the model's "
            "dense prefill of it and the clustering), and the tail is given to the model over it. "
            "Density, mass kept, bits and speed-ups of prefill and attention are those of the "
            f"tail, the speed-ups against {BASELINE} over a dense cache of the same tokens. Kept: "
            "share of the clustered keys, mean over layers and heads; a call has one choice for "
            "all its tokens. "
            "In the tasks the tail is the questions; in decoding the context is all but the tokens "
            "that are decoded."
        )
    )


def trade(results: dict[str, Any], length: int) -> str:
    cells = measured(results, length)
    base = cells[BASELINE]
    names = series({k: results["methods"][k] for k in cells if k != BASELINE})
    points: dict[str, dict[str, list[tuple[float, float, str]]]] = {"bits": {}, "needles": {}}
    for label, (name, setting) in names.items():
        speed = gain(cells[label], base, "attention")
        for what, lost in (("bits", bits_lost), ("needles", needles_lost)):
            point = (speed, lost(cells[label], base), setting)
            points[what].setdefault(name, []).append(point)
    title = f"Quality against speed, prompt of {length:,} tokens"
    lost = plot_pareto(points["bits"], title, "bits per token lost", BASELINE, MORE_BITS)
    missed = plot_pareto(points["needles"], title, "needles lost (points)", BASELINE, FEWER_NEEDLES)
    return pair(
        picture(
            lost,
            "Rise in bits per token against the speed-up of attention: lower and further right is "
            "better. A method given with several settings makes a line.",
        ),
        picture(missed, "Needles lost, in points of the share found, against the speed-up."),
    )


def series(methods: dict[str, dict[str, str]]) -> dict[str, tuple[str, str]]:
    """By label the line that it belongs to and its place there.

    A line has one method and the same options; what all its settings share is in its name.
    """
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for label, method in methods.items():
        options = [] if method["setting"] == "defaults" else separate(method["setting"])
        key = (method["family"], *(option.partition("=")[0] for option in options))
        groups.setdefault(key, {})[label] = options
    found = {}
    for (family, *_), members in groups.items():
        shared = set.intersection(*map(set, members.values())) if len(members) > 1 else set()
        for label, options in members.items():
            name = ", ".join([family, *(option for option in options if option in shared)])
            found[label] = (name, ", ".join(o for o in options if o not in shared))
        if len(members) == 1:  # a point by itself needs no label beside it
            (label,) = members
            found[label] = (label, "")
    return found


def pair(*figures: str) -> str:
    """Figures side by side where there is room."""
    return f'<div class="pair">{"".join(figures)}</div>'


def needles(results: dict[str, Any], lengths: list[int]) -> str:
    labels = list(measured(results, lengths[-1]))
    grids, depths = [], sorted(results["cells"][str(lengths[-1])][BASELINE]["needles"])
    for label in labels:
        by_length = [results["cells"][str(n)].get(label, {}).get("needles") or {} for n in lengths]
        grids.append([[found.get(depth, float("nan")) for found in by_length] for depth in depths])
    return picture(
        plot_needles(grids, labels, lengths, [float(d) for d in depths]),
        "Share of the planted digits found, by where in the prompt they stand and its length.",
    )


def tasks(results: dict[str, Any], lengths: list[int]) -> str:
    rows = []
    for length in lengths:
        for label, cell in measured(results, length).items():
            shares = [f"{cell[task]:.1%}" for task in TASKS]
            kind = "base" if label == BASELINE else ""
            rows.append((kind, [label, f"{length:,}", f"{cell['bits']:.4f}", *shares]))
    head = ["method", "tokens", "bits/token", *(task.replace("_", " ") for task in TASKS)]
    return table(head, rows) + note(
        "Share of the answers' tokens that are most likely, given the right ones before. Multi "
        "key: some of many planted keys are asked for. Multi value: all values of one key. "
        "Variable tracking: a value behind a chain of names. Copying: a passage of the text is "
        "continued. Where dense attention fails, the model cannot do the task at this length."
    )


def drawn(results: dict[str, Any], length: int) -> list[str]:
    """The settings that have a line: all, or if those are too many one of each method."""
    labels = list(measured(results, length))
    if len(labels) <= MOST_LINES:
        return labels
    best = fastest(results, length)
    chosen = {best[name] or first_of(results, name) for name in best}
    return [label for label in labels if label == BASELINE or label in chosen]


def first_of(results: dict[str, Any], family: str) -> str:
    return next(k for k, v in results["methods"].items() if v["family"] == family)


def times(results: dict[str, Any], lengths: list[int]) -> str:
    figures, shown = [], drawn(results, lengths[-1])
    for what, title in (("prefill", "a whole prefill"), ("attention", "attention in a prefill")):
        seconds: dict[str, dict[int, float]] = {}
        for length in lengths:
            for label, cell in measured(results, length).items():
                if label in shown and "baseline" not in cell:
                    seconds.setdefault(label, {})[length] = cell[what]
        caption = f"Seconds of {title}, median of the runs, all layers together.{SOME}"
        figures.append(picture(plot_time(seconds, title, BASELINE), caption))
    rows = []
    for length in lengths:
        for label, cell in measured(results, length).items():
            peak = cell.get("peak_bytes")
            rows.append(("base" if label == BASELINE else "", [
                label, f"{length:,}", f"{cell['prefill']:.3f} s", f"{cell['attention']:.3f} s",
                "–" if peak is None else f"{peak / 1e6:.0f} MB",
                *(f"{1e3 * cell[x]:.2f} ms" if cell.get(x) else "–" for x in DECODE),
                "–" if cell.get("decode_bits") is None else f"{cell['decode_bits']:.4f}",
            ]))  # fmt: skip
    head = ["method", "tokens", "prefill", "attention", "peak memory", "decoding a token",
            "its attention", "bits/token"]  # fmt: skip
    return (
        pair(*figures)
        + table(head, rows)
        + note(
            "Peak memory: the most that one prefill held beyond the weights. Decoding: the last "
            "tokens of the text, one at a time behind a cache of the rest, median; with the bits "
            f"per token of these, for methods that choose there and {BASELINE}; the others decode "
            "densely. Methods behind a prepared context: prefill and memory of the tail."
        )
    )


def layers(results: dict[str, Any], length: int) -> str:
    cells = {k: v for k, v in measured(results, length).items() if v.get("layers")}
    by_layer = {
        label: [layer and layer["density"] for layer in cell["layers"]]
        for label, cell in cells.items()
    }
    if not by_layer:
        return note("No method was measured by layer.")
    lines = {label: by_layer[label] for label in drawn(results, length) if label in by_layer}
    caption = f"Share of the causal blocks computed, by layer.{SOME}"
    text = picture(plot_density(lines, length), caption)
    rows = []
    for label, cell in cells.items():
        for i, layer in enumerate(cell["layers"] if label != "dense" else []):
            recall = layer and layer["recall"]
            rows.append(("", [
                label, str(i),
                *(["sliding window", "–", "–", "–"] if not layer else [
                    f"{layer['density']:.1%}", f"{layer['error']:.2%}",
                    f"{statistics.mean(recall):.2%}" if recall else "–",
                    f"{min(recall):.2%}" if recall else "–",
                ]),
            ]))  # fmt: skip
    head = ["method", "layer", "density", "output error", "mass kept", "worst head"]
    text += folded("Every layer in numbers", table(head, rows)) + note(
        "Each layer by itself, on the inputs it has in the dense model. Output error: norm of the "
        "difference from dense attention over the norm of that. Mass kept: share of the attention "
        "on computed keys, mean over queries."
    )
    figures = []
    for label, cell in cells.items():
        found = [layer["recall"] if layer else None for layer in cell["layers"]]
        if any(found) and label != "dense":
            unknown = [float("nan")] * len(next(filter(None, found)))
            recall = [heads or unknown for heads in found]
            title = f"{label}\nattention mass kept, prompt of {length:,} tokens"
            caption = f"{label}: attention mass kept by each head of each layer."
            figures.append(picture(plot_heads(recall, title), caption))
    return text + pair(*figures)


def maps(results: dict[str, Any], length: int, out: Path) -> str:
    text, shown = "", set()
    for label, cell in measured(results, length).items():
        names = cell.get("maps") or []
        caption = (
            f"{label}: blue is attention on computed keys, red on keys left out; white is little "
            "attention."
        )
        images = "".join(image((out / name).read_bytes(), "image/png", caption) for name in names)
        if names:
            family = results["methods"][label]["family"]
            text += folded(label, images, unfolded=family not in shown)
            shown.add(family)
    return text or note("No method has a map.")


def methods(results: dict[str, Any]) -> str:
    items = ""
    for label, method in results["methods"].items():
        single = "".join(
            f"<li>layer {layer}: {escape(config)}</li>"
            for layer, config in method["layers"].items()
        )
        single = single and f"<ul>{single}</ul>"
        items += f"<li><code>{escape(label)}</code>: {escape(method['config'])}{single}</li>"
    settings = "".join(
        f"<li>{escape(k)}: {escape(str(v))}</li>" for k, v in results["settings"].items()
    )
    return f"<ul>{items}</ul><ul>{settings}</ul>"
