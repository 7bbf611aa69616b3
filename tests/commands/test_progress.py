"""What a long command shows of itself."""

import io
import sys

import pytest

from fastdpo.commands.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def walk(monkeypatch, stream) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress(2) as bar:
        bar.step("first")
        bar.step("second")
    return stream.getvalue()


def test_nothing_where_nobody_watches(monkeypatch):
    assert walk(monkeypatch, io.StringIO()) == ""


def test_a_line_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    shown = walk(monkeypatch, Terminal())
    assert "[1/2] first" in shown and "[2/2] second" in shown and shown.endswith("\r\x1b[K")


def test_rich_where_it_is(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert "1/2" in walk(monkeypatch, Terminal())


def test_an_error_passes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyError), progress(1) as bar:
        bar.step("first")
        raise KeyError
