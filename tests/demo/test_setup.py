"""The demo's own data, and loading a user's."""

import json
import re
import statistics

import pytest

from fastdpo.demo import comparison as demo
from fastdpo.demo import setup as demo_setup

PAIRS = [json.loads(line) for line in demo.DEMO_DATA.read_text().splitlines()]


ROWS = [{name: f"{name} {index}" for name in ("prompt", "chosen", "rejected")} for index in range(5)]


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
