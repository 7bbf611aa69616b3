"""Reward against KL of DPO and of the stages it replaces, on a task whose reward is known: README.md beside this file.

python -m examples.frontier            three seeds: frontier_output/frontier.png, .json
python -m examples.frontier --quick    one seed, short trainings
python -m examples.frontier --sweep    how the settings were chosen: a seed that the figure does not use
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import fmean

from . import stages
from .evaluate import at_equal_kl
from .settings import DPO, FULL, METHODS, OF_BETA, QUICK, RL, Settings

NEEDED = ("matplotlib", "rich")
TUNING_SEED, TUNING_BETAS = 1000, (1.0, 0.25)
LEVELS = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0]  # nats


class Jobs:
    """Calls of `stages`, in processes of one thread each, behind a progress bar."""

    def __init__(self, workers: int, console):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, transient=True)
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), stages.one_thread)

    def __enter__(self):
        self.progress.__enter__()
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)
        self.progress.__exit__(*error)

    def run(self, title: str, calls: list[tuple], say=None) -> list:
        """The results of (function, *arguments), in the order of the calls."""
        bar, started = self.progress.add_task(title, total=len(calls)), time.perf_counter()
        futures = {self.pool.submit(*call): i for i, call in enumerate(calls)}
        results = [None] * len(calls)
        for future in as_completed(futures):
            results[futures[future]] = future.result()
            self.progress.advance(bar)
        self.progress.remove_task(bar)
        self.progress.print(f"{title}: {time.perf_counter() - started:.0f} s" + (f"; {say(results)}" if say else ""))
        return results


def prepare(settings: Settings, jobs: Jobs, folder: Path, seeds: tuple[int, ...]) -> tuple[dict, list]:
    """(reference, reward models): what every run starts from."""
    (reference,) = jobs.run(
        "supervised fine-tuning", [(stages.train_reference, settings, folder)],
        lambda done: f"{done[0]['parameters']:,} parameters, {done[0]['loss']:.3f} nats a word, "
        f"reward {done[0]['reward']:.2f}",
    )  # fmt: skip
    models = jobs.run(
        "preferences, reward models", [(stages.compare, settings, folder, seed) for seed in seeds],
        lambda done: "right on held-out preferences " + ", ".join(f"{m['accuracy']:.1%}" for m in done)
        + f" (the true reward: {done[0]['chosen is better']:.1%})",
    )  # fmt: skip
    return reference, models


def frontier(settings: Settings, jobs: Jobs, folder: Path) -> dict:
    reference, models = prepare(settings, jobs, folder, settings.seeds)
    runs = [
        stages.Run(method, beta, seed)
        for method in reversed(METHODS)  # the longest first
        for beta in (settings.betas if method in OF_BETA else (None,))
        for seed in settings.seeds
    ]
    calls = [(stages.ceiling, settings, folder), *((stages.train, settings, folder, run) for run in runs)]
    ceiling, *done = jobs.run("policies, the ceiling", calls)
    ceiling = [{**point, "reward": reference["reward"] + point["gain"]} for point in ceiling]
    return {
        "reference": reference, "ceiling": ceiling, "reward models": models, "runs": done,
        "at equal KL": at_levels(reference, ceiling, done),
    }  # fmt: skip


def at_levels(reference: dict, ceiling: list[dict], done: list[dict]) -> dict:
    """The reward of every method and seed at each of LEVELS: between where its betas ended, or along its training."""
    start, rows = {"kl": 0.0, "reward": reference["reward"]}, []
    for method, level in product(METHODS, LEVELS):
        rewards = []
        for seed in sorted({run["seed"] for run in done}):
            mine = [run for run in done if run["method"] == method and run["seed"] == seed]
            points = [run["points"][-1] for run in mine] if method in OF_BETA else mine[0]["points"]
            rewards += at_equal_kl([start, *points], [level])
        rows.append({"method": method, "kl": level, "rewards": rewards})
    return {"levels": LEVELS, "rows": rows, "ceiling": at_equal_kl([start, *ceiling], LEVELS)}


CANDIDATES = {  # as many of each method
    DPO: [
        {"rate": rate, "steps": steps}
        for rate, steps in [*product((3e-4, 1e-3, 3e-3, 8e-3), (128, 256)), (5e-4, 256), (3e-4, 512)]
    ],
    RL: [  # of about the same time
        {"rate": rate, "epochs": epochs, "steps": {1: 120, 2: 80, 4: 48}[epochs]}
        for rate, epochs in [(3e-4, 2), *product((1e-3, 3e-3), (1, 2, 4)), (8e-3, 2), (3e-4, 1), (5e-4, 1)]
    ],
}
REWARD_MODELS = [(("rate", rate),) for rate in (3e-4, 1e-3, 3e-3, 8e-3)]


def sweep(settings: Settings, jobs: Jobs, folder: Path) -> dict:
    """Every candidate's reward - beta * KL, true reward and all, for two betas."""
    reference, models = prepare(settings, jobs, folder, (TUNING_SEED,))
    runs = [
        stages.Run(method, beta, TUNING_SEED, tuple(candidate.items()))
        for method in (RL, DPO)
        for candidate in CANDIDATES[method]
        for beta in TUNING_BETAS
    ]
    done = jobs.run("candidates", [(stages.train, settings, folder, run) for run in runs])
    for run in done:
        end = run["points"][-1]
        run["objective"] = end["reward"] - run["beta"] * end["kl"]
    calls = [(stages.compare, settings, folder, TUNING_SEED, changes) for changes in REWARD_MODELS]
    return {"reference": reference, "reward models": models + jobs.run("reward models", calls), "runs": done}


def show(record: dict, console) -> None:
    from rich.table import Table

    if "at equal KL" not in record:
        table = Table("method", "settings", "beta", "reward", "KL", "reward - beta KL", "s")
        for run in record["runs"]:
            end, changes = run["points"][-1], ", ".join(f"{k} {v:g}" for k, v in run["changes"].items())
            figures = (end["reward"], end["kl"], run["objective"])
            cells = (f"{run['beta']:g}", *(f"{x:.3f}" for x in figures), f"{run['cpu seconds']:.0f}")
            table.add_row(run["method"], changes, *cells)
        console.print(table)
        return
    levels, rows = record["at equal KL"]["levels"], record["at equal KL"]["rows"]
    table = Table("true reward at a KL of", *(f"{level:g}" for level in levels))
    for method in METHODS:
        found = [row["rewards"] for row in rows if row["method"] == method]
        table.add_row(method, *("" if None in rewards else f"{fmean(rewards):.2f}" for rewards in found))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m examples.frontier", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two betas, short trainings")
    parser.add_argument("--sweep", action="store_true", help="candidates of the settings instead of the figure")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="processes of one thread; default: a core each")
    parser.add_argument("--output", type=Path, default=Path("frontier_output"), help="default: frontier_output")
    args = parser.parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: needs {', '.join(missing)}: pip install 'fastdpo[demo]'", file=sys.stderr)
        return 2
    if args.workers < 1:
        print(f"error: --workers must be at least 1, not {args.workers}", file=sys.stderr)
        return 2
    from rich.console import Console

    from benchmarks.inputs import environment

    console, start = Console(highlight=False), time.perf_counter()
    settings = QUICK if args.quick else FULL
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Jobs(args.workers, console) as jobs:
        made = (sweep if args.sweep else frontier)(settings, jobs, Path(folder))
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4])  # its own and its processes', in user and system
    env = {**environment(), "threads": args.workers}  # a process of one thread each
    record = {
        "title": "Reward against KL" + ": candidates of the settings" * args.sweep,
        "notes": {**asdict(settings), "seconds": seconds, "cpu seconds": cpu},
        "environment": env,
        **made,
    }
    name = "sweep" if args.sweep else "frontier"
    (args.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    show(record, console)
    if not args.sweep:
        from .plot import draw

        draw(record, args.output / "frontier.png")
    console.print(f"{args.output}/{name}.*   {seconds:.0f} s in all, {cpu:.0f} s of a processor", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
