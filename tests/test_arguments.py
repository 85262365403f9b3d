"""Flags, recipes, aliases, advice and the resolved config."""

import dataclasses
import re

import pytest

from megatron.arguments import SECTIONS, build_parser, field_docs, parse_config, to_yaml
from megatron.counts import parse_count
from megatron.errors import UserError


def parse(*argv: str):
    return parse_config(build_parser(), list(argv))[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [("3000", 3000), ("300K", 300_000), ("157e9", 157_000_000_000), ("0.5M", 500_000), ("30B", 30 * 10**9),
     ("1_000", 1000), ("157,286,400,000", 157_286_400_000), ("157286400000000001", 157_286_400_000_000_001)],
)  # fmt: skip
def test_counts_are_exact(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "x", "1.5", "1e-3", "1e9999999", "nan", "inf", "3Q", "1.2.3", "1,5", "1,0000"])
def test_bad_counts(text):
    with pytest.raises(UserError, match="--train-iters"):
        parse(f"--train-iters={text}")


def test_every_knob_is_documented_in_place():
    for section in SECTIONS.values():
        docs = field_docs(section)
        for f in dataclasses.fields(section):
            assert len(docs.get(f.name, "")) > 10, f"{section.__name__}.{f.name}"


def test_help_lists_every_flag_in_groups():
    text = build_parser().format_help()
    for section in SECTIONS.values():
        assert section.__doc__.strip() + ":" in text
        for f in dataclasses.fields(section):
            assert "--" + f.name.replace("_", "-") in text


def test_the_last_flag_wins_and_flags_win_over_recipes(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("lr: 6e-4\ntrain-tokens: 157e9\nbf16: true\n")
    second.write_text("config: a.yaml\nlr: 3e-4\nbf16: false\ndata-path: [0.3, my wiki, 0.7, web]\n")
    assert parse("--config", str(first)).learning_rate.lr == 6e-4
    config = parse("--config", str(second))
    assert config.learning_rate.lr == 3e-4
    assert config.training.bf16 is False
    assert config.data.data_path == ("0.3", "my wiki", "0.7", "web")
    both = parse(
        "--config", str(first), "--config", str(second), "--lr", "1e-4", "--train-tokens", "5", "--train-tokens", "7"
    )
    assert both.learning_rate.lr == 1e-4
    assert both.training.train_tokens == 7


def test_the_resolved_config_runs_again_to_the_same_config(tmp_path):
    config = parse(
        "--train-tokens", "157286400001", "--lr", "0.00061234567890123", "--data-path", "0.3", 'a "b" c', "0.7", "d:e",
        "--seqlen-warmup", "discrete", "--seqlen-stages", "128:20000,1024", "--model-size", "1.5B", "--bf16",
        "--vocab-file", "with space/true", "--save", "runs/x", "--no-save-optim",
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert parse("--config", str(path)) == config
    assert "num-layers: 48" in path.read_text()


def test_a_preset_sets_the_shape_where_it_stands(tmp_path):
    assert parse("--train-iters=1", "--model-size", "1.5B").model.num_attention_heads == 25
    smaller = parse("--train-iters=1", "--model-size", "1.5B", "--num-layers", "2").model
    assert (smaller.num_layers, smaller.hidden_size) == (2, 1600)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(to_yaml(parse("--train-iters=1", "--num-layers", "2")))
    assert parse("--config", str(resolved), "--model-size", "1.5B").model.num_layers == 48


def test_null_and_unset_forget_what_was_set(tmp_path):
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("train-tokens: 1M\nlr-warmup-iters: 30\nmicro-batch-size: 4\nsave: runs/x\n")
    own.write_text("config: base.yaml\nlr-warmup-iters: null\nlr-warmup-tokens: 500\nsave:\n")
    config = parse("--config", str(own), "--unset", "micro-batch-size", "--micro-batch-tokens", "64")
    assert (config.learning_rate.lr_warmup_iters, config.learning_rate.lr_warmup_tokens) == (None, 500)
    assert (config.training.micro_batch_size, config.training.micro_batch_tokens) == (None, 64)
    assert config.checkpoint.save is None


def test_switches_in_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train-iters: 1\nbf16: yes\ntest: off\nno-save-optim: true\nno_load_rng: false\nsave: true\n")
    config = parse("--config", str(path))
    assert (config.training.bf16, config.evaluation.test) == (True, False)
    assert (config.checkpoint.save_optim, config.checkpoint.load_rng) == (False, True)
    assert config.checkpoint.save == "true"


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--warmup-iters", "7"], "learning_rate.lr_warmup_iters", 7),
        (["--warmup", "0.01"], "learning_rate.lr_warmup_fraction", 0.01),
        (["--layernorm-epsilon", "1e-6"], "model.norm_epsilon", 1e-6),
        (["--checkpoint-activations"], "training.recompute_granularity", "full"),
        (["--min-scale", "2"], "training.min_loss_scale", 2.0),
        (["--no-save-optim"], "checkpoint.save_optim", False),
        (["--no-load-rng"], "checkpoint.load_rng", False),
    ],
)
def test_old_spellings(argv, field, value):
    section, name = field.split(".")
    assert getattr(getattr(parse("--train-iters", "100", *argv), section), name) == value


def test_old_no_ops_say_why(capsys):
    parse("--train-iters", "1", "--data-impl", "mmap", "--DDP-impl", "torch", "--mmap-warmup")
    said = capsys.readouterr().err
    assert "--data-impl does nothing here" in said
    assert "--mmap-warmup does nothing here" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing says when to stop"),
        (["--train-tokns", "3"], "unknown flag --train-tokns (did you mean --train-tokens?); see --help"),
        (["--train-token", "3"], "unknown flag --train-token (did you mean --train-tokens?); see --help"),
        (["--batch-size", "4"], "--batch-size is not a flag here: give --micro-batch-size"),
        (["--lr", "fast", "--train-iters", "1"], "--lr: expected a number, found 'fast'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--train-iters=1", "--global-batch-size=6", "--micro-batch-size=4"], "multiple of --micro-batch-size"),
        (["--train-iters", "1", "--micro-batch-size", "4", "--micro-batch-tokens", "4096"], "give one"),
        (["--train-iters", "1", "--hidden-size", "100"], "--hidden-size 100 must be a multiple"),
        (["--train-iters", "1", "--fp16", "--bf16"], "exclude each other"),
        (["--train-iters", "-1"], "--train-iters -1 must be at least 1"),
        (["--train-iters", "1", "--override", "nonsense"], "there is no such setting"),
        (["--train-iters", "1", "--unset", "nonsense"], "there is no setting nonsense"),
        (["--train-iters", "1", "--model-size", "2B"], "--model-size: expected one of 117M"),
        (["--train-iters", "1", "--lr", "nan"], "--lr: expected a number, found 'nan'"),
        (["--train-iters", "1", "--weight-decay", "inf"], "--weight-decay: expected a number"),
        (["--train-iters", "1", "--init-method-std", "-1"], "--init-method-std -1.0 must be positive"),
        (["--train-iters", "1", "--seed", "99999999999999999999999"], "--seed"),
        (["--train-iters", "1", "--loss-scale", "8"], "--loss-scale has no effect without --fp16"),
        (["--train-iters", "1", "--vocab-size", "0"], "--vocab-size 0 must be at least 1"),
        (["--train-iters", "1", "--eval-interval", "-2"], "--eval-interval -2 must not be negative"),
        (["--train-iters", "1", "--num-workers", "1e9"], "--num-workers"),
        (["--train-iters", "1", "--save", ""], "--save: expected a text"),
        (["--train-iters", "1", "--model-size", "1.5B", "--model-parallel-size", "2"],
         "--tensor-model-parallel-size 2 must divide --num-attention-heads 25: use 1, 5, 25"),
        (["--train-iters", "1", "--zero-stage", "4"], "--zero-stage 4: expected 0, 2 or 3"),
        (["--train-iters", "1", "--sequence-parallel"], "--sequence-parallel needs --tensor-model-parallel"),
        (["--train-iters", "1", "--zero-stage", "0", "--data-parallel-shard-size", "2"], "has no effect with --zero-"),
        (["--train-iters", "1", "--distributed-timeout-minutes", "0"], "must be positive"),
        (["--config", "/does/not/exist.yaml"], "no such file"),
        (["--config="], "--config: expected a text, found an empty one"),
        (["--deepspeed-config="], "expected a text, found an empty one"),
    ],
)  # fmt: skip
def test_bad_command_lines(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: [1, {a: b}]", "nested"),
        ("- a\n- b\n", "expected lines of"),
        ("lr: 1\nlr: 2\n", "lr is given twice"),
        ("lr-floor: clip\nlr_floor: clip\n", "given twice"),
        ("fp16: perhaps", "expected true or false, found 'perhaps'"),
        ("lr: [1e-3, 2e-3]", "expected one value, found a list"),
        ("config: r.yaml", "builds on itself"),
        ("lr: fast", r"r\.yaml: argument --lr: expected a number"),
        ("[" * 2000 + "]" * 2000, "not valid YAML"),
        ("lr: 'unclosed", "not valid YAML"),
        ("lrr: 1", "unknown flag --lrr"),
        ("lr: !!python/object/apply:os.system [true]", "."),
    ],
)
def test_bad_recipes(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        parse("--train-iters", "1", "--config", str(path))


def test_a_recipe_must_be_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00lr")
    with pytest.raises(UserError, match=r"r\.yaml: cannot be read"):
        parse("--config", str(tmp_path / "r.yaml"))


def test_stage_1_of_zero_is_read_as_2_and_said(capsys):
    assert parse("--train-iters", "1", "--zero-stage", "1").parallel.zero_stage == 2
    assert capsys.readouterr().err == "note: --zero-stage 1 is read as 2, which shares out gradients too\n"
