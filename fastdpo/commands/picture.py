"""What the routed backward does to a head of yours, for several tau: live blocks per token, the passes over the head
that this saves, and how far its gradients are from the exact ones; as a table and a picture.

--model PATH --data FILE takes a local Hugging Face model's hidden states on a text (.txt) or on rows of .jsonl
(prompt, chosen, rejected; or text). --head FILE takes a safetensors file with hidden [N, H], weight [V, H] and
labels [N]. Speed-ups are counted in passes, one pass being one product of hidden states and head; no time is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..head import DEFAULT_TAU, FROZEN_HEAD_TAU
from ..validation import check_number
from .heads import Head, from_file, from_model
from .progress import progress
from .study import ALWAYS, NEVER, SAMPLED, SURE, AtTau, Errors, Study, kinds_of, named, steps, study
from .table import aligned

TAUS = (2.0**-7, 2.0**-8, FROZEN_HEAD_TAU, DEFAULT_TAU, 2.0**-11, 2.0**-12)
LEGEND = """\
blocks a token   that the backward is expected to compute of a token; a draw computes at most one more than the most
step, frozen     speed-up of policy and reference forward and the backward over the exact ones, head trained and frozen:
                 counted in passes, not timed
errors           relative L2 distance to the exact gradient, mean of {seeds} draws (bf16 logits draw nothing)"""
KINDS = {  # how the picture shows them
    NEVER: ("never computed", "#edf0f3"),
    SAMPLED: ("sampled, weight tau / share", "#dd8b2f"),
    ALWAYS: ("always computed", "#1b7f4b"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="PATH", help="a local Hugging Face model's folder, with --data")
    source.add_argument("--head", metavar="FILE", help="safetensors with hidden, weight, labels")
    parser.add_argument("--data", metavar="FILE", help="with --model: .jsonl, or text whose paragraphs are texts")
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="completion tokens that are looked at (512)"
    )
    parser.add_argument("--length", type=int, default=512, help="with --model: tokens of a text at most (512)")
    parser.add_argument("--tau", type=float, nargs="+", help="default: 2^-7 to 2^-12")
    parser.add_argument("--seeds", type=int, default=2, help="draws that errors are averaged over (2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path("head.png"), help="the picture (head.png)")
    parser.add_argument(
        "--no-picture", dest="picture", action="store_false", help="the table alone, without matplotlib"
    )


def check(args: argparse.Namespace) -> list[float]:
    """The tau, descending."""
    if (args.data is None) != (args.model is None):
        missing = "--data FILE, a text for the model" if args.model else "--model PATH"
        raise ValueError(f"{missing} is missing: --model and --data go together")
    for name, least in (("tokens", 2), ("length", 2), ("seeds", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}; got {getattr(args, name)}")
    taus = TAUS if args.tau is None else args.tau
    for tau in taus:
        if check_number("--tau", tau, 0, above=True) > 1:
            raise ValueError(f"--tau must lie in (0, 1]; got {tau!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if args.picture:
        _pyplot()
        if not args.output.absolute().parent.is_dir():
            raise ValueError(f"--output {args.output}: there is no folder {args.output.absolute().parent}")
    return sorted(set(taus), reverse=True)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "the picture needs matplotlib: pip install matplotlib, or --no-picture for the table"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _shown(errors: Errors | None) -> list[str]:
    values = [None] * 4 if errors is None else [errors.dhidden, errors.sure, errors.worst, errors.dweight]
    return ["-" if x is None else f"{x:.1e}" for x in values]


def _name(row: AtTau) -> str:
    default = {DEFAULT_TAU: " (default)", FROZEN_HEAD_TAU: " (default, frozen head)"}.get(row.tau, "")
    return f"tau {named(row.tau)}{default}"


def table(found: Study, device: str) -> list[str]:
    header = [
        "",
        "blocks a token",
        "of all",
        "a token's most",
        "step",
        "frozen",
        "dhidden",
        f"p > {SURE}",
        "worst token",
    ]
    cells = [[*header, "dweight"]]
    for row in found.rows:
        live = f"{row.live.mean().item():.1f}"
        exact = row.goes_exact(device)
        saved = ["exact" if exact else f"{row.speed_up(frozen):.2f}x" for frozen in (False, True)]
        cells.append([_name(row), live, f"{row.share:.1%}", str(row.most), *saved, *_shown(row.errors)])
    if found.rounded is not None:
        cells.append(["bf16 logits", "", "", "", "", "", *_shown(found.rounded)])
    return aligned(cells)


def draw(found: Study, output: Path, where: str) -> None:
    plt = _pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    from ..routing import own_block

    default = min(found.rows, key=lambda row: abs(row.tau - DEFAULT_TAU))
    kinds = kinds_of(found.shares, own_block(found.labels, found.blocks), default.tau, seed=0)
    figure = plt.figure(figsize=(10, 7.2))
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 1.05), hspace=0.34, wspace=0.22)

    axis = figure.add_subplot(grid[0, :])
    colors = ListedColormap([KINDS[kind][1] for kind in range(3)])
    axis.imshow(kinds, cmap=colors, aspect="auto", interpolation="nearest", vmin=0, vmax=2)
    parts = [(kinds == kind).float().mean().item() for kind in range(3)]
    handles = [Patch(color=KINDS[kind][1], label=f"{KINDS[kind][0]}: {parts[kind]:.1%}") for kind in (2, 1, 0)]
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=3, fontsize=8, frameon=False)
    axis.set_xlabel(f"block of 128 vocabulary columns; one draw at tau = {named(default.tau)}", fontsize=8)
    axis.set_ylabel(f"{len(kinds)} of the tokens", fontsize=8)

    axis = figure.add_subplot(grid[1, 0])
    shades = plt.get_cmap("viridis")
    for i, row in enumerate(found.rows):
        live = row.live.sort().values
        share = torch.arange(1, len(live) + 1) / len(live)
        color = shades(0.05 + 0.85 * i / max(1, len(found.rows) - 1))
        axis.step(live, share, where="post", color=color, lw=1.4, label=f"tau {named(row.tau)}, {row.live.mean():.0f}")
    axis.set(xscale="log", ylim=(0, 1.02))
    axis.set_xlabel(f"live blocks of a token, of {found.blocks}", fontsize=8)
    axis.set_ylabel("share of tokens with at most so many", fontsize=8)
    axis.legend(fontsize=7, title="mean", title_fontsize=7, loc="lower right")

    axis = figure.add_subplot(grid[1, 1])
    series = {"dhidden": ("o-", "#1b7f4b"), "worst": ("o:", "#1b7f4b"), "dweight": ("s-", "#4c72b0")}
    names = {"dhidden": "dhidden", "worst": "dhidden, worst token", "dweight": "dweight"}
    rows = [row for row in found.rows if row.errors is not None and row.errors.dhidden > 0]
    for key, (style, color) in series.items():
        values = [getattr(row.errors, key) for row in rows]
        axis.plot([row.speed_up(False) for row in rows], values, style, color=color, ms=4, lw=1.2, label=names[key])
        if found.rounded is not None:
            axis.axhline(getattr(found.rounded, key), color=color, ls=style[1:], lw=0.8, alpha=0.35)
    for row in rows:
        at = (row.speed_up(False), row.errors.worst)
        axis.annotate(named(row.tau), at, (0, 6), textcoords="offset points", fontsize=7, ha="center")
    axis.set(yscale="log")
    axis.margins(0.12)
    axis.set_xlabel("speed-up of a step over the exact one, by passes", fontsize=8)
    axis.set_ylabel("relative error of the gradient", fontsize=8)
    beside = "" if found.rounded is None else "pale: bf16 logits"
    axis.legend(fontsize=7, loc="upper left", title=beside or None, title_fontsize=7)
    for axis in figure.axes:
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25) if axis is not figure.axes[0] else None
    figure.text(0.5, 0.012, where, ha="center", fontsize=7, color="gray")
    figure.subplots_adjust(left=0.07, right=0.98, top=0.94, bottom=0.1)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def _head(args: argparse.Namespace, announce) -> Head:
    if args.head is not None:
        head = from_file(args.head).some(args.tokens)
        device = torch.device(args.device)
        bias = None if head.bias is None else head.bias.to(device)
        return Head(head.name, head.hidden.to(device), head.weight.to(device), head.labels.to(device), bias)
    return from_model(args.model, args.data, args.tokens, args.length, args.device, announce).some(args.tokens)


def run(args: argparse.Namespace) -> int:
    taus = check(args)
    if args.model is not None:
        with progress(0) as bar:
            head = _head(args, bar.step)
    else:
        head = _head(args, lambda _: None)
    with progress(steps(head, taus, args.seeds)) as bar:
        found = study(head, taus, seeds=args.seeds, announce=bar.step)

    vocab, hidden = head.weight.shape
    kind = str(head.hidden.dtype).removeprefix("torch.")
    what = f"{head.name}: {len(head.labels)} tokens, V = {vocab} ({found.blocks} blocks), H = {hidden}, {kind}"
    print(what)
    if len(head.labels) < args.tokens:
        print(f"note: {args.tokens} tokens were asked for, and there are {len(head.labels)}")
    print("\n" + "\n".join(table(found, args.device)) + "\n")
    print(LEGEND.format(seeds=args.seeds))
    flat = [named(row.tau) for row in found.rows if row.goes_exact(args.device)]
    if flat:
        at = ", ".join(flat)
        print(f"exact            at tau {at} so many blocks are live that fastdpo takes its exact path here")
    if args.picture:
        draw(found, args.output, f"{what}; torch {torch.__version__}")
        print(f"\n{args.output}")
    return 0
