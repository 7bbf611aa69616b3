"""The house's docstrings as the site shows them, and the table of losses; read from the source, without torch.

- "Equivalent to::" and the indented lines below it become Python blocks;
- ``{losses}`` and the like, which `fastdpo.losses.states_options` fills in when it is imported, are filled in here.
"""

from __future__ import annotations
import __future__

import ast
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

LOSSES = Path(__file__).parents[2] / "fastdpo" / "losses.py"
# What of losses.py says which losses there are; none of it needs torch
NEEDED = ("F_DIVERGENCES", "Loss", "FLIP", "BOTH_LENGTHS", "BOTH_KLS", "LOSSES")
CODE = re.compile(r"(```.*?```|``.+?``|`[^`\n]+`)", re.DOTALL)
NAMES = re.compile(r"^( {4}(?:\w+, )+\w+,)\n {8}(?=(?:\w+, )*\w+: )", re.MULTILINE)
POWER = re.compile(r"\d+\*\*-?\d+")
LITERAL = re.compile(r"^(?P<indent> *)(?P<text>.*)::\n\n(?P<code>(?:(?P=indent) {4}.*\n|\n)+)", re.MULTILINE)


def losses() -> dict:
    """{name: Loss} of fastdpo/losses.py, and the rest of NEEDED, by evaluating these statements alone."""
    body = []
    for node in ast.parse(LOSSES.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [getattr(node, "name", None)] + [getattr(target, "id", None) for target in targets]
        if any(name in NEEDED for name in names):
            body.append(node)
    space: dict = {"NamedTuple": NamedTuple, "__name__": LOSSES.stem}
    exec(compile(ast.Module(body, []), str(LOSSES), "exec", dont_inherit=True, flags=_annotations()), space)
    return {name: space[name] for name in NEEDED}


def _annotations() -> int:
    return __future__.annotations.compiler_flag


def filled(text: str) -> str:
    """`text` as `states_options` leaves it, but for where lines break."""
    table = losses()
    named = {name: f"``{name}``" for name in table["LOSSES"]}
    of = table["LOSSES"]
    lists = {
        "losses": named.values(),
        "divergences": [f"``{name}``" for name in table["F_DIVERGENCES"]],
        "f_divergence": [named[name] for name in of if of[name].f_divergence],
        "lengths": [named[name] for name in of if of[name].lengths],
        "kl": [named[name] for name in of if of[name].kl],
        "label_smoothing": [
            f"{of[name].label_smoothing} for {named[name]}" for name in of if of[name].label_smoothing is not None
        ],
    }
    for key, items in lists.items():
        text = text.replace(f"{{{key}}}", ", ".join(items))
    return text


def fenced(text: str) -> str:
    """`text` with its literal blocks as fenced Python, powers as code (to Markdown two stars are bold), and a list of
    arguments on one line (or griffe drops it)."""

    def block(match: re.Match) -> str:
        indent, code = match["indent"], textwrap.dedent(match["code"]).strip("\n")
        lines = "\n".join(indent + line if line else "" for line in ("```python", *code.split("\n"), "```"))
        return f"{indent}{match['text']}:\n\n{lines}\n\n" if match["text"] else f"{lines}\n\n"

    text = LITERAL.sub(block, text if text.endswith("\n") else f"{text}\n").rstrip("\n")
    parts = CODE.split(NAMES.sub(r"\1 ", text))  # every second one is code
    parts[::2] = [POWER.sub(r"`\g<0>`", part) for part in parts[::2]]
    return "".join(parts)


def table_of_losses() -> str:
    """Every loss: formula, options beyond beta, where it comes from."""
    rows = ["| `loss_type` | formula | options beside `beta` | needs | source |", "| --- | --- | --- | --- | --- |"]
    for name, loss in losses()["LOSSES"].items():
        options = [f"`{option}`" for option in loss.options]
        if loss.label_smoothing is not None:
            options.append(f"`label_smoothing` in {loss.label_smoothing}")
        if loss.f_divergence:
            options.append("`f_divergence_type`")
        needs = ["no reference"] if loss.reference_free else []
        needs += ["lengths"] if loss.lengths else []
        needs += ["each token's KL"] if loss.kl else []
        needs += ["its rows are matched by rank"] if loss.ranked else []
        cells = [f"`{name}`", f"`{loss.formula}`", ", ".join(options), ", ".join(needs), loss.source]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)
