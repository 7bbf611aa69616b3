"""A GPU suite's result as a picture: every step's time over two plain products, and where the time of ours goes.

python -m benchmarks.report.gpu benchmarks/results/FILE.json [--output FILE.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(record: dict, output: Path) -> None:
    shapes = [shape for shape in record["shapes"] if _has_unit(shape.get("groups", {}).get("step"))]
    profiled = [shape for shape in record["shapes"] if shape.get("kernels")]
    figure, axes = plt.subplots(1, len(shapes) + len(profiled), figsize=(6 * (len(shapes) + len(profiled)), 5))
    axes = list(axes) if len(shapes) + len(profiled) > 1 else [axes]
    for shape, axis in zip(shapes, axes):
        rows = sorted(shape["groups"]["step"]["rows"], key=lambda row: -row["median"])
        unit = next(row["median"] for row in rows if row["name"] == shape["groups"]["step"]["unit"])
        spread = [
            [(row["median"] - row["low"]) / unit for row in rows],
            [(row["high"] - row["median"]) / unit for row in rows],
        ]
        colors = ["tab:green" if row["name"].startswith("fastdpo") else "tab:gray" for row in rows]
        axis.barh([row["name"] for row in rows], [row["median"] / unit for row in rows], xerr=spread, color=colors)
        floors = [(i, row["floor ms"] / unit) for i, row in enumerate(rows) if row["floor ms"] is not None]
        axis.plot([x for _, x in floors], [i for i, _ in floors], "k|", markersize=16, label="floor")
        axis.axvline(1.25, linestyle=":", color="tab:red", label="target of the routed step")
        axis.set_xlabel("time over two plain products")
        axis.set_title(f"DPO step, (N, V, H) = ({shape['N']}, {shape['V']}, {shape['H']}), {shape['dtype']}")
        axis.legend()
    for shape, axis in zip(profiled, axes[len(shapes) :]):
        rows = [row for row in shape["kernels"]["routed"] if row.get("floor ms", 0) > 0]
        places = range(len(rows))
        axis.barh([i + 0.2 for i in places], [row["ms"] or 0.0 for row in rows], 0.4, label="measured")
        axis.barh([i - 0.2 for i in places], [row["floor ms"] for row in rows], 0.4, label="floor")
        axis.set_yticks(list(places), [row["kernel"] for row in rows])
        axis.set_xscale("log")
        axis.set_xlabel("ms")
        axis.set_title("kernels of a routed step")
        axis.legend()
    figure.suptitle(f"{record['title']}: {record['device']['name']}, {record['date']}")
    figure.tight_layout()
    figure.savefig(output, dpi=110)


def _has_unit(group: dict | None) -> bool:
    return group is not None and any(row["name"] == group["unit"] for row in group["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--output", type=Path, help="default: beside the result")
    args = parser.parse_args()
    plot(json.loads(args.result.read_text()), args.output or args.result.with_suffix(".png"))


if __name__ == "__main__":
    main()
