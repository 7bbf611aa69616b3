"""python -m tests.mutate fastdpo/routing.py --most 20: do the tests see it when one operator or number is another?

One mutant after the other in a copy of the tree: an operator, a comparison or a constant changed in one place of one
file, and the tests of that file run until the first that fails. What survives is printed: an equivalent, or a test that
is missing; tests/mutations.md tells which. A child is forked of a process that has loaded torch, so that a mutant costs
its tests and no start. C++ is compiled anew for each, with kernels_test.cpp first and the extension where that passes.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("fastdpo", "csrc", "tests", "tools", "setup.py", "pyproject.toml", "README.md")
# A file: the tests that cover it, the quickest first.
HEADS = ("tests/test_logps.py", "tests/test_accumulate.py")
TESTS = {
    "fastdpo/losses.py": ("tests/test_losses.py", "tests/test_preference.py", "tests/test_validation.py"),
    "fastdpo/routing.py": ("tests/test_routing.py",),
    "fastdpo/head.py": ("tests/test_head.py", "tests/test_validation.py", "tests/test_logps.py"),
    "fastdpo/ops/reference.py": ("tests/ops/test_reference.py", "tests/test_logps.py", "tests/test_selective.py"),
    "fastdpo/ops/cpu/": ("tests/ops/cpu", *HEADS),
    "fastdpo/ops/divergence/": ("tests/ops/divergence", "tests/test_divergence.py"),
    "csrc/shared/preference": ("tests/ops/preference", "tests/test_preference.py"),
    "csrc/shared/dual.h": ("tests/ops/preference",),
    "csrc/shared/logits_row.h": ("tests/ops/selective", "tests/test_selective.py"),
    "csrc/shared/divergence.h": ("tests/ops/divergence", "tests/test_divergence.py"),
    "csrc/shared/": ("tests/ops/cpu", "tests/ops/test_native.py", "tests/test_routing.py", *HEADS),
    "csrc/cpu/": ("tests/ops/cpu", "tests/ops/test_native.py", *HEADS),
}
SWAPS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "<": "<=", "<=": "<", ">": ">=", ">=": ">"}
SWAPS |= {"==": "!=", "!=": "==", "&": "|", "|": "&", "<<": ">>", ">>": "<<", "+=": "-=", "-=": "+=", "*=": "/="}
SWAPS |= {
    "and": "or",
    "or": "and",
    "&&": "||",
    "||": "&&",
    "min": "max",
    "max": "min",
    "True": "False",
    "False": "True",
}
SWAPS |= {"true": "false", "false": "true"}
_CPP = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"|^\s*#[^\n]*|(?<= )(?:<<|>>|<=|>=|==|!=|&&|\|\||\+=|-=|\*=|[-+*/%<>&|])(?= )'
    r"|\b(?:min|max|true|false)\b|\b\d+(?:\.\d+)?(?:e-?\d+)?f?\b|\bstatic_assert[^;]*;|\btemplate\s*<[^>]*>",
    re.MULTILINE | re.DOTALL,
)


class Mutant(NamedTuple):
    path: str
    line: int
    start: int  # in the file's text
    end: int
    new: str

    def of(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def shown(self, text: str) -> str:
        first, last = text.rfind("\n", 0, self.start) + 1, text.find("\n", self.end)
        marked = f"{text[first : self.start]}[{text[self.start : self.end]} -> {self.new}]{text[self.end : last]}"
        return f"{self.path}:{self.line}: {marked.strip()}"


def mutants(path: str) -> list[Mutant]:
    text = (ROOT / path).read_text()
    return list(_of_python(path, text) if path.endswith(".py") else _of_cpp(path, text))


def _number(old: str) -> str:
    """Another one, of the same kind."""
    suffix = "f" if old.endswith("f") and not old.startswith("0x") else ""
    old = old.removesuffix("f") if suffix else old
    return (f"{float(old) + 1}" if "." in old or "e" in old else f"{int(old) + 1}") + suffix


def _of_python(path: str, text: str):
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    before = "("
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token in tokens:
        start, end = starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
        unary = token.string in "*-" and (before in "([{,:=" or before == "return")
        annotation = token.string == "|" and re.search(r"\w: [\w\[\], |]+(=|,|$)|->", token.line)  # Tensor | None
        if token.string in SWAPS and not (unary and token.string == "*") and not annotation:
            yield Mutant(path, token.start[0], start, end, SWAPS[token.string])
        elif token.type == tokenize.NUMBER and token.string.isdecimal() | ("." in token.string):
            yield Mutant(path, token.start[0], start, end, _number(token.string))
        before = token.string or before


def _of_cpp(path: str, text: str):
    for found in _CPP.finditer(text):
        old, line = found.group(), text.count("\n", 0, found.start()) + 1
        if old in SWAPS:
            yield Mutant(path, line, *found.span(), SWAPS[old])
        elif old[0].isdigit():
            yield Mutant(path, line, *found.span(), _number(old))


def tests_of(path: str) -> tuple[str, ...]:
    return next(tests for prefix, tests in TESTS.items() if path.startswith(prefix))


def passes(tree: Path, tests: tuple[str, ...], limit_s: float, chosen: str = "") -> str:
    """Nothing where every test passes in the tree; else what happened. `chosen`: of pytest's -k."""
    child = os.fork()
    if child == 0:
        os.setsid()  # without a terminal, which would stop it
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(quiet, stream)
        os.chdir(tree)
        sys.path[:] = [str(tree), str(tree / "tests"), *(x for x in sys.path if x and Path(x) != ROOT)]
        import pytest

        # the interpreter takes minutes, and compilers of other processors as long
        slow = "not triton and not aarch64 and not clang and not compile"
        flags = ["-x", "-q", "-p", "no:cacheprovider", "-k", f"({chosen}) and {slow}" if chosen else slow]
        code = 1
        try:
            code = int(pytest.main([*flags, *tests]))
        finally:
            os._exit(code)
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "" if status == 0 else "a test fails" if os.WIFEXITED(status) else "the process dies"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "it does not end"


def compiles(tree: Path) -> str:
    """Builds the extension in the tree; nothing where that worked."""
    environment = os.environ | {"FASTDPO_REQUIRE_NATIVE": "1", "FASTDPO_CUDA_ARCHS": ""}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else "it does not compile"


def tried(mutant: Mutant, tree: Path, limit_s: float) -> str:
    """Nothing where the mutant survives."""
    place, text = tree / mutant.path, (ROOT / mutant.path).read_text()
    place.write_text(mutant.of(text))
    try:
        if mutant.path.endswith(".py"):
            try:
                compile(place.read_text(), mutant.path, "exec")
            except SyntaxError:
                return "it does not compile"
            return passes(tree, tests_of(mutant.path), limit_s)
        if mutant.path.startswith("csrc/cpu/") or "routing" in mutant.path or "row_formulas" in mutant.path:
            found = passes(tree, ("tests/ops/cpu/test_kernels.py",), limit_s)
            if found:
                return found
        return compiles(tree) or passes(tree, tests_of(mutant.path), limit_s)
    finally:
        place.write_text(text)


def bugs(tree: Path, limit_s: float, only: list[str]) -> int:
    """Puts each of known_bugs.py in, or those in files of such names; how many of them no test sees."""
    from known_bugs import BUGS

    unseen = 0
    for name, path, fixed, broken, tests in BUGS:
        if only and path not in only:
            continue
        text = (ROOT / path).read_text()
        if text.count(fixed) != 1:
            raise SystemExit(f"{path} has {text.count(fixed)} places {fixed!r}: known_bugs.py is out of date")
        (tree / path).write_text(text.replace(fixed, broken))
        found = "" if path.endswith(".py") else compiles(tree)
        files, _, chosen = tests.partition(" -k ")
        found = found or passes(tree, tuple(files.split()), limit_s, chosen)
        (tree / path).write_text(text)
        if not path.endswith(".py"):
            compiles(tree)
        unseen += found not in ("a test fails", "the process dies")
        print(f"{name}: {found or 'no test sees it'} ({tests})", flush=True)
    return unseen


def main() -> int:
    sys.path[:0] = [str(ROOT / "tests")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--bugs", action="store_true", help="those of known_bugs.py instead")
    parser.add_argument("--most", type=int, help="so many of each file, drawn; all of them if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--line", type=int, help="of this line alone")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for a mutant's tests")
    args = parser.parse_args()
    import torch  # before the forks

    torch.set_num_threads(1)
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, tree / name)
        if args.bugs:
            return bugs(tree, args.limit, args.files) > 0
        for path in args.files:
            every = [x for x in mutants(path) if args.line in (None, x.line)]
            drawn = random.Random(f"{args.seed} {path}").sample(every, min(args.most or len(every), len(every)))
            begun = time.monotonic()
            problem = passes(tree, tests_of(path), args.limit)
            if problem:
                raise SystemExit(f"{path}: without a mutation: {problem}")
            print(
                f"{path}: {len(drawn)} of {len(every)} mutants, {time.monotonic() - begun:.0f} s if one survives",
                flush=True,
            )
            killed = invalid = 0
            for mutant in sorted(drawn, key=lambda x: x.start):
                found = tried(mutant, tree, args.limit)
                invalid += found == "it does not compile"
                killed += found not in ("", "it does not compile")
                if not found:
                    survived += 1
                    print(f"    survived: {mutant.shown((ROOT / path).read_text())}", flush=True)
            print(f"    {killed} of {len(drawn) - invalid} killed, {time.monotonic() - begun:.0f} s", flush=True)
            if not path.endswith(".py"):
                compiles(tree)
    return survived > 0


if __name__ == "__main__":
    sys.exit(main())
