"""`python -m fastdpo explain`."""

import pytest

from fastdpo.__main__ import main
from fastdpo.explanations import explain
from fastdpo.losses import LOSSES


def test_without_a_name_it_lists_every_loss(capsys):
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, loss in LOSSES.items():
        assert any(line.split()[:1] == [name] and line.endswith(loss.formula) for line in lines)


@pytest.mark.parametrize("names", [["simpo"], ["kto", "sft"]])
def test_names_give_their_pages(names, capsys):
    assert main(["explain", *names]) == 0
    assert capsys.readouterr().out == "\n\n".join(str(explain(name)) for name in names) + "\n"
