"""`python -m fastdpo`."""

import torch

from fastdpo import __main__ as report


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
