"""`python -m sparse_attn info | demo | evaluate | calibrate`."""

from __future__ import annotations

import argparse

from . import info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this installation can run")
    from . import calibrate, demo, evaluate

    demo.add_arguments(
        commands.add_parser("demo", help="a long text through a small language model")
    )
    evaluate.add_arguments(
        commands.add_parser("evaluate", help="what methods cost and gain in a model: a report")
    )
    calibrate.add_arguments(
        commands.add_parser("calibrate", help="searches a method's option layer by layer")
    )
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
    else:
        chosen = {"demo": demo, "evaluate": evaluate, "calibrate": calibrate}
        chosen[args.command].run(args)


if __name__ == "__main__":
    main()
