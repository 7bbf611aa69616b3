"""A preference loss: its formula, the options it reads, where it comes from. Without a name, all of them."""

from __future__ import annotations

import argparse

from ..explanations import explain
from ..losses import LOSSES


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="*", help="a loss_type, or several")


def run(args: argparse.Namespace) -> int:
    for name in args.name:
        print(explain(name), end="\n\n" if name != args.name[-1] else "\n")
    if not args.name:
        width = max(map(len, LOSSES))
        for name, loss in LOSSES.items():
            print(f"{name:{width}}  {loss.formula}")
        print("\n`python -m fastdpo explain NAME` says what the letters mean and which options a loss reads.")
    return 0
