"""What the demo trains: preference pairs, tokenizer, model and TRL's trainer, from files, a hub or built here."""

import itertools
from pathlib import Path

import torch

DATA_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
CHAT_TEMPLATE = (  # for conversational data and the built-in tokenizer, which has no template of its own
    "{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class DemoError(Exception):
    """A mistake in the arguments or the data: shown as one line, without a traceback."""


def reason(error):
    """The first line of what an exception has to say."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__:  # says only that there was one
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def show_step(step, num_steps):
    """One progress line; the parent turns it into its bar."""
    print(f"step {step}/{num_steps}", flush=True)


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


def load_pretrained(kind, source, **options):
    """What transformers' class `kind` makes of a folder or hub id."""
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(source, **options)
    except Exception as error:
        what = kind.removeprefix("Auto").removesuffix("ForCausalLM").lower()
        raise DemoError(f"--model {source}: no {what}: {reason(error)}") from error


def make_trainer(settings, folder, model, reference, tokenizer, pairs):
    """TRL's DPOTrainer on `pairs`; everything not named here is TRL's default."""
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
