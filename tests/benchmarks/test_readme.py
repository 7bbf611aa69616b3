"""The README's measured numbers are those of the committed result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]


def test_tables_are_those_of_the_results():
    from benchmarks.report.tables import DOCUMENTS, filled

    for document in DOCUMENTS:
        text = document.read_text()
        assert text == filled(text, beside=document.parent), "run python -m benchmarks.report.tables"


def test_every_result_has_its_table_and_every_link_its_file():
    from benchmarks.report.tables import COMMANDS, DOCUMENTS, SOURCES

    texts = [document.read_text() for document in DOCUMENTS]
    assert {name for text in texts for name in re.findall(r"<!-- table: ([\w-]+) -->", text)} == set(SOURCES)
    documents = [*DOCUMENTS, *(ROOT / "docs").glob("*.md")]
    for document, text in zip(documents, (document.read_text() for document in documents)):
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (document.parent / link).exists(), link
    for source in SOURCES.values():
        for file in source.files:
            module = ROOT / COMMANDS[file].split()[0].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), file


def test_figures_in_the_text_are_those_of_the_results():
    from benchmarks.report.tables import RESULTS

    def record(name: str) -> dict:
        return json.loads((RESULTS / f"2026-11-{name}.json").read_text())

    matrix, counted = record("model-matrix"), record("triton-counts")["results"]
    batches = record("cpu-batches")["rows"]
    of_exact, of_eager = (max(row[f"default / {path}"] for row in batches) for path in ("exact", "eager"))
    moved = counted["dhidden, bytes through the L2 cache"]
    launches = [row["launches"] for title, row in counted.items() if title.startswith("routed") and "same" in title]
    runs = record("training")["runs"]

    def mean(key: str, path: str) -> float:
        values = [run[key] for run in runs if run["path"] == path]
        return sum(values) / len(values)

    frontier = record("cpu-frontier")
    at_kl = {(row["method"], row["kl"]): row["rewards"] for row in frontier["at equal KL"]["rows"]}
    gaps = [
        fmean(rewards) - fmean(at_kl["RL, learned reward", kl])
        for (method, kl), rewards in at_kl.items()
        if method == "DPO" and None not in rewards
    ]
    assert len(gaps) == 5  # up to 3 nats
    of_cpu = {
        method: fmean(run["cpu seconds"] for run in frontier["runs"] if run["method"] == method)
        for method in ("DPO", "RL, learned reward")
    }

    verdicts = {"wrong": 0, **matrix["counts"]}
    figures = {
        "docs/trainers.md": [
            f"of {len(matrix['rows'])} classes {verdicts['exact']} are exact, {verdicts['refused']} is refused, "
            f"none wrong; {verdicts['not built']} could not be built tiny",
        ],
        "examples/frontier/README.md": [
            f"the means differ by at most {max(map(abs, gaps)):.2f}",
            f"{of_cpu['DPO']:.0f} s of a core a policy, RL {of_cpu['RL, learned reward']:.0f} s",
        ],
        "README.md": [
            f"for about {moved['ordered'] / moved['atomics']:.1f} times the traffic",
        ],
        "benchmarks/README.md": [
            f"the default takes at most {of_exact:.2f} of the exact backward's time and {of_eager:.2f} of eager's",
            f"({launches[0]} for the step below, {launches[1]} with a frozen head;",
            f"{mean('distance', 'routed'):.2f} against {mean('distance', 'trl bf16'):.2f} "
            f"of {mean('travelled', 'exact'):.1f} travelled",
        ],
    }
    assert verdicts["wrong"] == 0
    for document, sentences in figures.items():
        text = " ".join((ROOT / document).read_text().split())
        for sentence in sentences:
            assert sentence in text, sentence


def test_no_error_of_the_routed_default_is_above_that_of_bf16_logits():
    from benchmarks.report.tables import RESULTS

    rows = json.loads((RESULTS / "2026-11-cpu-accuracy.json").read_text())["rows"]
    routed, eager = (
        next(row for row in rows if row["path"] == path and row["inputs"] == "bfloat16")
        for path in ("fastdpo routed", "eager")
    )
    compared = [key for key in routed if key not in ("path", "inputs")]
    assert len(compared) > 8 and all(routed[key] < eager[key] for key in compared)


def test_a_changed_result_changes_the_readme(tmp_path):
    from benchmarks.report.tables import RESULTS, SOURCES, rendered

    (file,) = SOURCES["step"].files
    record = json.loads((RESULTS / file).read_text())
    routed = next(row for row in record["rows"] if row["step"] == "fastdpo routed")
    routed["median s"] = 123.0
    (tmp_path / file).write_text(json.dumps(record))
    changed = rendered("step", tmp_path)
    assert "| **fastdpo, routed** | **123.00** |" in changed and changed != rendered("step")


def test_the_best_peer_of_each_column_is_bold():
    """Also where it is not fastdpo."""
    from benchmarks.report.tables import summary

    def rows(key, **values):
        return [{key: name, **dict(zip(("median s", "MiB"), pair))} for name, pair in values.items()]

    step = {"rows": rows("step", eager=(1.0,), liger=(3.0,)), "notes": {"skipped": {"cce": "needs a GPU"}}}
    sweep = {
        "rows": [{"path": p, "MiB": m, "along": "frozen", "frozen": False} for p, m in (("eager", 9), ("liger", 7))]
    }
    fits = {"rows": [{"path": "eager", "GiB": 2, "most tokens": 5, "at least": False}]}
    accuracy = {"rows": [], "notes": {"left out": {"liger scaled ce": "Hopper only"}}}
    keys = ("sequence log-prob, nats", "dhidden", "dhidden, p(label) 0.99 to 1.0", "dhidden, worst token", "dweight")
    for path, error in (("eager", 0.5), ("fastdpo exact", 0.25)):
        accuracy["rows"].append({"path": path, "inputs": "bfloat16", **dict.fromkeys(keys, error)})
    lines = {line.split(" | ")[0].strip("| "): line for line in summary(step, sweep, fits, accuracy)}
    assert "| **1.00** | 9 | **5** | 5.0e-1 |" in lines["eager logits"]
    assert "| 3.00 | **7** | not measured |" in lines["Liger `LigerFusedLinearDPOLoss`"]
    assert lines['fastdpo, `backward="exact"`'].count("**2.5e-1**") == 5
    assert "not measured: needs a GPU" in lines["Cut Cross-Entropy's kernels"]


def test_reward_at_equal_kl_is_shown_where_every_seed_came_so_far():
    from benchmarks.report.frontier import frontier

    rewards = {
        ("DPO", 1): [2.0, 4.0], ("RL, learned reward", 1): [3.0, 3.5], ("RL, true reward", 1): [9.0, 9.0],
        ("DPO", 2): [5.0, 6.0], ("RL, learned reward", 2): [7.0, None], ("RL, true reward", 2): [None, None],
    }  # fmt: skip
    rows = [{"method": method, "kl": kl, "rewards": found} for (method, kl), found in rewards.items()]
    end = [{"reward": 4.0, "kl": 2.0}]
    record = {
        "at equal KL": {"levels": [1, 2], "rows": rows, "ceiling": [10.0, None]},
        "notes": {"betas": [0.5], "cpu seconds": 90},
        "runs": [{"method": "DPO", "beta": 0.5, "seed": seed, "points": end} for seed in (0, 1)],
        "reference": {"reward": 1.0},
        "reward models": [{"accuracy": 0.7, "chosen is better": 0.8}] * 2,
    }
    lines = frontier(record)
    assert "| DPO | 3.00 ± 1.41 | 5.50 ± 0.71 |" in lines
    assert "| RL, learned reward | 3.25 ± 0.35 |  |" in lines
    assert "| RL, true reward | 9.00 ± 0.00 |  |" in lines and "| the best possible | 10.00 |  |" in lines
    assert "| 0.5 | DPO | 4.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 0.00 |" in lines
    assert "2 seeds" in lines[-1] and "1.5 minutes of one core" in lines[-1]


def test_a_missing_result_is_said_to_be_missing(tmp_path):
    from benchmarks.report.tables import SOURCES, filled

    text = "<!-- table: training -->\nstale 1.0\n<!-- end -->\n"
    assert "Not measured yet: `python -m benchmarks.models.training`" in filled(text, tmp_path)
    assert "stale" not in filled(text, tmp_path)
    with pytest.raises(ValueError, match="nothing"):
        filled(text.replace("training", "nothing"), tmp_path)
    assert SOURCES["training"].files[0] in filled("<!-- table: training -->\n<!-- end -->\n", _training(tmp_path))


def test_the_routing_picture_is_drawn_from_the_committed_shares(tmp_path):
    from benchmarks.report.routing import draw

    record = json.loads((ROOT / "benchmarks/results/2026-11-head-shares.json").read_text())
    draw(record, tmp_path / "routing.png", 0)
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_light():
    heavy = {file.name: file.stat().st_size for file in (ROOT / "benchmarks/results/plots").iterdir()}
    assert {name: size for name, size in heavy.items() if size > 70_000} == {}


def _training(folder: Path) -> Path:
    from benchmarks.inputs import environment

    values = {"loss": [0.7, 0.5], "margin": [0.0, 1.0], "accuracy": [0.5, 1.0], "entropy": [2.0, 2.0]}
    runs = [
        {"path": "exact", "seed": 0, "travelled": 1.0, **values},
        {"path": "routed", "seed": 0, "travelled": 1.0, "distance": 0.25, **values},
    ]
    record = {"notes": {}, "environment": environment(), "runs": runs}
    (folder / "2026-11-training.json").write_text(json.dumps(record))
    return folder


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
