"""The peers whose own tests run against fastdpo, and which of their cases need not pass there, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODES = ("plain", "wide", "routed")


@dataclass(frozen=True)
class Sdist:
    """Tests that came with a package on PyPI; the package itself is the installed one, of the same version."""

    package: str
    version: str


@dataclass(frozen=True)
class Repository:
    """Tests of a tag or commit, and the package beside them, imported from there."""

    url: str
    revision: str
    packages: str = "."  # the folder to import from


@dataclass(frozen=True)
class Edit:
    """In the copy in the cache, what a test file says; it has to say it exactly `times` times."""

    file: str
    old: str
    new: str
    times: int = 1


@dataclass(frozen=True)
class Known:
    """Cases, by a regular expression of the whole node id, that need not pass with fastdpo. One that passes is no
    longer known, unless it is `chance`."""

    cases: str
    reason: str
    modes: Sequence[str] = MODES
    chance: bool = False


@dataclass(frozen=True)
class Peer:
    module: str  # in_place/
    source: Sdist | Repository
    tests: Sequence[str]
    passes: int  # at least so many cases pass with fastdpo in "plain", or something is not run any more
    edits: Sequence[Edit] = ()
    wide_edits: Sequence[Edit] = ()  # for vocabularies that no parameter names
    known: Sequence[Known] = ()
    select: str = ""  # pytest's -k
    modes: Sequence[str] = MODES
    environment: str = ""  # of tests/integrations/environments.py; by default the running one


LIGER = "test/chunked_loss"
CCE = "tests/test_cce_"
TRL = Repository("https://github.com/huggingface/trl", "v1.9.0")
TORCHTUNE = "tests/torchtune"
CHUNKED, KD = "modules/loss/test_ce_chunked_output_loss", "modules/loss/test_kd_losses"
_TRL = "tests/test_utils.py"

PEERS = {
    "liger": Peer(
        "liger",
        Sdist("liger-kernel", "0.8.5"),
        tuple(f"{LIGER}/test_{name}_loss.py" for name in ("dpo", "cpo", "simpo", "orpo", "kto", "jsd")),
        passes=640,
        known=(
            Known(
                r".*test_jsd_hard_loss_computed_only_when_used\[.*-True\]",
                "it counts calls of torch's nll_loss, which fastdpo has no use for",
            ),
        ),
    ),
    "cce": Peer(
        "cce",
        Sdist("cut-cross-entropy", "25.1.1"),
        tuple(f"{CCE}{name}.py" for name in ("loss_backward", "loss_forward", "lse")),
        passes=450,
        edits=tuple(
            edit
            for name, times in (("loss_backward", 4), ("loss_forward", 4), ("lse", 2))
            for edit in (
                Edit(f"{CCE}{name}.py", "not torch.cuda.is_available()", "False", 2),
                Edit(f"{CCE}{name}.py", 'device="cuda"', 'device="cpu"', times),
                Edit(f"{CCE}{name}.py", "torch.cuda.manual_seed(0)", "torch.manual_seed(0)"),
            )
        ),
    ),
    "trl": Peer(
        "trl",
        TRL,
        (_TRL,),
        passes=94,
        edits=(Edit(_TRL, "@require_torch_accelerator\nclass TestPatchChunkedLMHead", "class TestPatchChunkedLMHead"),),
        wide_edits=(
            Edit(_TRL, "N, H, V = 64, 32, 128", "N, H, V = 64, 32, 4224"),
            Edit(_TRL, "H, V = 32, 128", "H, V = 32, 4224"),
            Edit(_TRL, "vocab_size = 1024", "vocab_size = 5120", 2),
        ),
        known=(
            Known(
                r".*TestSelectiveLogSoftmax.*dtype[23]\]",
                "they ask for the bits of torch's log_softmax in the half type, off by a unit in the last place in 19% "
                "of its values; fastdpo's, rounded, are fp64's, rounded",
            ),
            Known(
                r".*TestEntropyFromLogits.*\[dtype[23]-.*",
                "they compare to 1e-5 with a sum of products in the half type, off by up to 1.4e-2 nats in fp16 and "
                "1.1e-1 in bf16; fastdpo's by 3e-7",
                chance=True,
            ),
            Known(
                r".*TestChunkedLogProbFunction::test_backward_bfloat16.*", "their reference rounds the logits to bf16"
            ),
        ),
        select="SelectiveLogSoftmax or EntropyFromLogits or ChunkedLogProb or ChunkedLMHead",
    ),
    "trl-trainers": Peer(
        "trl",
        TRL,
        tuple(
            f"tests/{name}_trainer.py"
            for name in ("test_dpo", "test_kto", "experimental/test_cpo", "experimental/test_orpo")
        ),
        passes=1,
        select="Trainer and not vlm and not vision",
        modes=("plain",),
    ),
    "torchtune": Peer(
        "torchtune",
        Repository("https://github.com/pytorch/torchtune", "v0.6.1"),
        tuple(f"{TORCHTUNE}/{x}.py" for x in ("rlhf/loss/test_dpo_loss", CHUNKED, KD)),
        passes=10,
        # It fetches checkpoints of other tests
        edits=(Edit("tests/conftest.py", "def pytest_configure(config):", "def not_pytest_configure(config):"),),
        wide_edits=(
            Edit(f"{TORCHTUNE}/{CHUNKED}.py", "vocab_size = 50\n", "vocab_size = 4146\n"),
            Edit(f"{TORCHTUNE}/{KD}.py", "vocab_size = 50\n", "vocab_size = 1074\n", 3),
        ),
        environment="torchtune",
    ),
}
