"""`python -m sparse_attn info | demo | evaluate`."""

from __future__ import annotations

import argparse

from . import info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this installation can run")
    from . import demo, evaluate

    demo.add_arguments(
        commands.add_parser("demo", help="a long text through a small language model")
    )
    evaluate.add_arguments(
        commands.add_parser("evaluate", help="what methods cost and gain in a model: a report")
    )
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
    else:
        {"demo": demo, "evaluate": evaluate}[args.command].run(args)


if __name__ == "__main__":
    main()
