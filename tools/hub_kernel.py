"""Lays the library out as a kernel of Hugging Face's Hub, which their package `kernels` loads.

python -m tools.hub_kernel [--output hub_kernel] [--repo-id fastdpo/fastdpo] [--wheels DIR]

    build.toml, torch-ext/fastdpo/   what their kernel-builder takes; it adds `_ops.py`
    build/torch-cpu, torch-cuda      what `get_kernel` loads, as kernel-builder lays it out: Python alone
    build/torch-stable-abi26-cpu-*   with --wheels: and the native extension of every wheel for Linux in DIR
    README.md                        the card, with the figures of benchmarks/results

Everything is made from fastdpo/, and nothing of it is kept. What needs more than torch is left out: trainers, models,
the demo. A build's operators have a namespace of its own, made from its content: two builds, and the package, can be
loaded together.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import tables

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastdpo"
NAME = "fastdpo"
VERSION = 0  # of the kernel: theirs for what may still change
LICENSE = "apache-2.0"
BACKENDS = ("cpu", "cuda")
LEFT_OUT = ("commands", "costs", "demo", "integrations", "models", "__init__.py", "__main__.py", "_ops.py", "py.typed")
SUFFIXES = (".py", ".json")
PYTHON = (3, 9)  # whose syntax their requirements ask for
STABLE_ABI = "torch-stable-abi26"  # the extension links no torch: it is the same for all that fastdpo supports
WHEEL = re.compile(r"fastdpo-[\w.+]+-cp\d+-cp\w+-[\w.]*linux[\w.]*_(x86_64|aarch64)\.whl")
NOT_BUILT = "this build for the Hub is Python alone; `pip install fastdpo` compiles the CPU's kernels"

BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["py", "json"]
"""

OPS = '''\
"""The namespace of this build's torch.library operators; generated."""

import torch

_OPS_NAME = "{id}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    """The operator's full name."""
    return f"{{_OPS_NAME}}::{{op_name}}"
'''

# Older releases of their package import the folder of the kernel's name.
FOR_OLD_LOADERS = """\
import importlib.util
import sys
from pathlib import Path

if "{id}" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("{id}", Path(__file__).parents[1] / "__init__.py")
    sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["{id}"])
__all__ = sys.modules["{id}"].__all__
globals().update({{name: getattr(sys.modules["{id}"], name) for name in __all__}})
"""

CARD = """\
---
library_name: kernels
license: {license}
tags: [kernels, dpo, preference-optimization, cross-entropy]
---

# fastdpo {library}

Preference training (DPO and its relatives) and causal-LM losses from the last hidden states and the `lm_head` weight:
log-probs, losses and gradients without the logits. Needs torch 2.6 or newer, on a GPU Triton 3.6 or newer.

```python
from kernels import get_kernel

fastdpo = get_kernel("{repo_id}", version={version})  # trust_remote_code=True unless its publisher is a trusted one
logps = fastdpo.linear_logps(hidden, lm_head.weight, labels)  # fp32, 0 on labels of -100; logps.sum().backward()
out = fastdpo.linear_dpo_loss(hidden, lm_head.weight, labels, ref_logps=ref_logps)
```

Functions: {functions}.

Layers: {layers}, for `use_kernel_mapping` and `kernelize`; they have a backward, and
`torch.compile` sees one operator.

Gradients are unbiased estimates by default (`backward="routed"`), nearer to fp64's than those of bf16 logits;
`backward="exact"` computes everything. The layers take the default.

## What runs where

| variant | `linear_logps`, `linear_dpo_loss`, layers | `selective_log_softmax`, `preference_loss` alone |
|---|---|---|
| `torch-cuda` | Triton kernels, compute capability 8.0 or newer | plain torch |
{arch}| `torch-cpu` | plain torch, several times slower than the package | plain torch |

The package (`pip install fastdpo`) compiles CPU and CUDA kernels for the rest, and patches trainers.

## Measured

**On a GPU: nothing yet.** The kernels are compiled ahead of time for sm_80, sm_90, sm_100 and sm_120, their machine
code is checked, and they are right in Triton's interpreter.

On a CPU, the package with its compiled kernels: one DPO step on the head, time with H = 1024, memory with H = 256, 2048
completion tokens, V = 32768, fp32; tokens that fit with V = 131072; errors against fp64 with bf16 inputs. The best of
each column is bold, whoever it is.
{measured}"""


def sources() -> dict[str, bytes]:
    """By path in the kernel: all of the package but what is left out, and the kernel's own `__init__.py`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*")):
        parts = path.relative_to(PACKAGE).parts
        if path.suffix in SUFFIXES and parts[0] not in (*LEFT_OUT, "_build.json") and "__pycache__" not in parts:
            found["/".join(parts)] = path.read_bytes()
    found["__init__.py"] = public_names().encode()
    for name, text in found.items():
        if name.endswith(".py"):
            check(name, text.decode())
    return found


def public_names() -> str:
    """fastdpo/__init__.py without what is left out, and with the layers."""
    kept = ["from . import layers"]
    names = ["layers"]
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] not in LEFT_OUT:
            kept.append(ast.unparse(node))
            names += [alias.name for alias in node.names]
    listed = "".join(f'    "{name}",\n' for name in sorted(names))
    title = '"""Preference training without logits: fastdpo as a kernel of the Hub; generated."""'
    return f"{title}\n\n" + "\n".join(kept) + f"\n\n__all__ = [\n{listed}]\n"


def check(name: str, text: str) -> None:
    """Raises ValueError for what their requirements forbid: newer syntax, and imports beside torch and the standard
    library; Triton's are its kernels' own."""
    try:
        tree = ast.parse(text, feature_version=PYTHON)
    except SyntaxError as error:
        raise ValueError(f"{name}, line {error.lineno}: no Python {'.'.join(map(str, PYTHON))}: {error.msg}") from error
    for node in executed(tree):
        given = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            given = [node.module]
        for module in given:
            if module.split(".")[0] not in (*sys.stdlib_module_names, "torch", "triton"):
                raise ValueError(f"{name}, line {node.lineno}: a kernel may not import {module}")


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers read."""
    yield tree
    if not (isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(tree):
            yield from executed(child)


def written(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def variant(folder: Path, files: dict[str, bytes], backend: str) -> str:
    """Writes one build; returns its id, which its content makes."""
    content = hashlib.sha256()
    for name, data in sorted(files.items()):
        content.update(f"{name} {len(data)}\n".encode() + data)
    identity = f"_{NAME}_{backend}_{content.hexdigest()[:12]}"
    files = {
        **files,
        "_ops.py": OPS.format(id=identity).encode(),
        f"{NAME}/__init__.py": FOR_OLD_LOADERS.format(id=identity).encode(),
    }
    hashes = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in sorted(files.items())}
    metadata = {
        "name": NAME,
        "id": identity,
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    written(folder, {**files, "metadata.json": json.dumps(metadata, indent=2).encode() + b"\n"})
    return identity


def extensions(wheels: Path) -> dict[str, dict[str, bytes]]:
    """Of the wheels in a folder, by machine: the native extension of each Python, and what it was built with."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(wheels.glob("*.whl")):
        match = WHEEL.fullmatch(path.name)
        if match is None:
            continue
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if re.fullmatch(r"fastdpo/(_C\..*\.so|_build\.json)", name)]
            for name in names:
                data = wheel.read(name)
                if found.setdefault(match[1], {}).setdefault(Path(name).name, data) != data:
                    raise ValueError(f"{path.name} and another wheel in {wheels} have different {name}")
    if not found:
        raise ValueError(f"no wheels of fastdpo for Linux in {wheels}: make wheel")
    return found


def card(repo_id: str, machines: list[str]) -> str:
    public = ast.literal_eval(public_names().partition("__all__ = ")[2])
    functions = [name for name in public if name[0].islower() and name not in ("layers", "__version__")]
    tree = ast.parse((PACKAGE / "layers.py").read_text())
    layers = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    measured = re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", tables.rendered("summary"))  # no links to files elsewhere
    compiled = "the package's compiled CPU kernels"
    arch = "".join(f"| `{STABLE_ABI}-cpu-{machine}-linux` | {compiled} | {compiled} |\n" for machine in machines)
    version = re.search(r'"(.*)"', (PACKAGE / "_version.py").read_text())
    return CARD.format(
        license=LICENSE,
        library=version[1],
        repo_id=repo_id,
        version=VERSION,
        functions=", ".join(f"`{name}`" for name in functions),
        layers=", ".join(f"`layers.{name}`" for name in layers),
        arch=arch,
        measured=measured,
    )


def lay_out(output: Path, repo_id: str, wheels: Path | None = None) -> list[Path]:
    """Writes the whole kernel into a folder that is new, or was made so; returns its variants."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be owner/name; got {repo_id!r}")
    if output.exists() and any(output.iterdir()) and not (output / "build.toml").exists():
        raise ValueError(f"{output} holds something else: no build.toml")
    files = sources()
    machines = {} if wheels is None else extensions(wheels)
    for old in ("build", "torch-ext"):
        shutil.rmtree(output / old, ignore_errors=True)
    options = {"name": NAME, "version": VERSION, "license": LICENSE, "repo_id": repo_id}
    build = BUILD_TOML.format(**options, backends=", ".join(f'"{name}"' for name in BACKENDS)).encode()
    text = card(repo_id, sorted(machines)).encode()
    written(output, {"build.toml": build, "README.md": text, "CARD.md": text})
    python = {"_build.json": json.dumps({"native": False, "reason": NOT_BUILT}).encode()}
    written(output / "torch-ext" / NAME, {**files, **python})
    made = []
    for backend in BACKENDS:
        made.append(output / "build" / f"torch-{backend}")
        variant(made[-1], {**files, **python}, backend)
    for machine, native in machines.items():
        made.append(output / "build" / f"{STABLE_ABI}-cpu-{machine}-linux")
        variant(made[-1], {**files, **native}, "cpu")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("hub_kernel"))
    parser.add_argument("--repo-id", default="fastdpo/fastdpo", help="on the Hub")
    parser.add_argument("--wheels", type=Path, help="whose native extension is added: `make wheel`'s folder")
    args = parser.parse_args()
    for folder in lay_out(args.output, args.repo_id, args.wheels):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{size / 2**20:6.2f} MiB  {folder}")


if __name__ == "__main__":
    main()
