"""`python -m fastdpo.demo`: one DPO training done twice, by TRL as it is and by TRL with fastdpo swapped in.

Three child processes do the work, one after the other: `prepare` (preference pairs and, without --model, a
small warmed-up Llama), `trl` and `fastdpo`. Both runs see the same weights, seed and batches; a process for
each keeps the memory figures apart. The parent shows progress, compares the runs and draws their curves.
"""

import argparse
import copy
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

import fastdpo

from . import setup
from .meters import HeadTimer, MemoryPeak
from .setup import DemoError

DEMO_DATA = Path(__file__).parent / "data" / "preferences.jsonl"
NEEDED = ("trl", "transformers", "datasets", "matplotlib", "rich")
PHASES = {"prepare": "data and model", "trl": "DPO with TRL", "fastdpo": "DPO with TRL and fastdpo"}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
LAST_STEPS = 5  # the table shows the mean of this many steps at the end of a run


def parse_arguments(argv):
    parser = argparse.ArgumentParser("python -m fastdpo.demo", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", help="folder or Hugging Face id of a causal language model (default: a small Llama)")
    add("--dataset", help="preference pairs: .jsonl, .json, .csv or .parquet file, dataset folder, or hub id")
    add("--split", default="train", help="split of the dataset (default: train)")
    add("--steps", type=int, default=48, help="DPO steps of each run (default: 48)")
    add("--batch-size", type=int, default=16, help="preference pairs per step (default: 16)")
    add("--max-length", type=int, default=256, help="longest sequence in tokens (default: 256)")
    add("--learning-rate", type=float, help="default: 2e-4 for the small Llama, TRL's 1e-6 with --model")
    add("--beta", type=float, default=0.1, help="DPO's beta (default: 0.1)")
    add("--backward", choices=("routed", "exact"), default="routed", help="default: routed")
    add("--precision", choices=("fp32", "bf16"), help="default: bf16 on GPUs that have it, else fp32")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("demo_output"), help="results (default: demo_output)")
    small = parser.add_argument_group("the small Llama, without --model")
    small.add_argument("--hidden-size", type=int, default=256)
    small.add_argument("--layers", type=int, default=2)
    small.add_argument("--vocab-size", type=int, default=32768)
    small.add_argument("--warmup-steps", type=int, default=100, help="supervised steps (default: 100)")
    add("--run", choices=tuple(PHASES), help=argparse.SUPPRESS)
    settings = parser.parse_args(argv)
    for name in ("steps", "batch_size", "max_length", "layers"):
        if getattr(settings, name) < 1:
            raise DemoError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}")
    if settings.hidden_size < 64 or settings.hidden_size % 64:
        raise DemoError(f"--hidden-size must be a multiple of 64, not {settings.hidden_size}")
    if settings.learning_rate is None:
        settings.learning_rate = 2e-4 if settings.model is None else 1e-6
    return settings


def prepare(settings, work):
    """Writes `pairs/`, the data of both runs, and without --model `model/`, the weights both start from."""
    import datasets

    datasets.disable_caching()
    dataset = setup.load_preferences(settings.dataset or str(DEMO_DATA), settings.split, str(work / "cache"))
    if len(dataset) < settings.batch_size:
        raise DemoError(f"the dataset has {len(dataset)} pairs, less than one batch of {settings.batch_size}")
    num_pairs = min(len(dataset), settings.steps * settings.batch_size)
    pairs = dataset.shuffle(seed=settings.seed).select(range(num_pairs))
    for column in pairs.column_names:
        missing = sum(not value for value in pairs[column])
        if missing:
            raise DemoError(f"column {column} of the dataset is empty in {missing} of {num_pairs} pairs")
    pairs.save_to_disk(str(work / "pairs"))
    info = {"pairs": num_pairs}

    if settings.model is not None:
        if setup.looks_like_path(settings.model) and not Path(settings.model).expanduser().is_dir():
            raise DemoError(f"--model {settings.model}: no such folder")
        setup.load_pretrained("AutoConfig", settings.model)
        tokenizer = setup.load_pretrained("AutoTokenizer", settings.model)
        if setup.is_conversational(pairs) and not tokenizer.chat_template:
            raise DemoError(f"--model {settings.model}: no chat template, but the dataset has messages")
        return info

    tokenizer = setup.build_tokenizer(setup.texts_of(pairs), settings.vocab_size)
    if setup.is_conversational(pairs):
        tokenizer.chat_template = setup.CHAT_TEMPLATE
    model = setup.build_model(settings, tokenizer)
    trainer = setup.make_trainer(settings, work / "warmup", model, copy.deepcopy(model), tokenizer, pairs)
    losses = setup.warm_up(trainer, settings.warmup_steps)
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    return info | {
        "tokens": len(tokenizer),
        "vocab_size": settings.vocab_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "warmup_losses": losses,
    }


def train(settings, work, engine):
    """One DPO run from the common weights, measured."""
    import datasets
    import transformers
    import trl
    import trl.trainer.utils as trl_utils

    if not hasattr(trl_utils, "_ChunkedLogProbFunction"):
        raise DemoError(f"needs trl>=1.15, found {trl.__version__}")
    datasets.disable_caching()
    source = settings.model or str(work / "model")
    pairs = datasets.load_from_disk(str(work / "pairs"))
    model, reference = (setup.load_pretrained("AutoModelForCausalLM", source, dtype=torch.float32) for _ in range(2))
    tokenizer = setup.load_pretrained("AutoTokenizer", source)
    trainer = setup.make_trainer(settings, work / engine, model, reference, tokenizer, pairs)

    if engine == "fastdpo" and not fastdpo.patch_trl(backward=settings.backward):
        raise DemoError("another library has replaced TRL's log-prob function; fastdpo leaves it alone")
    original = trl_utils._ChunkedLogProbFunction
    timer = HeadTimer(original)
    head_seconds = []

    class StepEnd(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            head_seconds.append(timer.seconds - sum(head_seconds))
            setup.show_step(state.global_step, state.max_steps)

    trainer.add_callback(StepEnd())
    trl_utils._ChunkedLogProbFunction = timer
    try:
        with MemoryPeak() as memory:
            start = time.perf_counter()
            trainer.train()
            seconds = HeadTimer.now() - start
    finally:
        trl_utils._ChunkedLogProbFunction = original
        if engine == "fastdpo":
            fastdpo.unpatch_trl()
    if timer.calls < 2 * settings.steps:
        raise RuntimeError(f"TRL called its log-prob function {timer.calls} times in {settings.steps} steps")

    device = trainer.args.device.type
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": [{"step": entry["step"]} | {name: entry[name] for name in METRICS} for entry in steps],
        "head_seconds_per_step": head_seconds,
        "head_seconds": timer.seconds,
        "head_rows_per_call": timer.rows / timer.calls,
        "seconds": seconds,
        "peak_memory_bytes": memory.bytes,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "engine": "TRL" if engine == "trl" else fastdpo.backends()["operations"]["linear_logps"][device],
        "threads": torch.get_num_threads(),
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "versions": {module.__name__: module.__version__ for module in (torch, trl, transformers)},
    }


def run_phase(settings):
    """The body of a child process: does one phase and leaves its result as JSON beside the log."""
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    work = settings.output / "work"
    result = prepare(settings, work) if settings.run == "prepare" else train(settings, work, settings.run)
    (work / f"{settings.run}.json").write_text(json.dumps(result))


def start_phase(phase, argv, work, progress):
    """Runs one phase in a child process behind a progress bar. Returns its result and the seconds it took."""
    start = time.perf_counter()
    task = progress.add_task(PHASES[phase], total=None)
    log_path = work / f"{phase}.log"
    command = [sys.executable, "-m", "fastdpo.demo", *argv, "--run", phase]
    with (
        open(log_path, "w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace") as child,
    ):
        try:
            for line in child.stdout:
                if match := re.fullmatch(r"step (\d+)/(\d+)\n", line):
                    progress.update(task, completed=int(match[1]), total=int(match[2]))
                else:
                    log.write(line)
        except BaseException:
            child.kill()
            raise
    progress.remove_task(task)
    if child.returncode != 0:
        lines = log_path.read_text(errors="replace").strip().split("\n")
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise DemoError(errors[-1] if errors else f"{PHASES[phase]} failed: {lines[-1]} (all of it: {log_path})")
    return json.loads((work / f"{phase}.json").read_text()), time.perf_counter() - start


def compare(runs):
    """Per metric: the mean over the last steps of each run, and the largest difference over all steps."""
    summary = {}
    for name in METRICS:
        curves = {engine: [step[name] for step in run["steps"]] for engine, run in runs.items()}
        summary[name] = {engine: statistics.fmean(curve[-LAST_STEPS:]) for engine, curve in curves.items()}
        summary[name]["largest_difference"] = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    return summary


def result_table(runs, summary):
    from rich.table import Table

    table = Table(title=f"mean of the last {min(LAST_STEPS, len(runs['trl']['steps']))} steps, and costs")
    table.add_column("")
    for column in ("TRL", "with fastdpo", "largest difference"):
        table.add_column(column, justify="right")
    for name, row in summary.items():
        table.add_row(name, f"{row['trl']:.4f}", f"{row['fastdpo']:.4f}", f"{row['largest_difference']:.2g}")
    table.add_section()
    for label, value, unit in (
        ("head and loss, total", lambda run: run["head_seconds"], "s"),
        ("head and loss, per step", lambda run: 1e3 * statistics.median(run["head_seconds_per_step"]), "ms"),
        ("rows in head, per step", lambda run: run["head_rows_per_call"], ""),
        ("training, total", lambda run: run["seconds"], "s"),
        ("peak memory of training", lambda run: run["peak_memory_bytes"] / 2**20, "MiB"),
    ):
        trl, ours = value(runs["trl"]), value(runs["fastdpo"])
        digits = 1 if unit == "s" else 0
        ratio = f"{trl / ours:.2f}x less" if ours < trl else f"{ours / max(trl, 1e-9):.2f}x more"
        if not unit and trl > ours:
            table.caption = "off GPUs, TRL's head scores prompts and padding too; fastdpo drops them"
        table.add_row(label, f"{trl:.{digits}f} {unit}".strip(), f"{ours:.{digits}f} {unit}".strip(), ratio)
    return table


def draw(runs, path):
    """Both runs' curves, and the time each step spent in the head, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    styles = {"trl": dict(color="0.65", linewidth=4, label="TRL")}
    styles["fastdpo"] = dict(color="C3", linewidth=1.3, label="TRL with fastdpo")
    for engine, run in runs.items():
        numbers = [step["step"] for step in run["steps"]]
        for axis, name in zip(axes.flat, METRICS):
            axis.plot(numbers, [step[name] for step in run["steps"]], **styles[engine])
            axis.set_title(name)
        axes[1, 2].plot(numbers, run["head_seconds_per_step"], **styles[engine])
    axes[1, 2].set(title="seconds in head and loss", ylim=(0, None))
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def phase_line(phase, result, seconds):
    """What is said about a phase when it is done."""
    if phase != "prepare":
        details = f"{len(result['steps'])} steps on {result['device']}, {result['precision']}"
        if phase == "fastdpo":
            details += f", engine: {result['engine']}"
    elif "parameters" in result:
        details = (
            f"{result['pairs']} pairs; Llama of {result['parameters'] / 1e6:.1f}M parameters, "
            f"vocabulary {result['vocab_size']} ({result['tokens']} in use)"
        )
        if result["warmup_losses"]:
            details += ", warm-up loss {:.2f} to {:.2f}".format(*result["warmup_losses"])
    else:
        details = f"{result['pairs']} pairs"
    return f"{PHASES[phase]}: {details} ({seconds:.0f} s)"


def run_demo(settings, argv):
    """The parent process: all phases, then table, curves and JSON."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    start = time.perf_counter()
    console = Console(highlight=False)
    work = settings.output / "work"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output {settings.output}: {error.strerror}") from error
    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for phase in PHASES:
            results[phase], seconds = start_phase(phase, argv, work, progress)
            progress.print(phase_line(phase, results[phase], seconds), soft_wrap=True)

    runs = {engine: results[engine] for engine in ("trl", "fastdpo")}
    summary = compare(runs)
    curves, metrics = settings.output / "curves.png", settings.output / "metrics.json"
    draw(runs, curves)
    recorded = {
        "settings": {name: value for name, value in vars(settings).items() if name not in ("run", "output")},
        "machine": {"system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "data_and_model": results["prepare"],
        "summary": summary,
        "runs": runs,
    }
    metrics.write_text(json.dumps(recorded, indent=1) + "\n")
    console.print(result_table(runs, summary))
    seconds = time.perf_counter() - start
    console.print(f"{curves}   {metrics}   {seconds:.0f} s in all", soft_wrap=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        settings = parse_arguments(argv)
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise DemoError(f"needs {', '.join(missing)}: pip install 'fastdpo[demo]'")
        if settings.run:
            run_phase(settings)
        else:
            run_demo(settings, argv)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
