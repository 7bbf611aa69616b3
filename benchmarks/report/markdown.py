"""Pieces of Markdown that tables are made of."""

from __future__ import annotations


def error(value: float | None) -> str:
    """Two digits, as 5.8e-3."""
    if value is None:
        return "not measured"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]


def bold(cells: list[str], wanted: bool) -> list[str]:
    return [f"**{cell}**" for cell in cells] if wanted else cells


def not_measured(reasons: dict[str, str]) -> list[str]:
    text = "; ".join(f"{name} ({why})" for name, why in reasons.items())
    return ["", f"Not measured: {text}."] if reasons else []
