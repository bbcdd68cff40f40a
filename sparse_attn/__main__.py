"""`python -m sparse_attn info | demo | squeeze`."""

from __future__ import annotations

import argparse

from . import info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this installation can run")
    from . import demo
    from .squeezed import cli as squeeze

    for name, part, what in (
        ("demo", demo, "a long text through a small language model"),
        ("squeeze", squeeze, "prepare a text once, then generate behind it (Squeezed Attention)"),
    ):
        part.add_arguments(commands.add_parser(name, help=what))
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
    else:
        {"demo": demo.run, "squeeze": squeeze.run}[args.command](args)


if __name__ == "__main__":
    main()
