"""The tables of examples/frontier: reward at equal KL, where trainings ended, what the settings were chosen from."""

from __future__ import annotations

from statistics import fmean, stdev

from benchmarks.report.markdown import bold, table


def spread(values: list[float], digits: int = 2) -> str:
    """Mean and standard deviation, of the seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def frontier(record: dict) -> list[str]:
    """Nothing is bold: who is ahead is a question of the deviations. Empty: not every seed came so far."""
    return [*_at_equal_kl(record), "", *_ends(record), "", *_about(record)]


def _at_equal_kl(record: dict) -> list[str]:
    compared = record["at equal KL"]
    methods = list(dict.fromkeys(row["method"] for row in compared["rows"]))
    found = {(row["method"], row["kl"]): row["rewards"] for row in compared["rows"] if None not in row["rewards"]}
    levels = [level for level in compared["levels"] if any((method, level) in found for method in methods)]
    rows = [
        [method, *(spread(found[method, level]) if (method, level) in found else "" for level in levels)]
        for method in methods
    ]
    possible = dict(zip(compared["levels"], compared["ceiling"]))
    rows.append(["the best possible", *("" if possible[x] is None else f"{possible[x]:.2f}" for x in levels)])
    return table(["true reward at a KL of", *(f"{level:g}" for level in levels)], rows)


def _ends(record: dict) -> list[str]:
    rows = []
    for beta in record["notes"]["betas"]:
        for method in dict.fromkeys(run["method"] for run in record["runs"] if run["beta"] == beta):
            of = [run["points"][-1] for run in record["runs"] if (run["method"], run["beta"]) == (method, beta)]
            rewards, kls = [end["reward"] for end in of], [end["kl"] for end in of]
            reached = [end["reward"] - beta * end["kl"] for end in of]
            rows.append([f"{beta:g}", method, spread(rewards), spread(kls), spread(reached)])
    return table(["`beta`", "method, where it ended", "true reward", "KL", "reward - `beta` KL"], rows)


def _about(record: dict) -> list[str]:
    models, notes, start = record["reward models"], record["notes"], record["reference"]["reward"]
    right, known = ([100 * model[key] for model in models] for key in ("accuracy", "chosen is better"))
    return [
        f"{len(models)} seeds, mean ± deviation. The reference's reward is {start:.2f}. The reward models are right on "
        f"{spread(right, 1)}% of held-out preferences, the true reward on {spread(known, 1)}% of all. "
        f"The run took {notes['cpu seconds'] / 60:.1f} minutes of one core."
    ]


def candidates(record: dict) -> list[str]:
    """Bold: the best of each method, by the sum over both betas."""
    betas = list(dict.fromkeys(run["beta"] for run in record["runs"]))
    found: dict[str, dict[str, dict[float, dict]]] = {}
    for run in record["runs"]:
        settings = ", ".join(f"{name} {value:g}" for name, value in run["changes"].items())
        found.setdefault(run["method"], {}).setdefault(settings, {})[run["beta"]] = run
    rows = []
    for method, of_method in sorted(found.items()):
        total = {name: sum(run["objective"] for run in runs.values()) for name, runs in of_method.items()}
        for name, runs in of_method.items():
            reached = (f"{runs[beta]['objective']:.2f}" for beta in betas)
            seconds = f"{fmean(run['cpu seconds'] for run in runs.values()):.0f}"
            cells = [method, name, *reached, f"{total[name]:.2f}", seconds]
            rows.append(bold(cells, total[name] == max(total.values())))
    header = ["method", "settings", *(f"reward - `beta` KL at `beta` {beta:g}" for beta in betas), "sum", "CPU s"]
    models = [
        [f"rate {model['changes']['rate']:g}", f"{model['loss']:.3f}", f"{100 * model['accuracy']:.1f}%"]
        for model in record["reward models"]
        if "changes" in model
    ]
    return [*table(header, rows), "", *table(["reward model", "loss on held-out preferences", "right on them"], models)]
