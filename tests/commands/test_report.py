"""What `python -m fastdpo` prints."""

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
