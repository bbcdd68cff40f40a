"""`python -m sparse_attn info | demo`."""

from __future__ import annotations

import argparse

from . import info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this installation can run")
    from .demo import add_arguments, run

    add_arguments(commands.add_parser("demo", help="a long text through a small language model"))
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
    else:
        run(args)


if __name__ == "__main__":
    main()
