"""`python -m fastdpo`: what the library found on this machine; with the name of a command, that command."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "doctor": "what is installed, what serves what, and whether every engine here computes what it should",
    "plan": "peak memory and expected time of the head and the loss, and the longest context that fits",
    "explain": "a loss: its formula, what it reads, where it comes from",
    "picture": "what the routed backward does to a head of yours, as a table and a picture",
}


def parser_of(command: str) -> argparse.ArgumentParser:
    module = importlib.import_module(f"fastdpo.commands.{command}")
    parser = argparse.ArgumentParser(
        f"python -m fastdpo {command}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | tuple[str, ...] = ()) -> int:
    """The exit status: 0, 1 where `doctor` found something off, 2 for an argument that cannot be."""
    listed = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
    top = argparse.ArgumentParser(
        "python -m fastdpo",
        description=__doc__,
        epilog=f"commands:\n{listed}\n\nand `python -m fastdpo.demo`, which trains a small model twice.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help="; see below")
    args = top.parse_args(argv[:1])
    if args.command is None:
        from .commands import report

        return report.run()
    args = parser_of(args.command).parse_args(argv[1:])
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"python -m fastdpo {argv[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
