"""What SECURITY.md says of the package: data stays data."""

from __future__ import annotations

import ast
from pathlib import Path

import fastdpo

PACKAGE = Path(fastdpo.__file__).parent
REPORT = PACKAGE.parent / "SECURITY.md"
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "execfile", "system", "popen", "check_output", "spawn", "execv"}
READS_OBJECTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "ctypes", "cffi"}
REACHES_OUT = {
    "socket",
    "urllib",
    "http",
    "requests",
    "httpx",
    "ftplib",
    "smtplib",
    "aiohttp",
    "huggingface_hub",
    "wget",
}
# The demo starts its two trainings, as processes of their own, with a list of arguments.
STARTS_PROCESSES = {"demo/comparison.py"}


def trees():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_reads_objects_or_reaches_out():
    found = {name: set(imported(tree)) for name, tree in trees()}
    assert len(found) > 50 and all("torch" in found[name] for name in ("logps.py", "head.py"))
    for name, modules in found.items():
        assert not modules & (READS_OBJECTS | REACHES_OUT), name
        assert "subprocess" not in modules or name in STARTS_PROCESSES, name


def test_no_text_is_run():
    for name, tree in trees():
        for function, node in calls(tree):
            owner, _, last = function.rpartition(".")
            # torch.compile and a module's .eval() take no text
            if owner in ("", "os", "subprocess", "builtins"):
                assert last not in RUNS_TEXT, f"{name}: {ast.unparse(node)[:80]}"
            assert function not in ("torch.load", "torch.hub.load", "numpy.load"), f"{name}: {ast.unparse(node)[:80]}"
            for keyword in node.keywords:
                assert keyword.arg not in ("shell", "trust_remote_code", "allow_pickle"), f"{name}: {function}"


def test_the_report_says_where_to_look():
    assert "tests/test_security.py" in REPORT.read_text() and "csrc/arguments.h" in REPORT.read_text()
