"""What `python -m fastdpo` prints."""

from types import SimpleNamespace

import pytest
import torch

from fastdpo.commands import report


def test_any_nested_dict():
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


def test_names_versions_engines_and_operations(capsys):
    assert report.run() == 0
    text = capsys.readouterr().out
    for word in ("machine", "GPUs", torch.__version__, "native", "engines", "operations", "linear_logps"):
        assert word in text


def test_each_gpu_has_its_line(monkeypatch):
    cards = [SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 * 2**30),
             SimpleNamespace(name="A10", major=8, minor=6, total_memory=24 * 2**30)]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    assert report.gpus() == {"GPU 0": "H100, capability 9.0, 80 GiB", "GPU 1": "A10, capability 8.6, 24 GiB"}


@pytest.mark.parametrize("cuda, hip, said", [("13.0", None, "none found"), (None, "7.0", "none found"),
                                             (None, None, "none: this torch is built for the CPU only")])  # fmt: skip
def test_why_there_is_no_gpu(monkeypatch, cuda, hip, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert report.gpus() == said
