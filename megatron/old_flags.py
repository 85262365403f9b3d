"""Flags of Megatron-LM v1.1.5 and its curriculum-learning fork: aliases, no-ops with a word why, and advice.

One table a kind; `arguments.py` asks them while it builds the parser and when it meets an unknown flag.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

ALIASES: dict[str, list[str]] = {
    "lr_warmup_iters": ["--warmup-iters"],
    "lr_warmup_fraction": ["--warmup"],
    "lr_warmup_tokens": ["--warmup-tokens"],
    "norm_epsilon": ["--layernorm-epsilon"],
    "min_loss_scale": ["--min-scale"],
    "tensor_model_parallel_size": ["--model-parallel-size"],
    "optimizer_cpu_offload": ["--cpu-optimizer"],
    "deepspeed_config": ["--deepspeed_config"],
}
"""Field -> old spellings with the same meaning."""

IGNORED: dict[str, tuple[int | str, str]] = {
    "--data-impl": (1, "the data is always read as mmap"),
    "--mmap-warmup": (0, "the operating system's page cache does this"),
    "--scaled-upper-triang-masked-softmax-fusion": (0, "attention is always fused"),
    "--scaled-masked-softmax-fusion": (0, "attention is always fused"),
    "--bias-gelu-fusion": (0, "torch.compile fuses it"),
    "--bias-dropout-fusion": (0, "torch.compile fuses it"),
    "--DDP-impl": (1, "there is one implementation"),
    "--apply-query-key-layer-scaling": (0, "attention works in fp32 inside the kernel"),
    "--attention-softmax-in-fp32": (0, "attention works in fp32 inside the kernel"),
    "--fp16-lm-cross-entropy": (0, "the cross entropy is computed in fp32"),
    "--local_rank": (1, "torchrun says it in the environment"),
    "--distributed-backend": (1, "NCCL serves GPUs, gloo the CPU"),
    "--deepspeed": (0, "nothing of DeepSpeed is needed"),
    "--fp32-allreduce": (0, "gradients are fp32"),
    "--accumulate-allreduce-grads-in-fp32": (0, "gradients are fp32"),
}
"""Flag -> (its arguments, why it does nothing here)."""

ADVICE: dict[str, str] = {
    "--batch-size": "give --micro-batch-size (a rank) and --global-batch-size (a step)",
    "--lazy-mpu-init": "not needed: a model is built where it is told",
    "--remote-device": "not needed",
    "--num-unique-layers": "parameter sharing between layers is not offered",
    "--param-sharing-style": "parameter sharing between layers is not offered",
    "--openai-gelu": "the tanh form of GELU is what GPT-2 uses and what runs here",
    "--onnx-safe": "export is not offered yet",
    "--adlr-autoresume": "start the same command again: --load finds the newest checkpoint",
    "--adlr-autoresume-interval": "use --save-interval",
    "--curriculum-learning": "use --seqlen-warmup linear with --seqlen-start and --seqlen-warmup-iters",
    "--pipeline-model-parallel-size": "there are no pipelines: use --tensor-model-parallel-size, --zero-stage",
    "--use-distributed-optimizer": "use --zero-stage 2, the default",
    "--tokenizer-model": "give --tokenizer-file, or --vocab-file and --merge-file",
    "--deepspeed-activation-checkpointing": "use --recompute-granularity full",
    "--partition-activations": "use --recompute-granularity full",
    "--contigious-checkpointing": "use --recompute-granularity full",
    "--checkpoint-in-cpu": "use --recompute-granularity full",
    "--synchronize-each-layer": "use --recompute-granularity full",
    "--profile-backward": "use --recompute-granularity full",
    "--checkpoint-num-layers": "use --recompute-granularity full, which recomputes each block",
    "--distribute-checkpointed-activations": "use --recompute-granularity full",
    "--dynamic-loss-scale": "--fp16 scales dynamically unless --loss-scale is given",
    "--allreduce-bucket-size": "buckets are torch's affair",
    "--zero-allgather-bucket-size": "buckets are torch's affair",
    "--zero-reduce-bucket-size": "buckets are torch's affair",
    "--ict-head-size": "ICT, REALM and BERT are not trained here",
    "--block-data-path": "ICT, REALM and BERT are not trained here",
    "--bert-load": "ICT, REALM and BERT are not trained here",
    "--faiss-use-gpu": "ICT, REALM and BERT are not trained here",
    "--rampup-batch-size": "START INCREMENT SAMPLES is --batch-size-warmup linear --batch-size-start START "
    "--batch-size-increment INCREMENT --batch-size-warmup-samples SAMPLES",
    "--ffn-hidden-size": "the MLP is four times as wide as --hidden-size",
    "--use-flash-attn": "attention is always fused",
    "--learning-rate": "give --lr",
    "--batch-size-per-gpu": "give --micro-batch-size and --global-batch-size",
    "--tokens-per-global-batch": "use --global-batch-size, which counts sequences",
}
"""Flag that is gone -> what to do instead."""


def aliases(field: str) -> list[str]:
    """Old spellings of the flag for `field`."""
    return ALIASES.get(field, [])


def advice(flag: str) -> str | None:
    """The one line to show for an old flag that is gone, or None if it is not one."""
    return f"{flag} is not a flag here: {ADVICE[flag]}" if flag in ADVICE else None


class _Ignore(argparse.Action):
    """Accept an old flag, say why it does nothing, and store nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        flag = self.option_strings[0]
        print(f"note: {flag} does nothing here: {IGNORED[flag][1]}", file=sys.stderr)


def add_ignored(parser: argparse.ArgumentParser) -> None:
    """Add the old flags that need an action of their own, hidden from --help."""
    hidden: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS, "dest": "_old"}
    full = {**hidden, "dest": "recompute_granularity"}
    parser.add_argument("--checkpoint-activations", action="store_const", const="full", **full)
    for flag, (arguments, _) in IGNORED.items():
        parser.add_argument(flag, action=_Ignore, nargs=arguments, **hidden)
