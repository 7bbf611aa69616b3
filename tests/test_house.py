"""The plan of the house: no circle among imports, a test file per module, files that read in one sitting."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastdpo"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MOST_LINES = 400
ONE_PLACE = ("structs.h",)  # longer: that it is one place is worth more


def imported(name: str) -> set[str]:
    """The modules of ours that one needs to be imported itself: what stands inside of functions comes later."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package if node.level else ""
            base = ".".join(filter(None, (parent, node.module)))
            names = {f"{base}.{alias.name}" for alias in node.names}
            found.update(names & MODULES.keys())
            if base in MODULES and not names <= MODULES.keys():
                found.add(base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found - {name}


def test_no_circle_among_imports():
    graph = {name: imported(name) for name in MODULES}
    assert "fastdpo.tensors" in graph["fastdpo.head"]  # it sees what there is
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def test_every_module_has_the_test_file_of_its_name():
    missing = []
    for name, path in MODULES.items():
        if path.name in ("__init__.py", "_version.py"):
            continue
        folder = ROOT / "tests" / path.relative_to(PACKAGE).parent
        if not (folder / f"test_{path.stem.strip('_')}.py").exists():
            missing.append(name)
    assert not missing, f"modules without a test file of their name: {', '.join(missing)}"


def test_every_test_that_the_matrix_names_exists():
    tests = ROOT / "tests"
    named = re.findall(r"`(\w+)::(\w+)`", (tests / "README.md").read_text())
    files = {path.stem.removeprefix("test_"): "" for path in tests.rglob("test_*.py")}
    for path in tests.rglob("test_*.py"):  # several folders have files of one name
        files[path.stem.removeprefix("test_")] += path.read_text()
    missing = [f"{file}::{name}" for file, name in named if f"def test_{name}(" not in files.get(file, "")]
    assert len(named) > 100 and not missing, missing


@pytest.mark.parametrize("folder", ["fastdpo", "csrc", "benchmarks", "tools"])
def test_every_file_reads_in_one_sitting(folder):
    sources = [p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".h", ".cpp", ".cu")]
    assert sources
    lines = {p.name: len(p.read_text().splitlines()) for p in sources if p.name not in ONE_PLACE}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not long, f"files of more than {MOST_LINES} lines: {long}"


def test_the_wheel_has_every_package_and_every_file_that_the_code_reads():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert packages == set(listed["packages"])
    data = {path for pattern in listed["package-data"]["fastdpo"] for path in PACKAGE.glob(pattern)}
    kept = {path for path in PACKAGE.rglob("*.json*") if path.name != "_build.json"}
    assert kept <= data
