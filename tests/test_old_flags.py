"""Old flags: what becomes of each of Megatron-LM v1.1.5, its curriculum-learning fork, and GPT scripts of today."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron import old_flags
from megatron.arguments import SECTIONS, build_parser, parse_config
from megatron.config import Config
from megatron.errors import UserError
from megatron.metrics import STEP_TAGS
from tools import evaluate_zeroshot, generate_samples_gpt2, preprocess_data

SAME = """--num-layers 12 --hidden-size 768 --num-attention-heads 12 --max-position-embeddings 1024 --seq-length 1024
--make-vocab-size-divisible-by 128 --attention-dropout 0.1 --hidden-dropout 0.1 --weight-decay 0.01 --clip-grad 1.0
--adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8 --train-iters 500000 --log-interval 100 --exit-interval 100
--tensorboard-dir tb --seed 1234 --init-method-std 0.02 --lr 1.5e-4 --lr-decay-style cosine --lr-decay-iters 320000
--min-lr 1e-5 --save c --save-interval 1000 --no-save-optim --no-save-rng --load c --no-load-optim --no-load-rng
--finetune --fp16 --hysteresis 2 --loss-scale 8 --loss-scale-window 1000.0 --eval-iters 100 --eval-interval 1000
--data-path d --split 949,50,1 --vocab-file v --merge-file m --num-workers 2 --tokenizer-type GPT2BPETokenizer
--reset-position-ids --reset-attention-mask --eod-mask-loss --zero-stage 2"""
ALIAS = """--layernorm-epsilon 1e-5 --warmup 0.01 --min-scale 1 --model-parallel-size 1 --checkpoint-activations
--cpu-optimizer --deepspeed_config ds.json"""
IGNORED = """--openai-gelu --distribute-checkpointed-activations --checkpoint-num-layers 1
--scaled-upper-triang-masked-softmax-fusion --scaled-masked-softmax-fusion --bias-gelu-fusion --bias-dropout-fusion
--cpu_torch_adam --use-checkpoint-lr-scheduler --apply-query-key-layer-scaling
--attention-softmax-in-fp32 --fp32-allreduce --fp16-lm-cross-entropy --distributed-backend nccl --DDP-impl local
--local_rank 0 --use-cpu-initialization --mmap-warmup --data-impl mmap --adlr-autoresume
--adlr-autoresume-interval 1000 --zero-reduce-scatter --zero-contigious-gradients --zero-reduce-bucket-size 50000000
--zero-allgather-bucket-size 5000000000 --remote-device none --use-pin-memory --scattered-embeddings
--split-transformers --memory-centric-tiled-linear --tile-factor 1 --deepspeed-activation-checkpointing
--partition-activations --contigious-checkpointing --synchronize-each-layer --profile-backward --deepspeed
--deepspeed_mpi"""
REFUSED = """--num-unique-layers 6 --param-sharing-style grouped --apply-residual-connection-post-layernorm
--onnx-safe True --batch-size 4 --lazy-mpu-init True --mask-prob 0.15 --short-seq-prob 0.1 --ict-head-size 128
--ict-load c --bert-load c --titles-data-path d --query-in-block-prob 0.1 --use-one-sent-docs
--report-topk-accuracies 1 --faiss-use-gpu --block-data-path d --indexer-batch-size 128 --indexer-log-interval 1000
--checkpoint-in-cpu --deepscale --deepscale_config ds.json --override-lr-scheduler"""
"""All flags of v1.1.5's arguments.py with DeepSpeed's, each with a value that its scripts give it."""

LATER = {
    "ignored": """--no-masked-softmax-fusion --no-bias-gelu-fusion --no-query-key-layer-scaling --use-flash-attn
    --optimizer adam --dataloader-type single --pipeline-model-parallel-size 1 --no-pipeline-parallel
    --use-checkpoint-opt-param-scheduler --use-distributed-optimizer --use-mcore-models
    --overlap-grad-reduce --overlap-param-gather --transformer-impl transformer_engine --attention-backend flash
    --recompute-method uniform --recompute-num-layers 1 --accumulate-allreduce-grads-in-fp32 --num-experts 1
    --log-throughput --log-timers-to-tensorboard --tensorboard-queue-size 5 --context-parallel-size 1
    --exit-signal-handler --ckpt-format torch_dist --no-create-attention-mask-in-dataloader --lr-warmup-init 0.0
    --position-embedding-type learned_absolute --normalization LayerNorm --no-check-for-nan-in-loss-and-grad
    --data-efficiency-curriculum-learning --repeated-dataloader --use-flash-attn-v2 --use-flash-attn-triton
    --use-flash-attn-builder --disable-mem-efficient-ln --torch_adam --ds-sequence-parallel-size 1
    --create-moe-param-group --moe-loss-coeff 0.01 --topk 1 --normalization layernorm --universal-checkpoint
    --checkpoint-writer-decoupled --checkpoint-io-buffer-size 1048576 --no-barrier-with-level-1-timing""",
    "refused": """--rampup-batch-size --swiglu --num-query-groups --untie-embeddings-and-output-weights
    --disable-bias-linear --tokenizer-model --mock-data --train-data-path --ckpt-step --profile --moe-router-topk
    --fp8-format --init-method-xavier-uniform --use-torch-fsdp2 --ffn-hidden-size --kv-channels --skip-train
    --override-opt_param-scheduler --reset-iteration --random-ltd --train-sample-idx-path --train-desc-path
    --train-data-exact-num-epochs --return-data-index --num-key-value-heads --embedding-weights-in-fp32 --load-tag
    --aml-data-download-path --inference --ds-inference --kill-switch-file --mos --kd-temp --load-teacher
    --profile_steps --enable-zbh1-pipeline --ds-sequence-parallel-fpdt --num-experts-switch --encoder-num-layers""",
}
"""Flags that GPT scripts of Megatron-LM 2.x to today, and of Megatron-DeepSpeed, give besides."""


TODAY = {"--" + f.name.replace("_", "-") for section in SECTIONS.values() for f in dataclasses.fields(section)}


def flags(text: str) -> list[list[str]]:
    """Each flag with its value."""
    return [f"--{part}".split() for part in re.split(r"(?:^|\s)--", text)[1:]]


def parse(*argv: str) -> Config:
    return parse_config(build_parser(), ["--train-iters", "500000", *argv])[0]


def test_the_lists_are_those_of_v1_1_5() -> None:
    found = [words[0] for text in (SAME, ALIAS, IGNORED, REFUSED) for words in flags(text)]
    assert len(found) == len(set(found)) == 115


def test_a_script_of_flags_that_kept_their_names_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert {words[0].replace("--no-", "--", 1) for words in flags(SAME)} <= TODAY
    parse(*SAME.split())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", flags(ALIAS), ids=lambda words: words[0])
def test_old_names_work(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text("{}")
    field = next(iter(build_parser().parse_args(words).__dict__.keys() - {"config"}))
    assert field in {f.name for section in SECTIONS.values() for f in dataclasses.fields(section)} | {
        "deepspeed_config"
    }
    parse(*words)


@pytest.mark.parametrize("words", flags(IGNORED) + flags(LATER["ignored"]), ids=lambda words: words[0])
def test_old_flags_that_do_nothing_say_why(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(*words) == parse()
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: {words[0]} does nothing here: ") and len(note) > len(words[0]) + 40


def test_flags_that_do_nothing_for_one_reason_share_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    parse(*"--bias-gelu-fusion --mmap-warmup --bias-dropout-fusion --bias-gelu-fusion".split())
    assert capsys.readouterr().err.splitlines() == [
        "note: these do nothing here: --bias-gelu-fusion, --bias-dropout-fusion (torch.compile fuses what can be)",
        "note: --mmap-warmup does nothing here: the operating system's page cache does this",
    ]


def test_reasons_name_scalars_that_there_are() -> None:
    named = {tag for row in old_flags.IGNORED for tag in re.findall(r"(?:speed|adam)/\w+", row.why)}
    assert len(named) == 5 and named <= set(STEP_TAGS.values())


def test_of_several_processes_one_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ds.json").write_text('{"x": 1}')
    words = ["--mmap-warmup", "--deepspeed-config", str(tmp_path / "ds.json")]
    for rank, count in (("0", 2), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        parse(*words)
        assert capsys.readouterr().err.count("note: ") == count


@pytest.mark.parametrize("words", flags(REFUSED) + flags(LATER["refused"]), ids=lambda words: words[0])
def test_flags_that_are_gone_say_what_to_do(words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(*words)
    said = str(caught.value)
    assert said.startswith(f"{words[0]} is not a flag here: ") and "\n" not in said and len(said) < 240


def test_flags_that_are_gone_for_one_reason_share_a_clause() -> None:
    with pytest.raises(UserError) as caught:
        parse(*"--swiglu --mock-data --num-query-groups 4".split())
    assert str(caught.value).startswith(
        "--swiglu, --num-query-groups are not flags here: only plain GPT-2 is trained here; --mock-data is not a flag "
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--checkpoint-num-layers 2", "is not offered here: each block is recomputed by itself"),
        ("--pipeline-model-parallel-size 4", "is not offered here: there are no pipelines"),
        ("--data-impl lazy", "is not offered here: only mmap's .bin and .idx are read: preprocess the text again"),
        ("--remote-device cpu", "is not offered here: use --optimizer-cpu-offload"),
        ("--lr-warmup-init 1e-6", "is not offered here: the warmup starts from 0: leave it out"),
        ("--ds-sequence-parallel-size 4", "is not offered here: use --tensor-model-parallel-size, with --sequence-par"),
        ("--optimizer sgd", "is not offered here: AdamW is the only optimizer"),
        ("--position-embedding-type rope", "is not offered here: only plain GPT-2"),
    ],
)
def test_a_value_that_would_change_the_run_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*words.split())
    assert str(caught.value).startswith(f"{words} {message}")


@pytest.mark.parametrize("text", ["0", "0e0", "-0.", "1", "1.0"])
def test_a_number_that_changes_nothing_may_be_written_in_any_way(text: str) -> None:
    parse("--lr-warmup-init" if float(text) == 0 else "--num-experts", text)


def test_wandb_exp_name_and_recomputation_have_their_meaning() -> None:
    config = parse("--wandb-project", "p", "--wandb-exp-name", "x", "--recompute-activations", "--deterministic-mode")
    assert (config.logging.wandb_name, config.training.recompute_granularity) == ("x", "selective")
    assert config.training.deterministic
    assert parse("--checkpoint-activations", "--checkpoint-num-layers", "1").training.recompute_granularity == "full"


def test_each_old_flag_stands_once_and_none_hides_a_flag_of_today() -> None:
    rows = [flag for row in [*old_flags.IGNORED, *old_flags.PREPROCESSING] for flag in row.flags.split()]
    gone = [flag for group in old_flags.REFUSED for flag in group.split()]
    old = [*rows, *gone, *old_flags.SWITCHES, *(name for names in old_flags.ALIASES.values() for name in names)]
    assert len(old) == len(set(old))
    assert not TODAY & set(old)
    assert not [flag for flag in TODAY if flag.startswith(tuple(old_flags.REFUSED_FAMILIES))]


def test_old_preprocessing_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "preprocess_data.py --input a.json --json-keys text --tokenizer-type GPT2BPETokenizer --vocab-file v "
        "--merge-file m --append-eod --output-prefix p --workers 2 --log-interval 100 --dataset-impl"
    )
    monkeypatch.setattr(sys, "argv", [*script.split(), "mmap"])
    parsed = preprocess_data.parse_arguments()
    assert parsed.output_prefix == "p"
    monkeypatch.setattr(sys, "argv", [*script.replace("--vocab-file", "--vocab").split(), "mmap"])
    assert preprocess_data.parse_arguments() == parsed
    assert "note: --dataset-impl does nothing here: mmap is what is written" in capsys.readouterr().err
    for words, message in (
        ("lazy", "--dataset-impl lazy is not offered here: mmap is the only format"),
        ("mmap --split-sentences", "--split-sentences is not a flag here: sentences were BERT's"),
        ("mmap --keep-newlines", "--keep-newlines is not a flag here: sentences were BERT's"),
    ):
        monkeypatch.setattr(sys, "argv", [*script.split(), *words.split()])
        with pytest.raises(UserError, match=message):
            preprocess_data.parse_arguments()


def refusals(monkeypatch: pytest.MonkeyPatch, script: str, parse: Callable[[], object]) -> list[str]:
    monkeypatch.setattr(sys, "argv", script.split())
    with pytest.raises(UserError) as caught:
        parse()
    return str(caught.value).split("; ")


def test_old_evaluation_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that v1.1.5's documentation gives tasks/main.py for WikiText-103 and LAMBADA."""
    script = (
        "main.py --task WIKITEXT103 --valid-data v --tokenizer-type GPT2BPETokenizer --merge-file m --vocab-file v "
        "--load c --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --batch-size 8 --checkpoint-activations "
        "--seq-length 1024 --max-position-embeddings 1024 --log-interval 10 --fp16 --no-load-optim --no-load-rng "
        "--model-parallel-size 1 --openai-gelu --strict-lambada --overlapping-eval 32 --lrr 1"
    )
    assert refusals(monkeypatch, script, evaluate_zeroshot.parse_arguments) == [
        "--num-layers, --hidden-size, --num-attention-heads, --max-position-embeddings are not flags here: not needed, "
        "as the checkpoint says it",
        "--batch-size is not a flag here: give --micro-batch-tokens N, the tokens of a forward pass",
        "--checkpoint-activations, --log-interval, --no-load-optim, --no-load-rng are not flags here: not needed, as "
        "nothing is trained here",
        "--fp16 is not a flag here: give --dtype fp16",
        "--model-parallel-size is not a flag here: not needed, as any layout is read",
        "--openai-gelu is not a flag here: not needed",
        "unknown flag --lrr",
    ]


def test_old_generation_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that v1.1.5's scripts/generate_text.sh gives, and those of its later kin; what is kept stays unsaid."""
    script = (
        "generate_samples_gpt2.py --model-parallel-size 1 --num-layers 24 --hidden-size 1024 --load c "
        "--num-attention-heads 16 --max-position-embeddings 1024 --seq-length 1024 --tokenizer-type GPT2BPETokenizer "
        "--fp16 --batch-size 2 --micro-batch-size 2 --out-seq-length 1024 --temperature 1.0 --vocab-file v "
        "--merge-file m --genfile g --num-samples 8 --top_p 0.9 --top_k 0 --recompute --seed 1 --no-load-optim "
        "--DDP-impl local --data-path d"
    )
    assert refusals(monkeypatch, script, generate_samples_gpt2.parse_arguments) == [
        "--model-parallel-size is not a flag here: not needed, as any layout is read",
        "--num-layers, --hidden-size, --num-attention-heads, --max-position-embeddings, --seq-length are not flags "
        "here: not needed, as the checkpoint says it",
        "--fp16 is not a flag here: give --dtype fp16",
        "--micro-batch-size is not a flag here: give --batch-size N, the samples at a time",
        "--no-load-optim is not a flag here: not needed, as nothing is trained here",
        "--DDP-impl is not a flag here: not needed",
        "--data-path is not a flag here: not needed, as no data is read here",
    ]
    kept = "--load c --batch-size 2 --out-seq-length 9 --top_k 3 --recompute --seed 1"
    monkeypatch.setattr(sys, "argv", ["generate_samples_gpt2.py", *kept.split()])
    assert generate_samples_gpt2.parse_arguments().top_k == 3
