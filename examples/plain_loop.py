"""DPO in a plain PyTorch loop: two patched Hugging Face models, one loss.

python examples/plain_loop.py --model Qwen/Qwen2.5-0.5B --data preferences.jsonl
"""

import argparse

import torch
from datasets import load_dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdpo


def encode(tokenizer, prompt: str, completion: str):
    """(ids, labels): the prompt's labels are -100, so that only the completion counts."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    completion_ids = tokenizer(completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = torch.tensor(prompt_ids + completion_ids)
    return ids, torch.tensor([-100] * len(prompt_ids) + completion_ids)


def collate(tokenizer, rows):
    """The chosen completions first, the rejected after them: [2B, T]."""
    pairs = [encode(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected") for row in rows]
    ids, labels = zip(*pairs)
    mask = pad_sequence([torch.ones_like(x) for x in ids], batch_first=True)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    return ids, mask, pad_sequence(labels, batch_first=True, padding_value=-100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path or hub id")
    parser.add_argument("--data", required=True, help="JSON lines with prompt, chosen and rejected texts")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    policy = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    reference = AutoModelForCausalLM.from_pretrained(args.model).to(device).eval()
    fastdpo.patch_model(policy)
    fastdpo.patch_model(reference)

    torch.manual_seed(0)
    rows = load_dataset("json", data_files=args.data, split="train")
    loader = torch.utils.data.DataLoader(
        rows, args.batch_size, shuffle=True, drop_last=True, collate_fn=lambda rows: collate(tokenizer, rows)
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate)
    step = 0
    while step < args.steps:
        for batch in loader:
            ids, mask, labels = (x.to(device) for x in batch)
            logps = policy(ids, attention_mask=mask, labels=labels, fastdpo=True).logps.sum(-1)  # [2B]
            with torch.no_grad():
                ref_logps = reference(ids, attention_mask=mask, labels=labels, fastdpo=True).logps.sum(-1)
            out = fastdpo.preference_loss(*logps.chunk(2), *ref_logps.chunk(2), beta=args.beta)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            margin = (out.chosen_rewards - out.rejected_rewards).mean()
            print(f"step {step}: loss {out.loss.item():.4f}, margin {margin.item():.4f}", flush=True)
            if step == args.steps:
                break


if __name__ == "__main__":
    main()
