"""`python -m fastdpo.demo`: one DPO training done twice, by TRL as it is and by TRL with fastdpo swapped in.

Three child processes do the work, one after the other: `prepare` (preference pairs and, without --model, a
small warmed-up Llama), `trl` and `fastdpo`. Both runs see the same weights, seed and batches; a process for
each keeps the memory figures apart. The parent shows progress, compares the runs and draws their curves.
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

DEMO_DATA = Path(__file__).parent / "demo_data" / "preferences.jsonl"
DATA_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
NEEDED = ("trl", "transformers", "datasets", "matplotlib", "rich")
PHASES = {"prepare": "data and model", "trl": "DPO with TRL", "fastdpo": "DPO with TRL and fastdpo"}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
LAST_STEPS = 5  # the table shows the mean of this many steps at the end of a run
CHAT_TEMPLATE = (  # for conversational data and the built-in tokenizer, which has no template of its own
    "{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class DemoError(Exception):
    """A mistake in the arguments or the data: shown as one line, without a traceback."""


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


def reason(error):
    """The first line of what an exception has to say."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__:  # says only that there was one
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def looks_like_path(source):
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in DATA_FILES


def load_preferences(source, split="train", cache_dir=None):
    """The dataset at a path (data file, folder of data files, `save_to_disk` folder) or of a hub id, with its
    preference columns only.

    Raises:
        DemoError: nothing is there, it cannot be read, or it has no preference pairs in one of TRL's forms.
    """
    import datasets

    path = Path(source).expanduser()
    name = f"--dataset {source}"
    if path.is_file() and path.suffix not in DATA_FILES:
        raise DemoError(f"{name}: unknown file type {path.suffix!r}; known are {', '.join(DATA_FILES)}")
    if not path.exists() and looks_like_path(source):
        raise DemoError(f"{name}: no such file or folder")
    try:
        if path.is_file():
            kind = DATA_FILES[path.suffix]
            dataset = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=cache_dir)
        elif any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            dataset = datasets.load_from_disk(str(path))
            dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
        elif path.is_dir():
            dataset = datasets.load_dataset(str(path), split=split, cache_dir=cache_dir)
        else:
            dataset = datasets.load_dataset(source, split=split)
    except Exception as error:
        raise DemoError(f"{name}: {reason(error)}") from error

    columns = dataset.column_names
    if not {"chosen", "rejected"} <= set(columns):
        found = ", ".join(columns) or "none"
        raise DemoError(f"{name}: needs columns chosen and rejected (and prompt), found {found}")
    dataset = dataset.select_columns([name for name in ("prompt", "chosen", "rejected") if name in columns])
    for column in dataset.column_names if len(dataset) else ():
        if not isinstance(dataset[0][column], str | list | None):
            kind = type(dataset[0][column]).__name__
            raise DemoError(f"{name}: column {column} must hold text or messages, not {kind}")
    return dataset


def is_conversational(dataset):
    return isinstance(dataset[0]["chosen"], list)


def texts_of(dataset):
    """Every text of a preference dataset, for the tokenizer's training."""
    for row in dataset:
        for value in row.values():
            yield from ([value] if isinstance(value, str) else (message["content"] for message in value))


def build_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer trained on `texts`; it may find fewer tokens than `vocab_size`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")


def build_model(settings, tokenizer):
    """A randomly initialised Llama. Its vocabulary is padded past the tokenizer's, as real models' are."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if settings.vocab_size < len(tokenizer):
        raise DemoError(f"--vocab-size must be at least {len(tokenizer)} here, not {settings.vocab_size}")
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // 64,
        max_position_embeddings=max(1024, settings.max_length),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(config)


def load_tokenizer(source):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise DemoError(f"--model {source}: no tokenizer: {reason(error)}") from error


def load_model(source):
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except Exception as error:
        raise DemoError(f"--model {source}: {reason(error)}") from error


def make_trainer(settings, folder, model, reference, tokenizer, pairs):
    """TRL's DPOTrainer on `pairs`; everything not named here is TRL's default."""
    import torch
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    on_gpu = torch.cuda.is_available()
    precision = settings.precision or ("bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32")
    config = DPOConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        dataloader_drop_last=True,
        dataloader_pin_memory=on_gpu,
        learning_rate=settings.learning_rate,
        beta=settings.beta,
        max_length=settings.max_length,
        # recomputing a model this small saves nothing; a model of the user's keeps TRL's default
        gradient_checkpointing=settings.model is not None,
        bf16=precision == "bf16",
        use_cpu=not on_gpu,
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(model, reference, config, train_dataset=pairs, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def warm_up(trainer, num_steps, learning_rate=2e-3):
    """Supervised steps on chosen and rejected completions alike, so that DPO starts peaked but without a
    preference. Returns the first and the last loss."""
    import torch

    model = trainer.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_steps))
    batches = itertools.chain.from_iterable(trainer.get_train_dataloader() for _ in itertools.count())
    losses = []
    for step, batch in zip(range(num_steps), batches):
        mask = batch["completion_mask"][:, 1:].bool()
        outputs = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        logits = model.lm_head(outputs.last_hidden_state[:, :-1][mask])
        loss = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:][mask])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        show_step(step + 1, num_steps)
    return losses[:1] + losses[-1:]


class HeadTimer:
    """Takes the place of the autograd Function that TRL scores tokens with, and times it from outside.

    The forward is the time of `apply`; the backward is the sum over the graph nodes between its outputs and
    inputs, so that a replacement may consist of any number of them.
    """

    def __init__(self, function):
        self.function = function
        self.calls = 0
        self.rows = 0
        self.seconds = 0.0
        self._started = 0.0

    @staticmethod
    def now():
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def apply(self, *arguments):
        import torch

        start = self.now()
        outputs = self.function.apply(*arguments)
        self.seconds += self.now() - start
        self.calls += 1
        self.rows += arguments[0].shape[0]
        if torch.is_grad_enabled():
            self._watch_backward(outputs, [x for x in arguments if getattr(x, "requires_grad", False)])
        return outputs

    def _watch_backward(self, outputs, inputs):
        import torch

        ends = {torch.autograd.graph.get_gradient_edge(tensor).node for tensor in inputs}
        found, pending = set(), [output.grad_fn for output in outputs if output is not None]
        while pending:
            node = pending.pop()
            if node is not None and node not in ends and node not in found:
                found.add(node)
                pending += [following for following, _ in node.next_functions]
        for node in found:
            node.register_prehook(self._start)
            node.register_hook(self._stop)

    def _start(self, grad_outputs):
        self._started = self.now()

    def _stop(self, grad_inputs, grad_outputs):
        self.seconds += self.now() - self._started


class MemoryPeak:
    """Highest memory above the value on entry: bytes allocated on the GPU, or else resident memory.

    That is sampled every 2 ms; where the system's own high-water mark rose, this exact value counts.
    """

    def __enter__(self):
        import torch

        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        import psutil

        self._resident = lambda: psutil.Process().memory_info().rss
        self._mark_before = self._high_water_mark()
        self.before = self._sampled = self._resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        import torch

        if self.on_gpu:
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self._done.set()
        self._thread.join()
        mark = self._high_water_mark()
        self.bytes = max(self._sampled, mark if mark > self._mark_before else 0) - self.before

    def _sample(self):
        while not self._done.wait(0.002):
            self._sampled = max(self._sampled, self._resident())

    @staticmethod
    def _high_water_mark():
        try:
            import resource
        except ImportError:  # Windows
            return 0
        mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return mark if sys.platform == "darwin" else mark * 1024  # Linux counts KiB


def show_step(step, num_steps):
    """One progress line; the parent turns it into its bar."""
    print(f"step {step}/{num_steps}", flush=True)


def prepare(settings, work):
    """Writes `pairs/`, the data of both runs, and without --model `model/`, the weights both start from."""
    import copy

    import datasets

    datasets.disable_caching()
    dataset = load_preferences(settings.dataset or str(DEMO_DATA), settings.split, str(work / "cache"))
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
        from transformers import AutoConfig

        path = Path(settings.model).expanduser()
        if looks_like_path(settings.model) and not path.is_dir():
            raise DemoError(f"--model {settings.model}: no such folder")
        try:
            AutoConfig.from_pretrained(settings.model)
        except Exception as error:
            raise DemoError(f"--model {settings.model}: {reason(error)}") from error
        tokenizer = load_tokenizer(settings.model)
        if is_conversational(pairs) and not tokenizer.chat_template:
            raise DemoError(f"--model {settings.model}: no chat template, but the dataset has messages")
        return info

    tokenizer = build_tokenizer(texts_of(pairs), settings.vocab_size)
    if is_conversational(pairs):
        tokenizer.chat_template = CHAT_TEMPLATE
    model = build_model(settings, tokenizer)
    trainer = make_trainer(settings, work / "warmup", model, copy.deepcopy(model), tokenizer, pairs)
    losses = warm_up(trainer, settings.warmup_steps)
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
    import torch
    import transformers
    import trl
    import trl.trainer.utils as trl_utils

    import fastdpo

    if not hasattr(trl_utils, "_ChunkedLogProbFunction"):
        raise DemoError(f"needs trl>=1.15, found {trl.__version__}")
    datasets.disable_caching()
    source = settings.model or str(work / "model")
    pairs = datasets.load_from_disk(str(work / "pairs"))
    model, reference, tokenizer = load_model(source), load_model(source), load_tokenizer(source)
    trainer = make_trainer(settings, work / engine, model, reference, tokenizer, pairs)

    if engine == "fastdpo" and not fastdpo.patch_trl(backward=settings.backward):
        raise DemoError("another library has replaced TRL's log-prob function; fastdpo leaves it alone")
    original = trl_utils._ChunkedLogProbFunction
    timer = HeadTimer(original)
    head_seconds = []

    class StepEnd(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            head_seconds.append(timer.seconds - sum(head_seconds))
            show_step(state.global_step, state.max_steps)

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
    import warnings

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
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
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


if __name__ == "__main__":
    sys.exit(main())
