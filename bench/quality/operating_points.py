"""The README's table of operating points: python -m bench.quality.operating_points [--out DIR]

Runs `python -m sparse_attn evaluate` on the demonstration model at its longest trained length with
several settings of each method, prints the fastest of each that loses next to nothing, and writes
all of them to bench/results/operating_points.json. A run that was stopped goes on in DIR.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from bench.harness import RESULTS
from sparse_attn import evaluate
from sparse_attn.evaluate import points

LENGTH = 4096
SETTINGS = {
    "dense": [""],
    "flex_prefill:min_budget=128": [
        "gamma=0.8",
        "gamma=0.85",
        "gamma=0.9",
        "gamma=0.95",
        "gamma=0.9,block_size=64",
    ],
    "sale": [
        "local=64,threshold=0.1",
        "local=64,threshold=1.0",
        "local=64,threshold=4.0",
        "local=64,threshold=10.0",
        "local=1,sink=0,threshold=4.0",
        "local=1,sink=0,threshold=100.0",
    ],
    "hip": [
        "budget=256",
        "budget=512",
        "kv_block=16,window=128,budget=128",
        "kv_block=16,window=128,budget=192",
        "kv_block=16,window=128,budget=256",
        "kv_block=16,window=64,budget=256",
        "kv_block=32,window=64,budget=256",
    ],
    "infinite_hip:sink=16": [
        "chunks=(64,32,8),window=128,keeps=(512,256,128)",
        "chunks=(64,32,8),window=128,keeps=(1024,512,256)",
        "chunks=(64,32,8),window=128,keeps=(2048,1024,512)",
        "chunks=(64,32,8),window=64,keeps=(1024,512,256)",
        "chunks=(64,32,8),window=32,keeps=(1024,512,256)",
        "chunks=(64,32,16),window=128,keeps=(1024,512,256)",
    ],
    "squeezed": [
        "sparsity=0.7",
        "sparsity=0.85",
        "sparsity=0.9",
        "sparsity=0.92",
        "sparsity=0.95",
        "sparsity=0.9,coarse=0.01",
    ],
}


def methods() -> list[str]:
    """As `evaluate` reads them: name, or name:field=value,..."""
    return [
        stem + (options and ("," if ":" in stem else ":") + options)
        for stem, many in SETTINGS.items()
        for options in many
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the report; default: a new one")
    out = parser.parse_args().out or Path(tempfile.mkdtemp())
    asked = argparse.ArgumentParser()
    evaluate.add_arguments(asked)
    wanted = ["--lengths", str(LENGTH), "--samples", "16", "--repeats", "5", "--out", str(out)]
    evaluate.run(asked.parse_args([*wanted, "--methods", *methods()]))
    results = json.loads((out / "results.json").read_text())
    cells = points.measured(results, LENGTH)
    rows = {
        label: {"density": points.density(cell), "needles": points.mean_needles(cell)}
        | {k: cell[k] for k in ("bits", "attention", "prefill", "decode") if k in cell}
        for label, cell in cells.items()
    }
    found = {
        "machine": results["settings"]["machine"],
        "text": results["settings"]["text"],
        "length": LENGTH,
        "settings": rows,
        "within limits": points.operating_points(results, LENGTH),
    }
    path = RESULTS / "operating_points.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
