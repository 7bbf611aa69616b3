"""The demo and its data: `python -m fastdpo.demo`, and `python -m fastdpo`."""

import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastdpo import __main__ as report
from fastdpo.demo import comparison as demo
from fastdpo.demo import meters as demo_meters
from fastdpo.demo import setup as demo_setup

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [json.loads(line) for line in demo.DEMO_DATA.read_text().splitlines()]
ROWS = [{name: f"{name} {index}" for name in ("prompt", "chosen", "rejected")} for index in range(5)]


def run_module(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


class TestData:
    def test_well_formed(self):
        assert 300 <= len(PAIRS) <= 400
        for pair in PAIRS:
            assert list(pair) == ["prompt", "chosen", "rejected"]
            assert all(isinstance(text, str) and text.strip() for text in pair.values())
            assert pair["prompt"].endswith("\n") and not pair["chosen"].startswith(" ")
            assert pair["chosen"] != pair["rejected"]
            assert pair["chosen"][-1] in ".?!"
        assert len({pair["prompt"] for pair in PAIRS}) == len(PAIRS)

    def test_length_gives_nothing_away(self):
        chosen, rejected = ([len(pair[side]) for pair in PAIRS] for side in ("chosen", "rejected"))
        assert statistics.fmean(chosen) == pytest.approx(statistics.fmean(rejected), rel=0.1)
        longer = sum(a > b for a, b in zip(chosen, rejected)) / len(PAIRS)
        shorter = sum(a < b for a, b in zip(chosen, rejected)) / len(PAIRS)
        assert 0.35 < longer < 0.55 and 0.35 < shorter < 0.55

    def test_arithmetic_is_right(self):
        operations = {
            "+": lambda a, b: a + b,
            "-": lambda a, b: a - b,
            "times": lambda a, b: a * b,
            "divided by": lambda a, b: a / b,
        }
        checked = 0
        for pair in PAIRS:
            match = re.fullmatch(r"What is (\d+) (\+|-|times|divided by) (\d+)\?\n", pair["prompt"])
            if match:
                expected = operations[match[2]](int(match[1]), int(match[3]))
                assert int(re.findall(r"\d+", pair["chosen"])[-1]) == expected, pair
                assert not re.search(rf"(^| is ){expected:g}\.$", pair["rejected"]), pair
                checked += 1
        assert checked >= 40

    def test_sorting_counting_and_spelling_are_right(self):
        for pair in PAIRS:
            chosen = pair["chosen"].lower()
            if match := re.match(r"Sort alphabetically: (.*)\n", pair["prompt"]):
                assert ", ".join(sorted(match[1].split(", "))) in chosen
            elif match := re.match(r'How many letters are in "(.*)"', pair["prompt"]):
                assert str(len(match[1])) in chosen
            elif match := re.match(r'Spell "(.*)" backwards', pair["prompt"]):
                assert match[1][::-1] in chosen


class TestLoading:
    @pytest.fixture(autouse=True)
    def _needs_datasets(self):
        pytest.importorskip("datasets")

    def check(self, source, tmp_path, split="train"):
        loaded = demo_setup.load_preferences(str(source), split, str(tmp_path / "cache"))
        assert [dict(row) for row in loaded] == ROWS

    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
    def test_files(self, kind, tmp_path):
        from datasets import Dataset

        dataset = Dataset.from_list([row | {"other": 1} for row in ROWS])
        path = tmp_path / f"pairs.{kind}"
        getattr(dataset, f"to_{kind.removesuffix('l')}")(str(path))
        self.check(path, tmp_path)

    def test_saved_dataset_and_its_splits(self, tmp_path):
        from datasets import Dataset, DatasetDict

        dataset = Dataset.from_list(ROWS)
        dataset.save_to_disk(str(tmp_path / "one"))
        DatasetDict({"train": dataset.select([0]), "test": dataset}).save_to_disk(str(tmp_path / "two"))
        self.check(tmp_path / "one", tmp_path)
        self.check(tmp_path / "two", tmp_path, split="test")

    def test_folder_of_files(self, tmp_path):
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        self.check(folder, tmp_path)

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("missing.jsonl", None, "no such file or folder"),
            ("missing/folder/deep", None, "no such file or folder"),
            ("pairs.txt", "text", "unknown file type '.txt'"),
            ("pairs.csv", "question,answer\na,b\n", "found question, answer"),
            ("pairs.jsonl", '{"chosen": "a"}\n', "needs columns chosen and rejected"),
            ("pairs.jsonl", '{"prompt": "a", "chosen": 3, "rejected": 4}\n', "column chosen must hold text"),
            ("pairs.json", "{broken", "--dataset"),
        ],
    )
    def test_mistakes_are_named_in_one_line(self, name, content, message, tmp_path):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(demo_setup.DemoError) as raised:
            demo_setup.load_preferences(str(path), "train", str(tmp_path / "cache"))
        assert message in str(raised.value) and str(path) in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_messages_and_implicit_prompts(self, tmp_path):
        path = tmp_path / "chat.jsonl"
        turn = {"role": "user", "content": "Hello?"}
        row = {side: [turn, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
        path.write_text(json.dumps(row) + "\n")
        loaded = demo_setup.load_preferences(str(path), "train", str(tmp_path / "cache"))
        assert demo_setup.is_conversational(loaded)
        assert sorted(demo_setup.texts_of(loaded)) == ["Hello?", "Hello?", "chosen", "rejected"]


class SlowIdentity(torch.autograd.Function):
    """Identity whose backward takes 50 ms."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        time.sleep(0.05)
        return dx


class TestMeasuring:
    def test_head_timer_counts_every_node_inside_and_none_outside(self):
        class Head:
            @staticmethod
            def apply(hidden, weight, bias):
                time.sleep(0.05)
                return SlowIdentity.apply(SlowIdentity.apply(hidden) * weight.sum()), None

        timer = demo_meters.HeadTimer(Head)
        hidden, weight = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
        before = SlowIdentity.apply(hidden)
        SlowIdentity.apply(timer.apply(before, weight, None)[0]).sum().backward()
        assert timer.calls == 1
        assert 0.15 <= timer.seconds < 0.2
        assert hidden.grad.tolist() == [2, 2, 2] and weight.grad.tolist() == [3, 3]

    def test_head_timer_without_gradients(self):
        timer = demo_meters.HeadTimer(SlowIdentity)
        with torch.no_grad():
            timer.apply(torch.ones(3, requires_grad=True))
        assert timer.calls == 1 and timer.seconds < 0.05

    @pytest.mark.skipif(torch.cuda.is_available(), reason="measures GPU memory there")
    def test_memory_peak_sees_what_is_freed_again(self):
        pytest.importorskip("psutil")
        with demo_meters.MemoryPeak() as memory:
            block = torch.ones(256 * 2**20, dtype=torch.uint8)
            time.sleep(0.2)  # as long as something that holds memory runs: the peak is sampled
            del block
        assert 240 * 2**20 < memory.bytes < 320 * 2**20


class TestCommandLine:
    def test_missing_packages(self, monkeypatch, capsys):
        monkeypatch.setattr(demo, "NEEDED", ("trl", "no_such_package"))
        assert demo.main([]) == 2
        message = capsys.readouterr().err
        assert "no_such_package" in message and "pip install 'fastdpo[demo]'" in message

    @pytest.mark.parametrize("arguments", [["--steps", "0"], ["--batch-size", "0"], ["--hidden-size", "100"]])
    def test_bad_numbers(self, arguments, capsys):
        assert demo.main(arguments) == 2
        assert re.fullmatch(rf"error: {arguments[0]} must .*not {arguments[1]}\n", capsys.readouterr().err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole demo, two steps with a tiny model."""
    for package in demo.NEEDED:
        pytest.importorskip(package)
    output = tmp_path_factory.mktemp("demo")
    tiny = "--steps 2 --batch-size 4 --warmup-steps 3 --hidden-size 64 --layers 1 --vocab-size 4096"
    done = run_module("fastdpo.demo", *tiny.split(), "--backward", "exact", "--output", output)
    assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in output.glob("work/*.log"))
    return output, done


class TestWholeDemo:
    def test_prints_one_line_per_phase_and_the_table(self, finished):
        _, done = finished
        lines = done.stdout.strip().splitlines()
        assert done.stderr == ""
        assert [line.split(":")[0] for line in lines[:3]] == list(demo.PHASES.values())
        for label in (*demo.METRICS, "head and loss", "training", "peak memory"):
            assert any(label in line for line in lines[3:]), label
        assert "curves.png" in lines[-1] and "metrics.json" in lines[-1]

    def test_metrics(self, finished):
        output, _ = finished
        recorded = json.loads((output / "metrics.json").read_text())
        assert recorded["settings"]["backward"] == "exact" and recorded["settings"]["steps"] == 2
        for run in recorded["runs"].values():
            assert [step["step"] for step in run["steps"]] == [1, 2]
            assert set(demo.METRICS) < set(run["steps"][0])
            assert run["steps"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
            assert 0 < run["head_seconds"] < run["seconds"]
            assert sum(run["head_seconds_per_step"]) == pytest.approx(run["head_seconds"])
            assert run["peak_memory_bytes"] > 0
        assert recorded["runs"]["trl"]["steps"][1]["rewards/margins"] != 0
        assert recorded["runs"]["fastdpo"]["engine"] != "TRL" == recorded["runs"]["trl"]["engine"]
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert recorded["summary"][name]["largest_difference"] < 1e-4

    def test_curves(self, finished):
        content = (finished[0] / "curves.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000

    def test_model_and_dataset_from_disk(self, finished, tmp_path):
        """The demo's own model and a CSV file through --model and --dataset."""
        data = tmp_path / "pairs.csv"
        data.write_text("prompt,chosen,rejected\n" + "".join(f"What is {i}?,It is {i}.,No.\n" for i in range(4)))
        model = finished[0] / "work" / "model"
        arguments = [
            "--model",
            model,
            "--dataset",
            data,
            "--steps",
            1,
            "--batch-size",
            2,
            "--output",
            tmp_path,
        ]
        settings = demo.parse_arguments(list(map(str, arguments)))
        assert settings.learning_rate == 1e-6
        assert demo.prepare(settings, tmp_path) == {"pairs": 2}
        assert demo.train(settings, tmp_path, "trl")["steps"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)

    @pytest.mark.parametrize("rows, message", [(1, "less than one batch"), (2, "rejected of the dataset is empty")])
    def test_unusable_datasets(self, finished, rows, message, tmp_path):
        data = tmp_path / "pairs.csv"
        data.write_text("prompt,chosen,rejected\n" + "Why?,So.,\n" * rows)
        arguments = ["--dataset", data, "--batch-size", 2, "--output", tmp_path]
        with pytest.raises(demo_setup.DemoError, match=message):
            demo.prepare(demo.parse_arguments(list(map(str, arguments))), tmp_path)

    def test_unusable_models(self, finished, tmp_path):
        settings = demo.parse_arguments(["--model", "./no/such/model", "--output", str(tmp_path)])
        with pytest.raises(demo_setup.DemoError, match=r"--model \./no/such/model: no such folder"):
            demo.prepare(settings, tmp_path)
        settings.model = str(tmp_path)
        with pytest.raises(demo_setup.DemoError, match=re.escape(f"--model {tmp_path}: ")) as raised:
            demo.prepare(settings, tmp_path)
        assert "config.json" in str(raised.value) and "\n" not in str(raised.value)

    def test_a_mistake_costs_one_line(self, tmp_path):
        pytest.importorskip("trl")
        done = run_module("fastdpo.demo", "--dataset", "no/such/file.jsonl", "--output", tmp_path)
        assert done.returncode == 2
        assert done.stderr == "error: --dataset no/such/file.jsonl: no such file or folder\n"

    def test_unusable_output_folder(self, tmp_path):
        pytest.importorskip("rich")
        (tmp_path / "file").write_text("")
        settings = demo.parse_arguments(["--output", str(tmp_path / "file" / "folder")])
        with pytest.raises(demo_setup.DemoError, match=r"--output .*: Not a directory"):
            demo.run_demo(settings, [])


class TestReport:
    def test_any_nested_dict(self):
        tree = {"a": {"yes": True, "missing": None, "list": ["x", "y"], "deep": {"number": 3}}, "empty": {}}
        assert list(report.lines(tree)) == [
            "a",
            "  yes      yes",
            "  missing  -",
            "  list     x, y",
            "  deep",
            "    number  3",
            "empty",
        ]

    def test_names_versions_engines_and_operations(self, capsys):
        report.main()
        text = capsys.readouterr().out
        for word in ("machine", "GPUs", torch.__version__, "native", "engines", "operations", "linear_logps"):
            assert word in text
