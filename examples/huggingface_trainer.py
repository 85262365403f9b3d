"""Sequence length warmup with Hugging Face's Trainer: python examples/huggingface_trainer.py [TEXT]

The model is a tiny GPT-2 of bytes; without TEXT it reads this repository's documentation. Needs the extra `hf`.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments, set_seed

from megatron.config import Config, LearningRateConfig, ModelConfig, SeqlenWarmupConfig, TrainingConfig
from megatron.huggingface_trainer import SeqlenWarmupTrainer
from megatron.pacing import plan_run

CONFIG = Config(
    model=ModelConfig(seq_length=128),
    seqlen_warmup=SeqlenWarmupConfig(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=40),
    training=TrainingConfig(train_tokens=120_000, global_batch_size=16),
    learning_rate=LearningRateConfig(lr=3e-3, lr_warmup_iters=10),  # then a cosine over train_tokens
)


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    files = [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(root.glob("docs/*.md"))
    seq_length = CONFIG.model.seq_length
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    if len(text) < 32 * seq_length:
        sys.exit(f"error: {files[0]}: expected {32 * seq_length:,} bytes or more, found {len(text):,}")
    whole = text[: len(text) // (16 * seq_length) * 16 * seq_length]  # an epoch of steps that all have 16 samples
    samples = [{"input_ids": sample, "labels": sample} for sample in whole.split(seq_length)]

    set_seed(1234)
    gpt2 = GPT2Config(
        vocab_size=256, n_positions=seq_length, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(gpt2)
    model.loss_type = "ForCausalLM"  # else transformers takes the mean over one label too many, 8 for 7 at length 8
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,  # 8 x 2 samples a step: global_batch_size
            max_steps=plan_run(CONFIG).progress.iteration,
            learning_rate=CONFIG.learning_rate.lr,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=40,
            dataloader_num_workers=2,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
        )
        trainer = SeqlenWarmupTrainer(
            model,
            arguments,
            train_dataset=samples[16:],
            eval_dataset=samples[:16],
            config=CONFIG,
            schedule_lr=True,
        )
        trainer.train()
    print(f"trained on {trainer.progress.consumed_tokens:,} tokens in {trainer.progress.iteration} steps")


if __name__ == "__main__":
    main()
