"""`python -m bench [NAME ...]`: runs the benchmarks, each in bench/ops or bench/methods.

`python -m bench aot` compiles the Triton kernels and lists what they use, see aot.py;
`python -m bench cuda_aot` does so for the CUDA kernels, `python -m bench sass` counts instructions.
`python -m bench gpu_page` writes docs/gpu.md; gpu_check.py is a script of its own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import iter_modules

from . import aot, cuda_aot, methods, ops, sass
from .gpu import page
from .harness import Report, hardware


def main(names: list[str]) -> None:
    found = {
        module.name.removeprefix("bench_"): f"{package.__name__}.{module.name}"
        for package in (ops, methods)
        for module in iter_modules(package.__path__)
    }
    unknown = set(names) - set(found)
    if unknown:
        raise SystemExit(f"no such benchmark {sorted(unknown)}; there are {sorted(found)}")
    print(hardware())
    for name in names or found:
        print(f"\n== {name}")
        report = Report(name)
        import_module(found[name]).run(report)
        report.write()


if sys.argv[1:2] == ["aot"]:
    aot.main(sys.argv[2:])
elif sys.argv[1:2] == ["cuda_aot"]:
    cuda_aot.main(sys.argv[2:])
elif sys.argv[1:2] == ["sass"]:
    sass.main()
elif sys.argv[1:2] == ["gpu_page"]:
    page.main()
else:
    main(sys.argv[1:])
