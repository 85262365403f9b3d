"""Flags of Megatron-LM v1.1.5, its curriculum-learning fork and their successors: what becomes of each here.

A flag that has not kept its name works under the old one (`ALIASES`, `SWITCHES`), is taken and does nothing but say why
nothing of the run is lost (`IGNORED`), or is refused with one line that says what to do (`REFUSED`). One row is one
reason, with all the flags that it holds for; docs/migration.md shows the same rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron.flags import Parser

ALIASES: dict[str, list[str]] = {
    "lr_warmup_iters": ["--warmup-iters"],
    "lr_warmup_fraction": ["--warmup"],
    "lr_warmup_tokens": ["--warmup-tokens"],
    "norm_epsilon": ["--layernorm-epsilon"],
    "min_loss_scale": ["--min-scale"],
    "tensor_model_parallel_size": ["--model-parallel-size"],
    "optimizer_cpu_offload": ["--cpu-optimizer"],
    "save_interval": ["--persistent-save-interval"],
    "deterministic": ["--deterministic-mode"],
    "wandb_name": ["--wandb-exp-name"],
    "vocab_file": ["--vocab"],
    "deepspeed_config": ["--deepspeed_config"],
}
"""Field -> old spellings with the same meaning."""

SWITCHES: dict[str, tuple[str, str]] = {
    "--checkpoint-activations": ("recompute_granularity", "full"),
    "--recompute-activations": ("recompute_granularity", "selective"),
}
"""Old flag without a value -> (field, what it sets)."""


class Row(NamedTuple):
    """Old flags that do nothing for the same reason."""

    flags: str
    why: str
    arguments: int | str = 0
    values: str = ""
    """What they may be given, where only that changes nothing."""
    instead: str = ""
    """What to do where they are given something else."""


FUSED, ONE_FORMAT = "attention is always fused", "there is one format of checkpoints, which any layout loads"
RESUME = "the flags decide; a resume refuses a changed one unless --override names it, as in --override lr"
SENT = "FSDP2 decides how it is sent"
TIMERS = (
    "parts of a step are not timed; speed/step_seconds and speed/tokens_per_second of TensorBoard are of whole steps"
)
RECOMPUTED, SHARED = "full recomputes each block by itself", "--sequence-parallel shares out what is kept"
NO_RECOMPUTE_CHOICE = "each block is recomputed by itself: give --recompute-granularity full alone"
PIPELINES = "there are no pipelines: use --tensor-model-parallel-size and --zero-stage"
ULYSSES = "use --tensor-model-parallel-size, with --sequence-parallel to share out activations too"
EXPERTS, CONTEXT = "there are no experts here", "there is no context parallelism: use --tensor-model-parallel-size"
SCHEDULED_DECAY, PLAIN_GPT2 = "weight decay is constant: give --weight-decay", "only plain GPT-2 is trained here"

IGNORED: list[Row] = [
    Row("--data-impl", "the data is always read as mmap", 1, "mmap infer",
        "only mmap's .bin and .idx are read: preprocess the text again with tools/preprocess_data.py"),
    Row("--no-mmap-bin-files", "the data is always read as mmap"),
    Row("--mmap-warmup", "the operating system's page cache does this"),
    Row("--num-dataset-builder-threads", "the sample index is made once, by one process", 1),
    Row("--dataloader-type", "samples are drawn in one shuffled order, epoch by epoch", 1, "single",
        "there is one order of samples, shuffled epoch by epoch: leave it out"),
    Row("--repeated-dataloader", "samples are drawn epoch by epoch for as long as the run goes on"),
    Row("--data-efficiency-curriculum-learning",
        "the data_efficiency block of DeepSpeed's JSON decides: give the JSON with --deepspeed-config"),
    Row("--scaled-upper-triang-masked-softmax-fusion --scaled-masked-softmax-fusion --no-masked-softmax-fusion "
        "--use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder "
        "--no-create-attention-mask-in-dataloader", FUSED),
    Row("--attention-backend", FUSED, 1),
    Row("--bias-gelu-fusion --bias-dropout-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion "
        "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-async-tensor-model-parallel-allreduce "
        "--cross-entropy-loss-fusion --disable-mem-efficient-ln", "torch.compile fuses what can be"),
    Row("--cross-entropy-fusion-impl", "torch.compile fuses what can be", 1),
    Row("--openai-gelu", "the tanh form of GELU is the one that runs here"),
    Row("--apply-query-key-layer-scaling --no-query-key-layer-scaling --attention-softmax-in-fp32",
        "attention works in fp32 inside the kernel"),
    Row("--fp16-lm-cross-entropy", "the cross entropy is computed in fp32"),
    Row("--fp32-allreduce --accumulate-allreduce-grads-in-fp32", "gradients are fp32"),
    Row("--calculate-per-token-loss", "the loss is always a sum over tokens, divided once"),
    Row("--optimizer", "AdamW is the optimizer", 1, "adam adamw", "AdamW is the only optimizer here"),
    Row("--cpu_torch_adam --torch_adam --ds_fused_adam --use-torch-optimizer-for-cpu-offload",
        "torch's AdamW steps on either device"),
    Row("--weight-decay-incr-style", "weight decay is constant", 1, "constant", SCHEDULED_DECAY),
    Row("--lr-warmup-init", "the warmup starts from 0", 1, "0", "the warmup starts from 0: leave it out"),
    Row("--lr-wsd-decay-style", "the decay of wsd is linear", 1, "linear", "the decay of wsd is linear"),
    Row("--use-checkpoint-lr-scheduler --use-checkpoint-opt_param-scheduler --use-checkpoint-opt-param-scheduler",
        RESUME),
    Row("--DDP-impl --transformer-impl", "there is one implementation", 1),
    Row("--use-mcore-models --use-legacy-models", "there is one implementation"),
    Row("--use-distributed-optimizer", "--zero-stage 2, the default, shares out the optimizer's state"),
    Row("--zero-reduce-scatter --zero-contigious-gradients --use-contiguous-buffers-in-ddp --overlap-grad-reduce "
        "--no-contiguous-buffers-in-local-ddp --overlap-param-gather --no-align-grad-reduce --no-align-param-gather "
        "--ddp-average-in-collective --ddp-pad-buckets-for-high-nccl-busbw --use-pin-memory", SENT),
    Row("--zero-reduce-bucket-size --zero-allgather-bucket-size --allreduce-bucket-size --ddp-bucket-size "
        "--ddp-num-buckets", SENT, 1),
    Row("--tp-comm-overlap --manual-gc --no-manual-gc-eval", "it changes the speed alone"),
    Row("--manual-gc-interval --empty-unused-memory-level --train-sync-interval", "it changes the speed alone", 1),
    Row("--checkpoint-writer-decoupled", "it changes the speed alone; --async-save writes in the background"),
    Row("--checkpoint-io-buffer-size --checkpoint-data-parallel --aio-intra-op-parallelism",
        "it changes the speed alone; --async-save writes in the background", 1),
    Row("--local_rank --local-rank", "torchrun says it in the environment", 1),
    Row("--distributed-backend", "NCCL serves GPUs, gloo the CPU", 1),
    Row("--deepspeed --deepspeed_mpi --no-pipeline-parallel", "nothing of DeepSpeed is needed"),
    Row("--use-cpu-initialization --no-initialization", "weights follow from --seed and their name alone"),
    Row("--partition-activations --distribute-checkpointed-activations --distribute-saved-activations "
        "--scattered-embeddings", SHARED),
    Row("--deepspeed-activation-checkpointing --contigious-checkpointing --synchronize-each-layer --profile-backward "
        "--split-transformers", "--checkpoint-activations alone decides what is recomputed"),
    Row("--checkpoint-num-layers --recompute-num-layers", RECOMPUTED, 1, "1", NO_RECOMPUTE_CHOICE),
    Row("--recompute-method --checkpoint-method", RECOMPUTED, 1, "uniform", NO_RECOMPUTE_CHOICE),
    Row("--memory-centric-tiled-linear", "--zero-stage 3 gathers one block at a time"),
    Row("--tile-factor", "--zero-stage 3 gathers one block at a time", 1),
    Row("--remote-device", "the weights are on the GPU", 1, "none", "use --optimizer-cpu-offload"),
    Row("--pipeline-model-parallel-size", "there are no pipelines", 1, "1", PIPELINES),
    Row("--context-parallel-size", "there is no context parallelism", 1, "1", CONTEXT),
    Row("--ds-sequence-parallel-size", "there is no sequence parallelism of DeepSpeed's kind", 1, "1", ULYSSES),
    Row("--create-moe-param-group --use-tutel --enable-expert-tensor-parallelism --disable-moe-token-dropping "
        "--disable-moe-top2-2nd-expert-sampling", EXPERTS),
    Row("--moe-train-capacity-factor --moe-eval-capacity-factor --moe-min-capacity --moe-loss-coeff --mlp-type --topk "
        "--expert-interval", EXPERTS, 1),
    Row("--expert-model-parallel-size --moe-expert-parallel-size --num-experts", EXPERTS, 1, "1", EXPERTS),
    Row("--position-embedding-type", "positions are learned", 1, "learned_absolute", PLAIN_GPT2),
    Row("--normalization", "layer norms are what GPT-2 has", 1, "LayerNorm layernorm", PLAIN_GPT2),
    Row("--adlr-autoresume", "the same command goes on: --load finds the newest checkpoint"),
    Row("--adlr-autoresume-interval", "the same command goes on: --load finds the newest checkpoint", 1),
    Row("--exit-signal-handler", "SIGTERM always saves and stops"),
    Row("--use-dist-ckpt --auto-detect-ckpt-format --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save "
        "--ckpt-fully-parallel-load --ckpt-assume-constant-structure --use-persistent-ckpt-worker "
        "--universal-checkpoint", ONE_FORMAT),
    Row("--ckpt-format --dist-ckpt-format --dist-ckpt-strictness", ONE_FORMAT, 1),
    Row("--no-check-for-nan-in-loss-and-grad --check-for-spiky-loss --check-for-large-grads",
        "both are always looked for: --on-nonfinite and --on-spike say what follows"),
    Row("--log-timers-to-tensorboard --no-barrier-with-level-1-timing", TIMERS),
    Row("--timing-log-level --timing-log-option", TIMERS, 1),
    Row("--log-memory-to-tensorboard", "memory in use is not measured; tools/plan_run.py plans it"),
    Row("--log-throughput", "TFLOP/s are not measured; speed/tokens_per_second is, and tools/plan_run.py says a run's "
        "FLOPs"),
    Row("--log-world-size-to-tensorboard", "it is no scalar: the output says it where the run starts"),
    Row("--log-optimizer-states-to-tensorboard", "adam/variance_norm, adam/variance_max and adam/momentum_norm are "
        "always logged; no other norms of its state are"),
    Row("--log-batch-size-to-tensorboard --log-validation-ppl-to-tensorboard --log-learning-rate-to-tensorboard "
        "--no-log-learnig-rate-to-tensorboard --no-log-loss-scale-to-tensorboard",
        "batch size, learning rate, loss scale and validation perplexity are always logged"),
    Row("--log-progress", "metrics.jsonl has the progress at every step"),
    Row("--tensorboard-log-interval", "TensorBoard has every step, of those below 0.02 s a sample", 1),
    Row("--tensorboard-queue-size", "TensorBoard's files are written out every 30 s", 1),
    Row("--log-params-norm --log-num-zeros-in-grad",
        "it is not measured; the norms of the gradient and of Adam's moments are"),
    Row("--no-one-logger", "nothing is sent anywhere but by --wandb-project"),
]  # fmt: skip
"""Flags that are taken and do nothing."""

PREPROCESSING: list[Row] = [
    Row("--dataset-impl", "mmap is what is written", 1, "mmap", "mmap is the only format that is written and read"),
    Row("--partitions", "--workers reads one input in parallel", 1, "1", "give all files to --input, and --workers"),
    Row("--chunk-size", "chunks have the size that suits them", 1),
    Row("--keep-sequential-samples", "documents always keep their order"),
]
"""The same, of tools/preprocess_data.py."""

MULTI_TASK, GENERATES = "ICT, REALM and BERT are not trained here", "tools/generate_samples_gpt2.py writes text"
REFUSED: dict[str, str] = {
    "--batch-size": "give --micro-batch-size (a rank's, as it was) and --global-batch-size (a step's: times the data "
    "parallel ranks)",
    "--batch-size-per-gpu": "give --micro-batch-size and --global-batch-size",
    "--tokens-per-global-batch": "use --global-batch-size, which counts sequences",
    "--rampup-batch-size": "START INCREMENT SAMPLES is --batch-size-warmup linear --batch-size-start START "
    "--batch-size-increment INCREMENT --batch-size-warmup-samples SAMPLES",
    "--learning-rate": "give --lr",
    "--lr-wsd-decay-iters --lr-wsd-decay-samples": "give --lr-wsd-fraction, the share of the decay",
    "--decoupled-lr --decoupled-min-lr": "there is one learning rate for all weights",
    "--start-weight-decay --end-weight-decay": SCHEDULED_DECAY,
    "--sgd-momentum": "AdamW is the only optimizer here",
    "--dynamic-loss-scale": "--fp16 scales dynamically unless --loss-scale is given",
    "--fp32-residual-connection --embedding-weights-in-fp32": "the residual stream has the precision of --bf16 or "
    "--fp16: leave it out",
    "--no-load-lr-state": "the learning rate follows from the progress: --finetune starts it anew",
    "--override-lr-scheduler --override-opt_param-scheduler --override-opt-param-scheduler": "name what of the "
    "schedule is not the checkpoint's, as in --override lr min_lr",
    "--reset-iteration": "--finetune starts from a checkpoint's weights at step 0, with new Adam moments",
    "--curriculum-learning": "use --seqlen-warmup linear with --seqlen-start and --seqlen-warmup-iters, or give the "
    "DeepSpeed JSON with --deepspeed-config",
    "--random-ltd": "there is no random layer-token drop",
    "--checkpoint-in-cpu --cpu-offloading-num-layers": "activations stay on the GPU: lower --micro-batch-tokens",
    "--recompute-modules": "use --recompute-granularity selective, which keeps what matrix products made",
    "--activations-checkpoint-method": "use --recompute-granularity full, which recomputes each block",
    "--use-torch-fsdp2 --use-megatron-fsdp": "use --zero-stage 3, which shares out the weights too",
    "--torch-fsdp2-no-reshard-after-forward": "use --zero-stage 2",
    "--data-parallel-sharding-strategy": "no_shard is --zero-stage 0, optim and optim_grads are 2, "
    "optim_grads_params is 3",
    "--num-distributed-optimizer-instances": "use --data-parallel-shard-size, the ranks that share out",
    "--lazy-mpu-init": "a model is built where it is told: leave it out",
    "--deepscale --deepscale_config": "give --deepspeed-config",
    "--num-unique-layers --param-sharing-style": "parameter sharing between layers is not offered",
    "--apply-residual-connection-post-layernorm": "the residual connection passes the layer norms by, as in GPT-2",
    "--onnx-safe": "export is not offered yet, and GELU has its tanh form",
    "--ffn-hidden-size": "the MLP is four times as wide as --hidden-size: leave it out, where it says that",
    "--kv-channels": "a head has --hidden-size / --num-attention-heads channels: leave it out, where it says that",
    "--swiglu --squared-relu --quick-geglu --group-query-attention --num-query-groups --multi-latent-attention "
    "--use-rotary-position-embeddings --rotary-base --rotary-percent --rotary-interleaved --use-rope-scaling "
    "--num-key-value-heads --rotary-position-embeddings-theta "
    "--no-position-embedding --untie-embeddings-and-output-weights --disable-bias-linear --add-qkv-bias "
    "--apply-layernorm-1p --qk-layernorm --window-size --softmax-type": PLAIN_GPT2,
    "--init-method-xavier-uniform --embedding-init-method-std": "weights start as GPT-2's: give --init-method-std",
    "--data-parallel-random-init": "all ranks start from the same weights",
    "--tokenizer-model --tokenizer-metadata": "give --tokenizer-file, or --vocab-file and --merge-file",
    "--vocab-extra-ids": "T5's extra tokens are not offered",
    "--train-data-path --valid-data-path --test-data-path --data-args-path --per-split-data-args-path":
        "give --data-path, whose documents --split shares out",
    "--aml-data-download-path": "give --data-path with its directory",
    "--train-idx-path --train-desc-path --train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path":
        "the order of the samples follows from --seed and the data: leave it out",
    "--train-data-exact-num-epochs": "samples are drawn epoch by epoch until --train-tokens: leave it out",
    "--return-data-index --sample-rate": "all samples are read, in an order that follows from --seed: leave it out",
    "--mock-data": "make a small corpus: bash scripts/prepare_corpus.sh DIRECTORY",
    "--encoder-num-layers --decoder-num-layers": "give --num-layers",
    "--encoder-seq-length --decoder-seq-length": "give --seq-length",
    "--full-validation --multiple-validation-sets": "give --eval-iters, the batches of a validation",
    "--inference --ds-inference --max-tokens-to-oom": GENERATES,
    "--kill-switch-file --kill-switch-path": "a file STOP in the directory of --save makes a run save and stop",
    "--mos --kd --kd-alpha-ce --kd-beta-ce --kd-temp --load-teacher --num-layers-teacher --num-experts-teacher "
    "--hidden-size-teacher --num-attention-heads-teacher": "there is no distillation here",
    "--skip-train": "tools/evaluate_zeroshot.py evaluates a checkpoint without training",
    "--ckpt-step --load-tag": "give --load the checkpoint itself: SAVE/checkpoints/iter_0000100",
    "--save-retain-interval": "give --keep-last and --keep-every",
    "--pretrained-checkpoint": "give --load DIRECTORY --finetune",
    "--use-checkpoint-args --use-mp-args-from-checkpoint-args": "give --config SAVE/config.yaml, the settings of a run",
    "--exit-on-missing-checkpoint": "--load must hold a checkpoint wherever it is not --save: leave it out",
    "--wandb-save-dir": "W&B's files lie below --save: leave it out",
    "--profile --profile_steps --profile-step-start --profile-step-end --profile-ranks --use-pytorch-profiler "
    "--record-memory-history --memory-snapshot-path": "there is no profiler inside: run the trainer under one",
    "--mask-prob --short-seq-prob --ict-head-size --ict-load --bert-load --titles-data-path --query-in-block-prob "
    "--use-one-sent-docs --report-topk-accuracies --faiss-use-gpu --block-data-path --embedding-path "
    "--evidence-data-path --indexer-batch-size --indexer-log-interval --bert-no-binary-head --output-bert-embeddings "
    "--bert-embedder-type": MULTI_TASK,
    "--pipeline-model-parallel-split-rank --num-layers-per-virtual-pipeline-stage "
    "--num-virtual-stages-per-pipeline-rank --pipeline-model-parallel-layout --standalone-embedding-stage "
    "--no-scatter-gather-tensors-in-pipeline --no-overlap-p2p-communication --overlap-p2p-communication "
    "--use-ring-exchange-p2p --enable-zbh1-pipeline --enable-zbh1-exact-semantics": PIPELINES,
    "--force-ds-sequence-parallel --ds-sequence-parallel-fpdt --ds-sequence-parallel-fpdt-chunk-size "
    "--ds-sequence-parallel-fpdt-offloading": ULYSSES,
    "--num-experts-switch": EXPERTS,
    "--split-sentences --keep-newlines --lang": "sentences were BERT's: GPT takes whole documents",
}  # fmt: skip
"""Flags that are gone -> what to do instead."""

REFUSED_FAMILIES: dict[str, str] = {
    "--moe-": EXPERTS,
    "--expert-": EXPERTS,
    "--cp-": CONTEXT,
    "--fp8-": "fp8 is not offered: use --bf16",
    "--fp4-": "fp8 is not offered: use --bf16",
    "--biencoder-": MULTI_TASK,
    "--retriever-": MULTI_TASK,
    "--retro-": PLAIN_GPT2,
    "--mtp-": PLAIN_GPT2,
    "--mamba-": PLAIN_GPT2,
    "--hybrid-": PLAIN_GPT2,
    "--heterogeneous-": PLAIN_GPT2,
    "--rl-": "there is pre-training alone here",
    "--grpo-": "there is pre-training alone here",
    "--muon-": "AdamW is the only optimizer here",
    "--inprocess-": "start the same command again, or give torchrun --max-restarts",
    "--one-logger-": "nothing is sent anywhere but by --wandb-project",
    "--inference-": GENERATES,
}
"""How flags begin that are gone as a family -> what to do instead."""

OF_A_MODEL: dict[str, str] = {
    "--num-layers --hidden-size --num-attention-heads --max-position-embeddings --make-vocab-size-divisible-by "
    "--layernorm-epsilon --use-checkpoint-args": "not needed, as the checkpoint says it",
    "--fp16": "give --dtype fp16",
    "--bf16": "give --dtype bf16",
    "--model-parallel-size --tensor-model-parallel-size --sequence-parallel": "not needed, as any layout is read",
    "--checkpoint-activations --recompute-activations --recompute-granularity --log-interval --no-load-optim "
    "--no-load-rng --finetune --attention-dropout --hidden-dropout": "not needed, as nothing is trained here",
    "--pretrained-checkpoint": "give --load DIRECTORY",
    "--tokenizer-model": REFUSED["--tokenizer-model --tokenizer-metadata"],
}  # fmt: skip
"""Flags that scripts give either of the two below, and what either says."""

EVALUATION: dict[str, str] = OF_A_MODEL | {
    "--seed": "not needed, as nothing is drawn here",
    "--batch-size --micro-batch-size --global-batch-size": "give --micro-batch-tokens N, the tokens of a forward pass",
    "--data-path --split": "give --valid-data FILE, the text as it is",
}
"""Flags that scripts give Megatron-LM's tasks/main.py -> what to do instead with tools/evaluate_zeroshot.py."""

GENERATION: dict[str, str] = OF_A_MODEL | {
    "--seq-length": "not needed, as the checkpoint says it",
    "--micro-batch-size --global-batch-size": "give --batch-size N, the samples at a time",
    "--data-path --split": "not needed, as no data is read here",
}
"""Flags that scripts give Megatron-LM's generate_samples_gpt2.py -> what to do instead with ours."""

ADVICE: dict[str, str] = {flag: advice for flags, advice in REFUSED.items() for flag in flags.split()}
"""The same as REFUSED, flag by flag."""


def aliases(field: str) -> list[str]:
    """Old spellings of the flag for `field`."""
    return ALIASES.get(field, [])


def advice(flag: str) -> str | None:
    """What to do instead of an old flag that is gone, or None if it is not one."""
    families = (text for start, text in REFUSED_FAMILIES.items() if flag.startswith(start))
    return ADVICE.get(flag) or next(families, None)


def tool_advice(table: Mapping[str, str]) -> Callable[[str], str | None]:
    """Flag -> what to do instead of it with a tool whose `table` is EVALUATION or GENERATION; None if it is not old."""
    known = {name: text for names, text in table.items() for name in names.split()}
    ignored = {name: "not needed" for row in IGNORED for name in row.flags.split()}
    return (ignored | known).get


class _Ignore(argparse.Action):
    """Accept an old flag, let the parser say why it does nothing, and store nothing."""

    def __init__(self, *, row: Row, **options: Any) -> None:
        super().__init__(nargs=row.arguments, **options)
        self._row = row

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        given, row = " ".join(values), self._row
        if row.values and not any(_same(given, value) for value in row.values.split()):
            parser.fault(f"{option_string} {given} is not offered here: {row.instead}")
            return
        flags = parser.idle.setdefault(row.why, [])
        if option_string not in flags:
            flags.append(option_string)


def _same(given: str, value: str) -> bool:
    """Whether two values are the same text or number, as 0, 0.0 and 0e0 are."""
    try:
        return float(given) == float(value)
    except ValueError:
        return given == value


HIDDEN: dict[str, Any] = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}


def add_ignored(parser: argparse.ArgumentParser) -> None:
    """Add the old flags that need an action of their own, hidden from --help."""
    for flag, (field, value) in SWITCHES.items():
        parser.add_argument(flag, action="store_const", const=value, dest=field, **HIDDEN)
    _add_rows(parser, IGNORED)


def add_preprocessing(parser: Parser) -> None:
    """The same for tools/preprocess_data.py, with advice for the refused flags that were this tool's."""
    _add_rows(parser, PREPROCESSING)
    refused = ("--split-sentences", "--keep-newlines", "--lang", "--tokenizer-model")
    parser.advice = lambda flag: advice(flag) if flag in refused else None


def _add_rows(parser: argparse.ArgumentParser, rows: list[Row]) -> None:
    for row in rows:
        for flag in row.flags.split():
            parser.add_argument(flag, action=_Ignore, row=row, **HIDDEN)
