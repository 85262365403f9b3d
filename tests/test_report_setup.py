"""What a report says of the runs before any result, from the configurations that real runs write."""

from __future__ import annotations

import os
from pathlib import Path

from synthetic_runs import write_losses
from whole_runs import toy_corpus

from megatron.arguments import build_parser, parse_config, to_yaml
from megatron.instability.setup import Setup, setup_of
from megatron.instability.summary import read_runs

RECIPES = Path(__file__).parents[1] / "recipes"


def started(home: Path, recipe: str, *flags: str) -> str:
    """The directory of a run of a recipe, with its resolved configuration and a step."""
    write_losses(home, [2.0])
    argv = ["--config", str(RECIPES / recipe), *flags, "--save", str(home), "--load", str(home)]
    (home / "config.yaml").write_text(to_yaml(parse_config(build_parser(), argv)[0]))
    os.utime(home / "metrics.jsonl", (1e9, 1e9))
    return str(home)


def setup(*directories: str) -> Setup:
    return setup_of(read_runs(directories))


def test_two_runs_of_the_quickstart(tmp_path: Path) -> None:
    """What was chosen for the warmup, and none of its settings that both have by default."""
    corpus = toy_corpus(tmp_path, documents=12, tokens=100, vocabulary=50)
    flags = ("--data-path", corpus, "--vocab-size", "4096")
    found = setup(*(started(tmp_path / name, f"quickstart/{name}.yaml", *flags) for name in ("baseline", "slw")))
    assert dict(found.facts) == {
        "model": "4 layers, hidden size 128, 4 attention heads",
        "parameters": "1.35M with a vocabulary of 4,096",
        "full length": "256 tokens",
        "data": "toy_text_document (1.20K tokens, 12 documents); training, validation and test split 90,5,5",
        "trained for": "1.20M tokens",
        "batch": "32 sequences",
        "learning rate": "1e-2 cosine to 0 over 1.20M tokens, warmup 20 steps",
        "arithmetic": "fp32",
        "seed": "1234",
    }
    flags = ("--seqlen-warmup", "--seqlen-start", "--seqlen-warmup-iters")
    assert found.table.header == ("run", *flags, "log last written (UTC)")
    assert [row.cells for row in found.table.rows] == [
        ("baseline", "none", "-", "-", "2001-09-09 01:46"),
        ("slw", "linear", "32", "100", "2001-09-09 01:46"),
    ]
    assert found.table.note.startswith("The settings in which the runs differ") and not found.table.footnotes


def test_what_differs_is_told_run_by_run(tmp_path: Path) -> None:
    small = started(tmp_path / "small", "quickstart/baseline.yaml", "--vocab-size", "50")
    large = started(tmp_path / "large", "quickstart/baseline.yaml", "--vocab-size", "90", "--seed", "7", "--bf16")
    found = setup(small, large)
    assert not {"parameters", "seed", "arithmetic"} & set(dict(found.facts))
    assert found.table.header[1:-1] == ("--seed", "--bf16", "--vocab-size", "parameters")
    assert found.table.rows[1].cells[1:-1] == ("7", "true", "90", "838K with a vocabulary of 90")


def test_a_start_that_a_warmup_does_not_have(tmp_path: Path) -> None:
    slw = started(tmp_path / "slw", "quickstart/slw.yaml")
    stages = ("--seqlen-warmup", "discrete", "--seqlen-stages", "32:80,256")
    found = setup(slw, started(tmp_path / "two-stage", "quickstart/baseline.yaml", *stages))
    rows = [dict(zip(found.table.header, row.cells, strict=True)) for row in found.table.rows]
    assert [(row["--seqlen-start"], row["--seqlen-stages"]) for row in rows] == [("32", "-"), ("-", "32:80,256")]


def test_runs_of_one_setting(tmp_path: Path) -> None:
    found = setup(*(started(tmp_path / name, "quickstart/slw.yaml") for name in ("a", "b")))
    assert found.table.note.startswith("No setting differs")
    assert dict(found.facts)["parameters"] == "not known without the data or the tokenizer"
    assert dict(found.facts)["data"].startswith("-; ")
    assert found.table.header == ("run", "log last written (UTC)")


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    whole = started(tmp_path / "whole", "quickstart/slw.yaml")
    broken = started(tmp_path / "broken", "quickstart/slw.yaml")
    (tmp_path / "broken" / "config.yaml").write_text("nonsense: 3\n")
    bare = str(write_losses(tmp_path / "bare", [2.0]))
    start = started(tmp_path / "start", "quickstart/slw.yaml")
    (tmp_path / "start" / "config.yaml").write_text("train-iters: 1\nseqlen-start: 16\n")
    found = setup(whole, broken, bare, start)
    assert [row.cells[-1].endswith(" *") for row in found.table.rows] == [False, True, True, True]
    first, second, third = found.table.footnotes
    assert first.startswith("* broken: its settings cannot be read: --config ") and "nonsense" in first
    assert second == "* bare: no config.yaml beside its log, so that its settings are not known"
    assert third.startswith(
        f"* start: its settings cannot be read: --config {start}/config.yaml: --seqlen-warmup none takes no --seqlen-st"
    )
    assert dict(found.facts)["seed"] == "1234"
    assert setup(bare).facts == () and not setup(bare).table.note.startswith("No setting")


def test_what_all_runs_warm_up_alike_is_said(tmp_path: Path) -> None:
    corpus = toy_corpus(tmp_path, documents=12, tokens=100, vocabulary=50)
    flags = ("--data-path", corpus, "--vocab-size", "4096", "--seed")
    found = setup(*(started(tmp_path / seed, "quickstart/slw.yaml", *flags, seed) for seed in ("1", "2")))
    assert dict(found.facts)["length warmup"] == "linear from 32 over 100 steps"
