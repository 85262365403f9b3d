"""One command line over all programs: unknown flags, counts, defaults, files to write, Ctrl-C."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron import flags
from megatron.arguments import build_parser, parse_config
from megatron.errors import CommandLineError, UserError
from megatron.flags import Parser, with_default

ROOT = Path(__file__).parents[1]
PROGRAMS = ["pretrain_gpt2", *(f"tools.{path.stem}" for path in sorted(ROOT.glob("tools/*.py")))]
WITHOUT_TORCH = [
    f"tools.{name}"
    for name in (
        "collect_stdlib compare_runs inspect_data list_recipes plan_run preprocess_data table2 train_tokenizer "
        "tune_pacing watch_run"
    ).split()
]


class Met(Exception):
    """A program has come to its command line."""


def parser_of(program: str, monkeypatch: pytest.MonkeyPatch) -> Parser:
    met: list[Parser] = []

    def parse(self: Parser, *_: Any) -> NoReturn:
        met.append(self)
        raise Met

    monkeypatch.setattr(Parser, "parse_args", parse)
    with pytest.raises(Met):
        importlib.import_module(program).main()
    return met[0]


def refused(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(UserError) as error:
        importlib.import_module(program).main()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_names_all_its_unknown_flags(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it misses those that it needs, and with advice for each."""
    message = refused(program, ["--helpp", "--xyzzy=3", "--helpp"], monkeypatch)
    assert message == "unknown flag --helpp (did you mean --help?); unknown flag --xyzzy; see --help"


def test_advice_for_old_flags_stands_beside_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused("pretrain_gpt2", ["--batch-size", "4", "--train-iter=1"], monkeypatch)
    assert message.startswith("--batch-size is not a flag here: give --micro-batch-size ")
    assert message.endswith("; unknown flag --train-iter (did you mean --train-iters?)")


def test_all_unknown_flags_of_a_recipe_are_named(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lrr: 1\ntrain-iters: 1\nsavee: x\n")
    with pytest.raises(CommandLineError, match=r"r\.yaml: unknown flag --lrr .*; unknown flag --savee \(did you mean "):
        parse_config(build_parser(), ["--config", str(recipe)])


def test_what_is_no_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("tools.plan_run", ["stray"], monkeypatch).startswith("unexpected argument 'stray'")
    assert refused("tools.plan_run", ["-x"], monkeypatch).startswith("unexpected argument '-x'")
    assert "the following arguments are required: --input" in refused("tools.train_tokenizer", [], monkeypatch)


@pytest.mark.parametrize(("words", "message"), [
    ("--lr abc --train-iters x --zero-stage=two --bf16",
     "argument --lr: expected a number, found 'abc'; "
     "argument --train-iters: expected a whole number such as 3000, 300K or 157e9, found 'x'; "
     "argument --zero-stage: expected a whole number such as 3000, 300K or 157e9, found 'two'; see --help"),
    ("--lr abc --lrr 1", "unknown flag --lrr (did you mean --lr?); argument --lr: expected a number, found 'abc'; "
     "see --help"),
    ("--mock-data --lr abc", "--mock-data is not a flag here: make a small corpus: bash scripts/prepare_corpus.sh "
     "DIRECTORY; argument --lr: expected a number, found 'abc'"),
    ("--lr abc --optimizer sgd --train-iters", "argument --lr: expected a number, found 'abc'; --optimizer sgd is not "
     "offered here: AdamW is the only optimizer here; argument --train-iters: expected one argument"),
    ("on --model-size 2B --unset x", "argument --model-size: expected one of 117M, 345M, 774M, 1.5B, gpt3-125M, found "
     "'2B'; argument --unset: there is no setting x; unexpected argument 'on'; flags start with --, see --help"),
    ("--train-iters 0 --hidden-size 100 --adam-eps 0 --override x",
     "--hidden-size 100 must be a multiple of --num-attention-heads 12; --train-iters 0 must be at least 1; "
     "--adam-eps 0.0 must be positive"),
])  # fmt: skip
def test_all_that_is_wrong_is_told_at_once(words: str, message: str) -> None:
    with pytest.raises(CommandLineError) as caught:
        parse_config(build_parser(), words.split())
    assert str(caught.value) == message


def test_a_parser_forgets_what_it_told() -> None:
    parser = build_parser()
    for _ in range(2):
        with pytest.raises(CommandLineError, match=r"^unknown flag --lrr .did you mean --lr.*; see --help$"):
            parser.parse_args(["--lrr", "1"])
        with pytest.raises(CommandLineError, match=r"^argument --lr: expected a number, found 'x'; see --help$"):
            parser.parse_known_args(["--lr", "x", "--lrr"])
    assert parser.parse_args(["--lr", "1"]).lr == 1


def test_what_is_missed_is_told_beside_wrong_values_and_not_beside_misspelt_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = refused("tools.train_tokenizer", ["--vocab-size", "x"], monkeypatch)
    assert message.startswith("argument --vocab-size: expected a whole number ")
    assert message.endswith("; the following arguments are required: --input, --output; see --help")
    message = refused("tools.train_tokenizer", ["--inputt", "x"], monkeypatch)
    assert message == "unknown flag --inputt (did you mean --input?); see --help"


def test_all_wrong_values_of_a_recipe_are_named_with_it(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: x\ntrain-iters: y\n")
    with pytest.raises(
        CommandLineError, match=r"^--config .*r\.yaml: argument --lr: .*; argument --train-iters: [^;]*; "
    ):
        parse_config(build_parser(), ["--config", str(recipe), "--min-lr", "z"])


@pytest.mark.parametrize(("words", "message"), [
    ("--lr -1e-4", "--lr -0.0001 must not be negative"),
    ("--train-iters -3K", "--train-iters -3000 must be at least 1"),
    ("--lr -.5", "--lr -0.5 must not be negative"),
    ("--lr -inf", "argument --lr: expected a number, found '-inf'"),
    ("--lr -NaN", "argument --lr: expected a number, found '-NaN'"),
])  # fmt: skip
def test_a_negative_number_is_no_flag(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(build_parser(), ["--train-iters", "1", *words.split()])


@pytest.mark.parametrize("text", ["-3", "1.5", "x", ""])
def test_a_count_must_be_a_whole_number(text: str) -> None:
    assert flags.positive("1.5K") == flags.count("1.5K") == 1500 and flags.count("0") == 0
    for kind in (flags.positive, flags.count):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number"):
            kind(text)


@pytest.mark.parametrize(
    ("kind", "text"), [(flags.positive, "0"), (flags.positive_number, "0"), (flags.positive_number, "-1e-3")]
)
def test_a_number_that_must_be_positive(kind: Callable[[str], float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected a .*number (from 1|above 0), found '{text}'"):
        kind(text)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_number_is_read_by_the_shared_types(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for action in parser_of(program, monkeypatch)._actions:
        flag = "/".join(action.option_strings)
        if action.metavar in ("N", "K"):
            assert action.type("1.5K") == 1500, flag
            with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number"):
                action.type("1.5")
        elif action.metavar in ("X", "MB", "GB", "PPL", "T", "P"):
            assert action.type("1.5") == 1.5, flag
            for text in ("nan", "inf", "x"):
                with pytest.raises(argparse.ArgumentTypeError, match="expected a number"):
                    action.type(text)
        else:
            assert action.type not in (int, float), flag


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_defaults_in_one_way(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parser_of(program, monkeypatch)
    text = parser.format_help()
    assert "(default: None)" not in text and not re.search(r"\(default: [\d.]+\)", text)
    for action in parser._actions:
        if action.nargs == 0 or action.default in (None, argparse.SUPPRESS, []) or action.help == argparse.SUPPRESS:
            continue
        default = " ".join(action.default) if isinstance(action.default, list) else action.default
        shown = f"[{default:g}]" if isinstance(default, float) else f"[{default}]"
        assert shown in "".join(text.split("\n")), action.option_strings


def test_switches_of_a_run_show_their_defaults() -> None:
    text = " ".join(build_parser().format_help().split())
    assert "(weights and optimizer stay fp32). [off]" in text and "--test, --no-test Evaluate on the test split" in text
    assert "when training ends. [on]" in text


@pytest.mark.parametrize(
    ("default", "shown"),
    [(None, ""), (argparse.SUPPRESS, ""), ([], ""), (True, " [on]"), (0, " [0]"), (50_000_000, " [50M]"),
     (1e-8, " [1e-08]"), (2.0**32, " [4294967296]"), (["a", "b"], " [a b]"), ("50%", " [50%%]")],
)  # fmt: skip
def test_defaults_are_put_behind_the_text(default: object, shown: str) -> None:
    assert with_default("text", default) == "text" + shown


@pytest.mark.parametrize(("program", "own"), [("tools.plan_run", "--gpu-memory"), ("tools.tune_pacing", "--tolerance")])
def test_a_tools_own_flags_come_first(program: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = parser_of(program, monkeypatch).format_help()
    assert text.index(f"\n  {own}") < text.index("\n  --config") < text.index("\nModel:")


# Files to write


def test_a_file_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe", "new", "new/folder/file"):
        assert flags.output_file(str(tmp_path / name)) == tmp_path / name
    assert not (tmp_path / "new").exists()
    for name, message in [("", "found the directory .*: name a file in it"), ("file/x", "file' is no directory")]:
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            flags.output_file(f"{tmp_path}/{name}")
    with pytest.raises(argparse.ArgumentTypeError, match="found an empty one"):
        flags.output_file("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # which root is not refused
    for name in ("file", "new/file"):
        with pytest.raises(argparse.ArgumentTypeError, match="no permission to write in"):
            flags.output_file(str(tmp_path / name))
    with pytest.raises(argparse.ArgumentTypeError, match="pipe' cannot be written"):
        flags.output_file(str(tmp_path / "pipe"))
    with pytest.raises(argparse.ArgumentTypeError, match="no permission to write in"):
        flags.output_directory(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match="no permission to write in"):
        flags.output_prefix(str(tmp_path / "corpus"))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("tools.compare_runs", "run --output {}"),
        ("tools.compare_runs", "run --html {}"),
        ("tools.collect_stdlib", "{}"),
        ("tools.evaluate_zeroshot", "--task LAMBADA --load x --output {}"),
        ("tools.generate_samples_gpt2", "--load x --sample-output-file {}"),
        ("tools.convert_checkpoint", "--load x --to safetensors --output {}"),
    ],
)
def test_a_directory_where_a_file_is_expected(
    program: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(program, words.format(tmp_path).split(), monkeypatch)
    assert f"expected a file to write, found the directory '{tmp_path}': name a file in it" in message


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("tools.train_tokenizer", "--input x --vocab-size 300 --output {}"),
        ("tools.preprocess_data", "--input x --output-prefix {}/x"),
        ("tools.convert_checkpoint", "--load x --to hf --save {}"),
    ],
)
def test_a_file_where_a_directory_is_expected(
    program: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert "file' is no directory" in refused(program, words.format(tmp_path / "file").split(), monkeypatch)


# Around the command line


def test_a_recipe_of_the_warmup_becomes_a_baseline_with_what_the_message_says() -> None:
    words = ["--config", str(ROOT / "recipes/gpt2-117m-b4k-slw30k.yaml"), "--seqlen-warmup", "none"]
    with pytest.raises(CommandLineError, match="where a recipe has set") as refusal:
        parse_config(build_parser(), words)
    unset = re.findall(r"--unset [a-z-]+", str(refusal.value))
    config, _ = parse_config(build_parser(), [*words, *" ".join(unset).split()])
    assert config.seqlen_warmup.seqlen_warmup == "none" and unset


def test_programs_without_a_model_start_without_torch() -> None:
    code = f"import importlib, sys; [importlib.import_module(name) for name in {WITHOUT_TORCH}]; "
    code += "assert 'torch' not in sys.modules; import megatron.flags"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_ctrl_c_while_a_program_is_imported_is_one_line(tmp_path: Path) -> None:
    """Of a program of ours; what others do with it is theirs."""
    (tmp_path / "megatron").mkdir()
    shutil.copy(ROOT / "megatron/__init__.py", tmp_path / "megatron")
    for name in ("pretrain_gpt2.py", "tools/compare_runs.py", "foreign.py"):
        program = tmp_path / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("import sys; sys.path.insert(0, '.'); import megatron; raise KeyboardInterrupt\n")
        cwd = tmp_path if name != "foreign.py" else ROOT
        done = subprocess.run([sys.executable, str(program)], cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGINT
        assert (done.stderr == "error: interrupted\n") == (name != "foreign.py"), done.stderr
