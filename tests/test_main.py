"""`python -m fastdpo`, and its commands' way in."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fastdpo.__main__ import COMMANDS, main, parser_of


def test_without_a_command_it_prints_what_there_is(capsys):
    assert main() == 0
    text = capsys.readouterr().out
    for word in ("machine", "GPUs", torch.__version__, "native", "engines", "operations", "linear_logps"):
        assert word in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"python -m fastdpo {command}" in text
    described = parser_of(command).description
    assert " ".join(described.split())[:60] in text


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{name:10}{what}" in text for name, what in COMMANDS.items())


def test_an_unknown_command_is_named(capsys):
    with pytest.raises(SystemExit) as done:
        main(["docter"])
    assert done.value.code == 2 and "docter" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert main(["explain", "dpo"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("python -m fastdpo explain: loss_type 'dpo' is unknown") and captured.out == ""


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "fastdpo", "explain", "hinge"], capture_output=True, text=True)
    assert done.returncode == 0 and "relu(1 - beta d)" in done.stdout, done.stderr
