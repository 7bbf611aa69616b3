"""tools/hub_kernel.py: what it lays out is loaded by Hugging Face's own `kernels`, beside the package and another build
of it, and gives the package's numbers."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdpo
from fastdpo.ops import native
from tools import hub_kernel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    hub_kernel.lay_out(folder, "fastdpo/fastdpo")
    return folder


@pytest.fixture(scope="module")
def kernels():
    return pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed: pip install '.[hub]'")


def problem(dtype=torch.float32):
    hidden = torch.randn(2, 9, 32, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 300, (2, 9))
    labels[0, :2] = -100
    return hidden, torch.randn(300, 32, dtype=dtype, requires_grad=True), labels


def same_numbers(module) -> None:
    """As the package's, within the last bits: they may be of another engine."""
    hidden, weight, labels = problem()
    results = []
    for given in (module, fastdpo):
        logps = given.linear_logps(hidden, weight, labels, backward="exact")
        results.append((logps, *torch.autograd.grad(logps.sum(), (hidden, weight))))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_module_is_imported_with_torch_alone(kernel):
    script = f"""
import importlib, importlib.util, pkgutil, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastdpo", "transformers", "trl", "datasets", "numpy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import torch
spec = importlib.util.spec_from_file_location("some_name", {str(kernel / "build/torch-cpu/__init__.py")!r})
sys.modules["some_name"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for found in pkgutil.walk_packages(module.__path__, "some_name."):
    if ".triton" not in found.name:
        importlib.import_module(found.name)
h, w = torch.randn(3, 8, requires_grad=True), torch.randn(300, 8)
module.linear_dpo_loss(h.view(1, 3, 8).repeat(2, 1, 1), w, torch.zeros(2, 3).long()).loss.backward()
print(h.grad.isfinite().all().item(), module.backends()["native"]["reason"])
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FASTDPO_ENGINE")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True ") and "pip install fastdpo" in done.stdout


def test_a_builds_names_are_its_contents(tmp_path):
    files = {"__init__.py": b"x = 1\n", "ops/x.py": b""}
    first = hub_kernel.variant(tmp_path / "a", files, "cpu")
    assert first == hub_kernel.variant(tmp_path / "b", files, "cpu") and first.isidentifier()
    others = [({**files, "ops/x.py": b"y"}, "cpu"), ({**files, "ops/y.py": b""}, "cpu"), (files, "cuda")]
    identities = {hub_kernel.variant(tmp_path / str(i), *other) for i, other in enumerate(others)}
    assert len(identities) == 3 and first not in identities
    assert (tmp_path / "a" / "metadata.json").read_bytes() == (tmp_path / "b" / "metadata.json").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("match x:\n    case 1: pass\n", "no Python 3.9"),
        ("import numpy\n", "may not import numpy"),
        ("def f():\n    from fastdpo.logps import linear_logps\n", "may not import fastdpo.logps"),
    ],
)
def test_what_their_requirements_forbid_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        hub_kernel.check("x.py", text)
    hub_kernel.check("x.py", "import json, torch.nn\nfrom . import y\n")


def test_only_a_kernels_folder_is_overwritten(tmp_path, kernel):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else"):
        hub_kernel.lay_out(tmp_path, "fastdpo/fastdpo")
    with pytest.raises(ValueError, match="repo_id must be owner/name; got 'fastdpo'"):
        hub_kernel.lay_out(kernel, "fastdpo")
    with pytest.raises(ValueError, match="no wheels of fastdpo"):
        hub_kernel.lay_out(kernel, "fastdpo/fastdpo", tmp_path)
    assert (kernel / "build/torch-cuda/metadata.json").exists()


def test_the_card_says_what_was_measured(kernel):
    card = (kernel / "README.md").read_text()
    readme = (ROOT / "README.md").read_text().partition("<!-- table: summary -->")[2].partition("<!-- end -->")[0]
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert len(rows) > 8 and all(row in card for row in rows)
    assert "On a GPU: nothing yet" in card and "](" not in card.partition("## Measured")[2]


def test_kernels_reads_every_file(kernel, kernels):
    rust = pytest.importorskip("kernels._rust")
    assert len(rust.Build.open(kernel).general.backends) == len(hub_kernel.BACKENDS)
    for folder in (kernel / "build").iterdir():
        metadata = kernels.Metadata.read_from_file(folder / "metadata.json")
        assert metadata.digest.files == rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder).files
        assert f'"{metadata.id}"' in (folder / "_ops.py").read_text()


def test_get_kernel_and_a_second_build_beside_the_package(kernel, kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"fastdpo/fastdpo={kernel}")
    first = kernels.get_kernel("fastdpo/fastdpo", version=0)
    other = {**hub_kernel.sources(), "another.py": b"x = 1\n"}
    hub_kernel.variant(tmp_path / "build" / "torch-cpu", other, "cpu")
    hub_kernel.variant(tmp_path / "build" / "torch-cuda", other, "cuda")
    second = kernels.get_local_kernel(tmp_path)
    names = {sys.modules[f"{module.__name__}._ops"]._OPS_NAME for module in (first, second, fastdpo)}
    assert len(names) == 3 and "fastdpo" in names
    for module in (first, second):
        assert Path(module.logps.__file__).is_relative_to(kernel if module is first else tmp_path)
        assert module.linear_logps is not fastdpo.linear_logps and set(module.__all__) <= {*fastdpo.__all__, "layers"}
        same_numbers(module)
        hidden, weight, labels = problem()
        compiled = torch.compile(module.linear_logps, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(hidden, weight, labels), module.linear_logps(hidden, weight, labels))


def test_old_loaders_find_the_same_module(kernel, kernels):
    module = kernels.get_local_kernel(kernel)
    name = "cuda" if torch.version.cuda else "cpu"
    file = kernel / f"build/torch-{name}/fastdpo/__init__.py"
    namespace = {"__file__": str(file)}
    exec(compile(file.read_text(), file, "exec"), namespace)
    assert namespace["linear_logps"] is module.linear_logps and namespace["__all__"] == module.__all__


def test_kernelize_swaps_the_layers_in(kernel, kernels):
    @kernels.use_kernel_forward_from_hub("LinearLogps")
    class Logps(nn.Module):
        def forward(self, hidden_states, weight, labels, bias=None):
            raise AssertionError("not swapped")

    @kernels.use_kernel_forward_from_hub("CausalLMLoss")
    class Loss(nn.Module):
        def forward(
            self, hidden_states, weight, labels=None, bias=None, num_items_in_batch=None, ignore_index=-100,
            shift_labels=None,
        ):  # fmt: skip
            raise AssertionError("not swapped")

    device = "cuda" if torch.version.cuda else "cpu"
    layers = {"LinearLogps": "LinearLogps", "CausalLMLoss": "LinearCausalLMLoss"}
    mapping = {name: {device: kernels.LocalLayerRepository(kernel, layer_name=layer)} for name, layer in layers.items()}
    model = nn.ModuleList([Logps(), Loss()])
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(model, mode=mode, device=device, use_fallback=False)
    hidden, weight, labels = problem()
    torch.testing.assert_close(model[0](hidden, weight, labels), fastdpo.linear_logps(hidden, weight, labels))
    loss = model[1](hidden, weight, labels)
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels[:, 1:].flatten()))
    loss.backward()
    assert hidden.grad.isfinite().all() and weight.grad.abs().sum() > 0


def test_kernelize_swaps_the_function_in(kernel, kernels):
    @functools.wraps(fastdpo.linear_logps)
    def slow(*args, **options):
        raise AssertionError("not swapped")

    device = "cuda" if torch.version.cuda else "cpu"
    function = kernels.use_kernel_forward_from_hub("linear_logps")(slow)
    assert inspect.signature(type(function).forward).parameters["softcap"].default is None

    @kernels.use_kernelized_func(function)
    class Model(nn.Module):
        def forward(self, *given, **options):
            return function(*given, **options)

    model = Model()
    repository = kernels.LocalFuncRepository(kernel, func_name="linear_logps")
    with kernels.use_kernel_mapping({"linear_logps": {device: repository}}, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device=device, use_fallback=False)
    hidden, weight, labels = problem()
    expected = fastdpo.linear_logps(hidden, weight, labels, softcap=5.0)
    torch.testing.assert_close(model(hidden, weight, labels, softcap=5.0), expected)


def test_with_wheels_the_compiled_kernels_come_along(kernels, tmp_path):
    if native.EXTENSION is None or sys.platform != "linux" or torch.version.cuda:
        pytest.skip("needs the native extension, on Linux, and a torch for the CPU: the loader takes its variant")
    extension = Path(native.EXTENSION.__file__)
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = tmp_path / f"fastdpo-0.1.0-{tag}-{tag}-manylinux_2_34_{os.uname().machine}.whl"
    info = json.dumps({"native": True, "cuda_archs": [], "cuda_ptx": [], "reason": None})
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(extension, f"fastdpo/{extension.name}")
        archive.writestr("fastdpo/_build.json", info)
        archive.writestr("fastdpo/logps.py", "not taken from here")
    hub_kernel.lay_out(tmp_path / "kernel", "fastdpo/fastdpo", tmp_path)
    module = kernels.get_local_kernel(tmp_path / "kernel")
    own = sys.modules[f"{module.__name__}.ops.native"].EXTENSION
    assert Path(own.__file__).parent.name == f"torch-stable-abi26-cpu-{os.uname().machine}-linux"
    assert module.backends()["operations"]["linear_logps"]["cpu"].startswith("cpu ")
    same_numbers(module)
    assert os.uname().machine in (tmp_path / "kernel/README.md").read_text()


def test_wheels_of_different_builds_are_refused(tmp_path):
    for number in (310, 311):
        with zipfile.ZipFile(tmp_path / f"fastdpo-0.1.0-cp{number}-cp{number}-linux_x86_64.whl", "w") as archive:
            archive.writestr(f"fastdpo/_C.cpython-{number}-x86_64-linux-gnu.so", b"")
            archive.writestr("fastdpo/_build.json", f'{{"cuda_archs": [{number}]}}')
    with pytest.raises(ValueError, match=r"different fastdpo/_build\.json"):
        hub_kernel.extensions(tmp_path)
