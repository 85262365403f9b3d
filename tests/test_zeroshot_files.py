"""The zero-shot tool: no file of the user's is lost, each flag reaches the result, a fault names its flag."""

from __future__ import annotations

import json
import multiprocessing
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import BrokenBarrierError

import pytest
from random_models import random_weights
from zeroshot_models import made_up_texts, write_lambada

from megatron.checkpointing.weights import named_vocabulary, save_weights
from megatron.config import TokenizerConfig
from megatron.errors import UserError
from megatron.evaluation.scoring import Piece
from megatron.instability import zeroshot_results
from megatron.instability.zeroshot_results import LAMBADA, WIKITEXT, read_results, write_result
from megatron.tokenizer.training import TrainedTokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tiny_tokenizer: TrainedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weights alone, of 32 tokens."""
    flags = TokenizerConfig(vocab_file=str(tiny_tokenizer.vocab_file), merge_file=str(tiny_tokenizer.merge_file))
    vocabulary = named_vocabulary(flags)
    assert vocabulary is not None
    home = tmp_path_factory.mktemp("run") / "run"
    save_weights(random_weights(vocabulary=vocabulary, std=0.1), home)
    return home


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """tools/evaluate_zeroshot.py, within this process."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate_zeroshot.py", *map(str, arguments), "--device", "cpu"])
        runpy.run_path(str(ROOT / "tools" / "evaluate_zeroshot.py"))["main"]()

    return call


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    path = tmp_path / "wiki.tokens"
    path.write_text(" . ".join(made_up_texts(8)))
    return path


def test_flags_reach_the_result(tool: Callable[..., None], run: Path, wiki: Path, tmp_path: Path) -> None:
    found = []
    for flags in ([], ["--dtype", "bf16"], ["--overlapping-eval", 8], ["--overlapping-eval", 32]):
        output = tmp_path / "result.json"
        tool("--task", WIKITEXT, "--load", run, "--valid-data", wiki, "--output", output, *flags)
        found.append(json.loads(output.read_text()))
    assert [result["dtype"] for result in found] == ["float32", "bfloat16", "float32", "float32"]
    assert [result["overlapping_eval"] for result in found] == [32, 32, 8, 32]
    assert found[2]["windows"] > found[0]["windows"] == found[3]["windows"]
    assert len({result["adjusted_perplexity"] for result in found[:3]}) == 3, "what was computed, not only noted"
    assert found[3]["adjusted_perplexity"] == found[0]["adjusted_perplexity"]


def test_results_of_all_tasks_are_not_written_over(tool: Callable[..., None], run: Path, wiki: Path) -> None:
    kept = run / "zeroshot.json"
    kept.write_text('{"LAMBADA": {"accuracy": 0.5}}')
    for output in (kept, run / "checkpoints" / ".." / "zeroshot.json"):
        with pytest.raises(UserError, match=r"--output .*zeroshot.json is where the run keeps the results of all"):
            tool("--task", WIKITEXT, "--load", run, "--valid-data", wiki, "--output", output)
    assert kept.read_text() == '{"LAMBADA": {"accuracy": 0.5}}'
    kept.unlink()


def test_the_text_is_not_written_over(tool: Callable[..., None], run: Path, wiki: Path, tmp_path: Path) -> None:
    before = wiki.read_text()
    (tmp_path / "link").symlink_to(wiki)
    for output in (wiki, tmp_path / "link"):
        with pytest.raises(UserError, match=rf"--output {output} would be written over --valid-data {wiki}: name an"):
            tool("--task", WIKITEXT, "--load", run, "--valid-data", wiki, "--output", output)
    assert wiki.read_text() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "WIKITEXT103,LAMBADA"], "--task WIKITEXT103,LAMBADA: WIKITEXT103 is evaluated by itself: give one"),
        (["--task", "piqa,LAMBADA"], "--task piqa,LAMBADA: LAMBADA is evaluated by itself: give one at a time"),
        (["--task", "wikitext103"], "--task wikitext103: there is none; did you mean WIKITEXT103?"),
        (["--task", "lambada", "--valid-data", "x"], "drop --valid-data, or correct --task; did you mean LAMBADA?"),
        (["--task", LAMBADA, "--valid-data", "d/nothere"], "cannot be read (No such file or directory, seen from /"),
        (["--task", WIKITEXT, "--valid-data", "d/nothere"], "cannot be read (No such file or directory, seen from /"),
        (["--task", LAMBADA, "--valid-dat", "x"], "unknown flag --valid-dat (did you mean --valid-data?); see --help"),
    ],
)
def test_faults_name_the_flag(tool: Callable[..., None], run: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        tool("--load", run, *flags)
    assert "\n" not in str(caught.value)


def test_json_lines_are_no_wikitext(tool: Callable[..., None], run: Path, tmp_path: Path) -> None:
    data = write_lambada(tmp_path / "lambada.jsonl", ["the river", "told him"])
    data.write_text("\n" + data.read_text())
    with pytest.raises(
        UserError, match=r'lambada.jsonl: expected plain text, a wiki.test.tokens, found JSON lines: {"t'
    ):
        tool("--task", WIKITEXT, "--load", run, "--valid-data", data)
    data.write_text('{"a": 1}\n the river\n told him again')  # one such line may be of the text
    tool("--task", WIKITEXT, "--load", run, "--valid-data", data)


@pytest.mark.parametrize(("tokens", "targets"), [([1, 2], 0), ([1, 2], 2), ([], 0)])
def test_a_piece_predicts_something_from_something(tokens: list[int], targets: int) -> None:
    with pytest.raises(ValueError, match=r"expected 1 to tokens - 1"):
        Piece(tokens, targets)  # type: ignore[arg-type]


def keep(home: Path, task: str, barrier: object) -> None:
    """Write a result just when others do, with time between reading and writing for them to come between."""
    slow = zeroshot_results.read_results

    def reading(path: Path) -> dict:
        found = slow(path)
        with suppress(BrokenBarrierError):  # the lock lets only one in: nobody comes
            barrier.wait(0.5)  # type: ignore[attr-defined]
        return found

    zeroshot_results.read_results = reading
    write_result({"task": task}, load=home, output=None)


def test_the_directory_of_a_result_is_made(tmp_path: Path) -> None:
    output = tmp_path / "new" / "one" / "result.json"
    assert write_result({"task": "LAMBADA"}, load=tmp_path, output=output) == [output]
    assert json.loads(output.read_text()) == {"task": "LAMBADA"}


def test_evaluations_that_end_together_lose_no_result(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=keep, args=(tmp_path, task, barrier)) for task in (WIKITEXT, LAMBADA)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    assert set(read_results(tmp_path / "zeroshot.json")) == {WIKITEXT, LAMBADA}


def test_without_locks_a_result_is_kept_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    (tmp_path / "checkpoints").mkdir()
    write_result({"task": WIKITEXT}, load=tmp_path, output=None)
    assert set(read_results(tmp_path / "zeroshot.json")) == {WIKITEXT}
