"""The README's measured numbers are those of the committed result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_tables_are_those_of_the_results():
    from tables import filled

    text = (ROOT / "README.md").read_text()
    assert text == filled(text), "run python benchmarks/tables.py"


def test_every_result_has_its_table_and_every_link_its_file():
    from tables import SOURCES

    text = (ROOT / "README.md").read_text()
    assert set(re.findall(r"<!-- table: ([\w-]+) -->", text)) == set(SOURCES)
    for link in re.findall(r"\]\((benchmarks/[^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for source in SOURCES.values():
        assert (ROOT / "benchmarks" / source.command.split()[0]).exists(), source.command


def test_a_changed_result_changes_the_readme(tmp_path):
    from tables import RESULTS, SOURCES, rendered

    file = SOURCES["step"].file
    record = json.loads((RESULTS / file).read_text())
    routed = next(row for row in record["rows"] if row["step"] == "fastdpo routed")
    routed["median s"] = 123.0
    (tmp_path / file).write_text(json.dumps(record))
    changed = rendered("step", tmp_path)
    assert "| **fastdpo, routed** | **123.00** |" in changed and changed != rendered("step")


def test_a_missing_result_is_said_to_be_missing(tmp_path):
    from tables import SOURCES, filled

    text = "<!-- table: training -->\nstale 1.0\n<!-- end -->\n"
    assert "Not measured yet: `benchmarks/bench_training.py`" in filled(text, tmp_path)
    assert "stale" not in filled(text, tmp_path)
    with pytest.raises(ValueError, match="nothing"):
        filled(text.replace("training", "nothing"), tmp_path)
    assert SOURCES["training"].file in filled("<!-- table: training -->\n<!-- end -->\n", _training(tmp_path))


def test_the_routing_picture_shows_the_kernels_rule(tmp_path):
    import torch
    from plot_routing import draw, kinds_of

    mass = torch.tensor([[0.6, 0.3, 2e-4, 1e-9], [2e-4, 0.9, 1e-9, 0.0999]])
    labels = torch.tensor([2 * 128, 0])  # in blocks 2 and 0, both light
    kinds = torch.stack([kinds_of(mass, labels, 1e-3, seed) for seed in range(200)])
    sure = torch.tensor([[True, True, True, False], [True, True, False, True]])
    assert (kinds[:, sure] == 2).all() and (kinds[:, ~sure] == 0).all()
    light = torch.stack([kinds_of(mass, torch.tensor([0, 128]), 1e-3, seed) for seed in range(400)])
    assert 0.1 < (light[:, 0, 2] == 1).float().mean() < 0.3  # q = 0.2, four standard errors are 0.08
    record = json.loads((ROOT / "benchmarks/results/2026-11-head-masses.json").read_text())
    draw(record, tmp_path / "routing.png", 0)
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_light():
    heavy = {file.name: file.stat().st_size for file in (ROOT / "benchmarks/results/plots").iterdir()}
    assert {name: size for name, size in heavy.items() if size > 70_000} == {}


def _training(folder: Path) -> Path:
    from inputs import environment

    values = {"loss": [0.7, 0.5], "margin": [0.0, 1.0], "accuracy": [0.5, 1.0], "entropy": [2.0, 2.0]}
    runs = [
        {"path": "exact", "seed": 0, "travelled": 1.0, **values},
        {"path": "routed", "seed": 0, "travelled": 1.0, "distance": 0.25, **values},
    ]
    record = {"notes": {}, "environment": environment(), "runs": runs}
    (folder / "2026-11-training.json").write_text(json.dumps(record))
    return folder
