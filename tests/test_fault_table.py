"""Faults from the first flag to the exit status: what the user is told, that it is one line, and what is left.

The programs run in this process, through the door that they use themselves (`megatron.errors.run`). The table of faults
in docs/reliability.md names a test for each row; the last test here holds it to that.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import test_faults
from full_disk import largest_file
from raw_text import TEXTS, jsonl, pack
from test_checkpoint_damage import SHARD, Canary, describe_again, rewrite_manifest
from test_faults import FLAGS, Forward, poison

import pretrain_gpt2
from megatron.checkpointing.manifest import FileEntry, read_manifest
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import EXIT_FINISHED, EXIT_STOPPED, run
from megatron.tokenizer.training import TrainedTokenizer
from megatron.training.owner import Owner
from megatron.training.stop import SIGNALLED_BY
from pretrain_gpt2 import forward_step
from tools import preprocess_data

ROOT = Path(__file__).parents[1]
CHECKPOINT = "checkpoints/iter_0000004"
TRAINING = [*FLAGS, "--lr-decay-iters", "20"]
corpus = test_faults.corpus


@dataclass(frozen=True)
class Ending:
    """How a program ended."""

    status: int
    output: str
    errors: str


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ending]:
    """Run a program's `main` with a command line, as it runs itself."""

    def starter(main: Callable[[], int | None], *arguments: object) -> Ending:
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            run(main)
        told = capsys.readouterr()
        return Ending(int(ending.value.code or 0), told.out, told.err)

    return starter


@pytest.fixture
def train(start: Callable[..., Ending]) -> Callable[..., Ending]:
    """Run pretrain_gpt2.py on a corpus in a home, which it goes on with."""
    return lambda corpus, home, *flags: start(
        pretrain_gpt2.main, "--data-path", corpus, "--save", home, "--load", home, *TRAINING, *flags
    )


@pytest.fixture(scope="module")
def finished(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps."""
    home = tmp_path_factory.mktemp("finished") / "run"
    assert test_faults.run(corpus, home, forward_step, "--lr-decay-iters", "20", "--train-iters", "4") == EXIT_FINISHED
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to spoil."""
    return shutil.copytree(finished, tmp_path / "run")


def require_one_line(ending: Ending, message: str) -> None:
    """Status 1, and one line that begins with error and matches `message`."""
    assert (ending.status, ending.errors.count("\n")) == (1, 1), ending
    assert re.match(rf"error: .*{message}", ending.errors), ending.errors


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below `directory` but those that tell of a start."""
    told = ("owner.json", "exit.json", "config.yaml")
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name not in told}


def cut_bin(corpus: Path, home: Path) -> None:
    os.truncate(f"{corpus}.bin", os.stat(f"{corpus}.bin").st_size - 2)


def cut_idx(corpus: Path, home: Path) -> None:
    os.truncate(f"{corpus}.idx", 50)


def exchange_bin(corpus: Path, home: Path) -> None:
    """For one of the same size."""
    tokens = np.fromfile(f"{corpus}.bin", dtype=np.uint16)
    tokens[::-1].tofile(f"{corpus}.bin")


def new_corpus(corpus: Path, home: Path) -> None:
    """Whole, and another."""
    with IndexedDatasetWriter(corpus, np.uint16) as writer:
        for length in range(10, 60):
            writer.add_document(np.arange(length))


def no_idx(corpus: Path, home: Path) -> None:
    os.unlink(f"{corpus}.idx")


def path_out_of_the_checkpoint(corpus: Path, home: Path) -> None:
    path = home / CHECKPOINT
    rewrite_manifest(path, read_manifest(path).files | {"../../../secret": FileEntry(6, "00000000")})


def link_out_of_the_checkpoint(corpus: Path, home: Path) -> None:
    shutil.move(home / CHECKPOINT / "state.json", home / "outside.json")
    (home / CHECKPOINT / "state.json").symlink_to(home / "outside.json")


def pickle_for_a_shard(corpus: Path, home: Path) -> None:
    (home / CHECKPOINT / SHARD).write_bytes(pickle.dumps(Canary(home / "sung")))
    describe_again(home / CHECKPOINT)


def state_of_an_older_version(corpus: Path, home: Path) -> None:
    """From before checkpoints knew of layouts."""
    path = home / CHECKPOINT / "state.json"
    state = json.loads(path.read_text())
    del state["layout"], state["adaptive_pacing"]
    path.write_text(json.dumps(state))
    describe_again(home / CHECKPOINT)


def nothing(corpus: Path, home: Path) -> None:
    pass


REFUSED = [
    (cut_bin, "", r"toy_text_document\.bin: expected 20000 bytes .*found 19998: .* cut short"),
    (cut_idx, "", r"toy_text_document\.idx: expected .* found 50"),
    (exchange_bin, "", r"\.bin: expected the file that toy_text_document\.json describes, found another"),
    (no_idx, "", r"toy_text_document\.idx: does not exist"),
    (new_corpus, "", r"other settings: data: checkpoint [0-9a-f]{12}, now [0-9a-f]{12}\. .*--override data"),
    (nothing, "--vocab-size 70", r"other settings: tokenizer: checkpoint .*64.*, now .*70.*--override tokenizer"),
    (nothing, "--seq-length 24", r"other settings: .*seq_length: checkpoint 16, now 24.*another run in a new --save"),
    (nothing, "--global-batch-size 32", r"global_batch_size: checkpoint 16, now 32.*--override global_batch_size"),
    (path_out_of_the_checkpoint, "", r"manifest\.json: '\.\./\.\./\.\./secret' is not a plain file name"),
    (link_out_of_the_checkpoint, "", r"state\.json: leads outside the checkpoint, to .*outside\.json"),
    (pickle_for_a_shard, "", r"cannot read the tensors of .*iter_0000004"),
    (
        state_of_an_older_version, "",
        r"iter_0000004/state\.json: expected adaptive_pacing, layout, found none: .* older trainer .*--finetune",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "flags", "message"), REFUSED)
def test_a_resume_with_what_does_not_fit_is_refused(corpus, train, home, tmp_path, spoil, flags, message) -> None:
    """In one line, with status 1, and nothing is changed."""
    copy = tmp_path / "data" / "toy_text_document"
    copy.parent.mkdir()
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{corpus}{ending}", f"{copy}{ending}")
    spoil(copy, home)
    before = contents(tmp_path)
    require_one_line(train(copy, home, *flags.split()), message)
    assert contents(tmp_path) == before


def test_the_same_resume_goes_on_where_nothing_is_wrong(corpus, train, home) -> None:
    """The control, with what a crash may leave: it is said and cleared away, and the run goes on."""
    shutil.copytree(home / CHECKPOINT, home / "checkpoints/iter_0000008.tmp-0123abcd")
    shutil.copytree(home / CHECKPOINT, home / "checkpoints/iter_0000002.gone-0123abcd")
    ending = train(corpus, home, "--train-iters", "8")
    assert (ending.status, ending.errors) == (0, "")
    assert "iter_0000008.tmp-0123abcd: deleted, a save that was not finished" in ending.output
    assert "iter_0000002.gone-0123abcd: deleted, what is left of a deleted checkpoint" in ending.output
    assert re.search(r"resumed from .*iter_0000004: step 4\n", ending.output)
    assert sorted(path.name for path in (home / "checkpoints").iterdir()) == ["iter_0000004", "iter_0000008", "latest"]


def test_a_second_run_in_the_same_directory_is_refused(corpus, train, home) -> None:
    before = contents(home)
    with Owner(home, print):
        ending = train(corpus, home)
        require_one_line(ending, rf"--save {home} is in use by process {os.getpid()} on .*: stop that run, or choose")
    assert contents(home) == before


def test_a_loss_that_is_not_finite_has_status_1(corpus, start, tmp_path) -> None:
    ending = start(lambda: test_faults.run(corpus, tmp_path / "run", poison(3)))
    require_one_line(
        ending, r"step 3: loss nan, .*samples 32 to 47 .*nothing was updated; the batch is in .*Lower --lr"
    )


FULL = [
    ("new", 1_000, "", r"cannot write .*/checkpoints: disk full", []),
    ("run", 30_000, "", r"cannot write .*iter_0000008\.tmp-\w+.*: disk full", ["iter_0000004", "latest"]),
    (
        "run", 8_000, "--save-interval 100 --train-iters 100",
        r"cannot write the run's log .*/metrics\.jsonl: disk full", ["iter_0000004", "latest"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "size", "flags", "message", "left"), FULL)
def test_a_full_disk_is_said_in_one_line_and_costs_nothing(
    corpus, train, home, name, size, flags, message, left
) -> None:
    """Before the first step, in a save, in the log."""
    directory = home.with_name(name)
    before = contents(directory / "checkpoints")
    with largest_file(size):
        require_one_line(train(corpus, directory, *flags.split()), message)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == left
    assert contents(directory / "checkpoints") == before
    assert train(corpus, directory, "--train-iters", "5").status == 0, "with room again it goes on"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a directory that nobody can write")
def test_a_directory_that_cannot_be_written_is_said_before_anything_is_built(corpus, train) -> None:
    ending = train(corpus, "/sys/kernel/run")
    require_one_line(ending, r"cannot write /sys/kernel/run.*; change its permissions or choose another directory")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jsonl(TEXTS[:2]) + b'{"text": ""}\n', r"a\.jsonl:3: 'text' is empty"),
        (jsonl(TEXTS[:2]) + b'{"text": "\xff"}\n', r"a\.jsonl:3: is not valid UTF-8"),
        (jsonl(TEXTS[:2]) + b"{broken\n", r"a\.jsonl:3: is not valid JSON"),
        (b"{}\n", r"a\.jsonl:1: has no key 'text'"),
        (b"", r"a\.jsonl: the file is empty"),
    ],
)
def test_a_bad_document_is_named_and_nothing_is_written(
    start, tiny_tokenizer: TrainedTokenizer, tmp_path, content, message
) -> None:
    path = pack(tmp_path / "a.jsonl", content)
    files = ("--vocab-file", tiny_tokenizer.vocab_file, "--merge-file", tiny_tokenizer.merge_file, "--log-interval", 0)
    ending = start(preprocess_data.main, "--input", path, "--output-prefix", tmp_path / "out/d", *files)
    require_one_line(ending, message)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.jsonl"]


def test_a_signal_through_the_launcher_is_not_passed_off_as_another(corpus, start, tmp_path, monkeypatch) -> None:
    """ds_train.sh sends SIGUSR1 to the processes, whatever it was sent."""
    monkeypatch.setenv(SIGNALLED_BY, "ds_train.sh")
    forward = Forward(lambda step, rows: os.kill(os.getpid(), signal.SIGUSR1) or 1.0)
    ending = start(lambda: test_faults.run(corpus, tmp_path / "run", forward))
    assert (ending.status, ending.errors) == (EXIT_STOPPED, "")
    assert "stopped by SIGUSR1 from ds_train.sh; saved at step " in ending.output
    assert json.loads((tmp_path / "run/exit.json").read_text())["reason"] == "SIGUSR1 from ds_train.sh"


def names_in(file: Path) -> set[str]:
    """test_name, or TestClass::test_name, of each test of a file."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {f"{prefix}{n.name}" for n in inner if isinstance(n, ast.FunctionDef) and n.name.startswith("test")}
    return found


def test_every_fault_that_is_promised_names_tests_that_exist() -> None:
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!fault |---)(.+) \|$", text.partition("## Faults")[2].partition("\n## ")[0], re.MULTILINE)
    assert len(rows) >= 22
    for row in rows:
        cells = row.split(" | ")
        assert len(cells) == 3, row
        names = re.findall(r"`(test_\w+\.py)::([\w:]+)`", cells[2])
        assert names and len(names) == cells[2].count("`") // 2, f"a test is named FILE::TEST: {row}"
        for file, name in names:
            assert name in names_in(ROOT / "tests" / file), f"{file} has no {name}"
