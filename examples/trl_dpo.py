"""DPO with TRL: fastdpo is one line of it. With --lora only an adapter is trained.

python examples/trl_dpo.py --model Qwen/Qwen2.5-0.5B --data preferences.jsonl [--lora 16]
accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/trl_dpo.py ...   (or zero3.yaml)
"""

import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import fastdpo


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="path or hub id")
    parser.add_argument("--data", required=True, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train a LoRA adapter of this rank instead")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--output", default="dpo_output")
    args = parser.parse_args()

    fastdpo.patch_trl()

    peft_config = None
    if args.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=args.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    on_gpu = torch.cuda.is_available()
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model),
        args=DPOConfig(
            output_dir=args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
