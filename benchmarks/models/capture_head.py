"""Hidden states, labels and lm_head of any Hugging Face causal LM on any text, for the benchmarks' --head.

python -m benchmarks.models.capture_head --model path-or-hub-id --data text.jsonl --output head.safetensors
                                  [--column text --tokens 4096 --length 512 --sample]

The text of `--column` is tokenized row by row and cut into sequences of `--length` tokens; labels are the tokens that
follow, or with `--sample` drawn from the model itself, as on-policy completions are. Prints the distributions'
statistics. A head with a bias, a softcap or a logit scale is refused: its logits are not hidden @ weight.T.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

ROWS = 512  # whose logits exist at once


def sequences_of(tokenizer, rows, column: str, length: int, count: int) -> Tensor:
    """[count, length + 1] token ids; texts follow each other, with an end token between."""
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row in rows:
        if column not in row:
            raise SystemExit(f"--column {column}: the data has {', '.join(row)}")
        ids += tokenizer(row[column], add_special_tokens=False)["input_ids"] + end
        if len(ids) >= count * (length + 1):
            return torch.tensor(ids[: count * (length + 1)]).view(count, length + 1)
    raise SystemExit(f"--data has {len(ids)} tokens; --tokens and --length need {count * (length + 1)}")


@torch.no_grad()
def capture(model, tokens: Tensor, sample: bool) -> dict[str, Tensor]:
    """{hidden [N, H], weight [V, H], labels [N]} of sequences [B, length + 1]."""
    lm_head = model.get_output_embeddings()
    if lm_head is None or getattr(lm_head, "bias", None) is not None:
        raise SystemExit(f"{type(model).__name__}: needs an lm_head without a bias")
    weight, seen = lm_head.weight.detach(), []
    hook = lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    hidden, labels = [], []
    try:
        for row in tokens:
            seen.clear()
            logits = model(input_ids=row[None, :-1]).logits[0, :, : weight.shape[0]].float()
            rows = seen[0][0]
            mine = rows[:8].float() @ weight.float().T
            off = (mine - logits[:8]).abs().max().item()
            if off > 1e-2 * logits[:8].abs().max().item():
                raise SystemExit(f"{type(model).__name__}: logits differ from hidden @ weight.T by {off:.3g}")
            hidden.append(rows)
            labels.append(torch.multinomial(logits.softmax(-1), 1)[:, 0] if sample else row[1:])
    finally:
        hook.remove()
    return {"hidden": torch.cat(hidden), "weight": weight, "labels": torch.cat(labels)}


@torch.no_grad()
def statistics(head: dict[str, Tensor], tail: float = 2.0**-12, block: int = 128) -> dict[str, float]:
    """What decides a routed backward's speed and error, per token: entropy in nats, p(label), logits and blocks of
    probability above `tail`, and the probability outside of those blocks."""
    sums = torch.zeros(6, dtype=torch.float64)
    entropies = []
    for hidden, labels in zip(head["hidden"].split(ROWS), head["labels"].split(ROWS)):
        logp = (hidden.float() @ head["weight"].float().T).log_softmax(-1)
        p = logp.exp()
        mass = torch.nn.functional.pad(p, (0, -p.shape[1] % block)).view(len(p), -1, block).sum(-1)
        entropies.append(-(p * logp.clamp(min=-200)).sum(-1))
        own = p.gather(1, labels.long()[:, None])[:, 0]
        each = (
            entropies[-1],
            own,
            (own > 0.9),
            (p > tail).sum(-1),
            (mass >= tail).sum(-1),
            mass.where(mass < tail, 0.0).sum(-1),
        )
        sums += torch.stack([x.double().sum() for x in each])
    names = (
        "entropy, mean",
        "p(label), mean",
        "share of p(label) > 0.9",
        "logits above 2^-12",
        "blocks above 2^-12",
        "mass outside",
    )
    found = dict(zip(names, (sums / len(head["labels"])).tolist()))
    return {"entropy, median": torch.cat(entropies).median().item(), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path or hub id of a causal LM with its tokenizer")
    parser.add_argument(
        "--data", required=True, help="json, jsonl, csv or parquet file, or hub id, with a column of text"
    )
    parser.add_argument("--column", default="text")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="rows of hidden states")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--sample", action="store_true", help="labels drawn from the model")
    args = parser.parse_args()
    import datasets
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastdpo.demo.setup import DATA_FILES

    kind = DATA_FILES.get(Path(args.data).suffix)
    found = datasets.load_dataset(kind, data_files=args.data) if kind else datasets.load_dataset(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    count = -(-args.tokens // args.length)
    tokens = sequences_of(tokenizer, found["train"], args.column, args.length, count)
    head = capture(model, tokens, args.sample)
    head = {"weight": head["weight"], **{name: head[name][: args.tokens] for name in ("hidden", "labels")}}
    head["labels"] = head["labels"].int()
    save_file({name: x.contiguous().clone() for name, x in head.items()}, args.output)
    print({name: (*x.shape, str(x.dtype)) for name, x in head.items()})
    print({name: round(value, 4) for name, value in statistics(head).items()})


if __name__ == "__main__":
    main()
