"""Preprocessing that was stopped goes on where it was: killed anywhere, the same command ends with the same files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from raw_text import TEXTS, jsonl, pack, run

from megatron.data import chunks, preprocessing
from megatron.data.resuming import where_done
from megatron.errors import UserError
from megatron.tokenizer.build import TokenizerFiles
from megatron.tokenizer.training import TrainedTokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tiny_tokenizer: TrainedTokenizer) -> TokenizerFiles:
    return TokenizerFiles("GPT2BPETokenizer", str(tiny_tokenizer.vocab_file), str(tiny_tokenizer.merge_file))


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Five files, of one to six chunks of 64 bytes; the third and the fifth hold a bad document."""
    texts = [f"document {number} of the corpus" for number in range(12)]
    return [
        pack(tmp_path / "0.jsonl", jsonl(texts[:6])),
        pack(tmp_path / "1.txt", b"a short text"),
        pack(tmp_path / "2.jsonl", b"\n"),
        pack(tmp_path / "3.jsonl.gz", jsonl(texts[6:9])),
        pack(tmp_path / "4.jsonl.zst", jsonl(texts[9:]) + b"{}\n" + jsonl(TEXTS)),
    ]


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two documents, a point saved after each."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64)
    monkeypatch.setattr(preprocessing, "SAVE_SECONDS", 0.0)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "out").iterdir()}


def stop_after(monkeypatch: pytest.MonkeyPatch, items: int | None) -> list[int]:
    """Let the next runs be interrupted when they have encoded `items`; what each has encoded is counted."""
    real, counted = preprocessing._encode_all, [0]

    def encode_all(*arguments):
        for item in real(*arguments):
            if counted[0] == items:
                raise KeyboardInterrupt
            counted[0] += 1
            yield item

    monkeypatch.setattr(preprocessing, "_encode_all", encode_all)
    return counted


def interrupted(files, tmp_path, inputs, items, **changes) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, items)
        run(files, tmp_path, *inputs, **changes)


def test_it_goes_on_after_each_chunk_without_encoding_it_again(files, inputs, tmp_path, monkeypatch, caplog):
    counted = stop_after(monkeypatch, None)
    whole = run(files, tmp_path / "whole", *inputs, skip_bad=2, append_eod=True)
    total = counted[0]
    assert total == 9
    for items in range(1, total):
        trial = tmp_path / str(items)
        interrupted(files, trial, inputs, items, skip_bad=2, append_eod=True)
        assert {path.name for path in (trial / "out").iterdir()} == {
            f"d_text_document.{part}.tmp" for part in ("bin", "idx", "progress")
        }
        counted[0] = 0
        summary = run(files, trial, *inputs, skip_bad=2, append_eod=True)
        assert counted[0] == total - items
        assert contents(trial) == contents(tmp_path / "whole")
        assert [summary.documents, summary.tokens, summary.input_bytes, summary.skipped] == [
            *(whole.documents, whole.tokens, whole.input_bytes, whole.skipped)
        ]
    assert caplog.text.count("the same command goes on from what is saved") == total - 1


def test_finished_files_are_not_read_again(files, inputs, tmp_path):
    run(files, tmp_path / "whole", *inputs, skip_bad=2)
    interrupted(files, tmp_path, inputs, 5, skip_bad=2)
    state = inputs[0].stat()
    inputs[0].write_bytes(b"x" * state.st_size)
    os.utime(inputs[0], ns=(state.st_atime_ns, state.st_mtime_ns))
    run(files, tmp_path, *inputs, skip_bad=2)
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_stopped_again_and_again_with_any_number_of_workers(files, inputs, tmp_path):
    run(files, tmp_path / "whole", *inputs, skip_bad=2)
    for workers in (1, 2, 3):
        interrupted(files, tmp_path, inputs, 2, skip_bad=2, workers=workers)
    run(files, tmp_path, *inputs, skip_bad=2, workers=2)
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_several_keys(files, tmp_path):
    lines = [json.dumps({"a": f"a{n}", "b": f"another {n}"}).encode() + b"\n" for n in range(12)]
    path = pack(tmp_path / "0.jsonl", b"".join(lines))
    run(files, tmp_path / "whole", path, json_keys=("a", "b"))
    interrupted(files, tmp_path, [path], 3, json_keys=("a", "b"))
    assert len(contents(tmp_path)) == 5
    run(files, tmp_path, path, json_keys=("a", "b"))
    assert contents(tmp_path) == contents(tmp_path / "whole")


@pytest.mark.parametrize("change", ["input", "--json-keys", "tokenizer", "--append-eod", "--max-document-mb", "order"])
def test_something_else_begins_anew_and_says_so(files, tiny_tokenizer, inputs, tmp_path, caplog, change):
    interrupted(files, tmp_path, inputs, 4, skip_bad=20)
    changes: dict = {"skip_bad": 20}
    if change == "input":
        pack(inputs[0], inputs[0].read_bytes().replace(b"corpus", b"CORPUS"))
    elif change == "order":
        inputs = inputs[::-1]
    elif change == "--json-keys":
        pack(inputs[3], b'{"text": "x", "title": "y"}\n')
        changes["json_keys"] = ("text", "title")
    elif change == "tokenizer":
        files = TokenizerFiles("HFTokenizer", tokenizer_file=str(tiny_tokenizer.tokenizer_file))
    elif change == "--append-eod":
        changes["append_eod"] = True
    else:
        changes["max_document_mb"] = 1
    run(files, tmp_path / "whole", *inputs, **changes)
    caplog.clear()
    run(files, tmp_path, *inputs, **changes)
    named = {"order": "input", "--json-keys": "input, --json-keys"}.get(change, change)
    assert f"progress.tmp: not the same {named} as before: starting from the beginning" in caplog.text
    assert contents(tmp_path) == contents(tmp_path / "whole")


@pytest.mark.parametrize("part", ["bin", "idx", "progress"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damaged_parts_begin_anew_and_say_so(files, inputs, tmp_path, caplog, part, damage):
    run(files, tmp_path / "whole", *inputs, skip_bad=2)
    interrupted(files, tmp_path, inputs, 4, skip_bad=2)
    path = tmp_path / f"out/d_text_document.{part}.tmp"
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-3] ^= 1
        path.write_bytes({"flip": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    caplog.clear()
    run(files, tmp_path, *inputs, skip_bad=2)
    assert "going on" not in caplog.text
    assert ("starting from the beginning" in caplog.text) == ((part, damage) != ("progress", "gone"))
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_bad_documents_stop_it_and_a_larger_allowance_goes_on(files, inputs, tmp_path, monkeypatch):
    run(files, tmp_path / "whole", *inputs, skip_bad=2)
    with pytest.raises(UserError, match=r"2\.jsonl: the file is empty"):
        run(files, tmp_path, *inputs)
    counted = stop_after(monkeypatch, None)
    with pytest.raises(UserError, match=r"4\.jsonl\.zst:4: .*one more than the 1 bad"):
        run(files, tmp_path, *inputs, skip_bad=1)
    with pytest.raises(UserError, match=r"2\.jsonl: the file is empty.*--skip-bad N"):
        run(files, tmp_path, *inputs)  # the empty file was passed over before
    run(files, tmp_path, *inputs, skip_bad=2)
    assert counted[0] == 9 - 5 + 1  # the chunk with the second bad document twice
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_a_pipe_cannot_be_read_again_so_nothing_is_saved(files, tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    feeder = subprocess.Popen([sys.executable, "-c", _FEED, str(tmp_path / "a.jsonl"), *TEXTS[:3]])
    interrupted(files, tmp_path, [tmp_path / "a.jsonl"], 1)
    feeder.wait(timeout=30)
    assert contents(tmp_path) == {}


_FEED = (
    "import json, sys\n"
    "with open(sys.argv[1], 'w') as stream:\n"
    "    for text in sys.argv[2:]: print(json.dumps({'text': text}), file=stream)\n"
)


def test_where_done():
    assert where_done([], 3) == ([], 3)
    assert where_done([2, 1, 4], 2) == ([2], 0)
    assert where_done([2, 1, 4], 6) == ([2, 1], 3)
    assert where_done([2, 1, 4], 9) == ([2, 1, 4], 2)


_POINTS = """
import errno, json, os, shutil, signal, sys
from pathlib import Path
from raw_text import run
from megatron.data import chunks, preprocessing
from megatron.errors import UserError
from megatron.tokenizer.build import TokenizerFiles

scratch, vocab, merges, *inputs = sys.argv[1:]
scratch, files = Path(scratch), TokenizerFiles("GPT2BPETokenizer", vocab, merges)
chunks.CHUNK_BYTES, preprocessing.SAVE_SECONDS = 64, 0.0

def contents(directory):
    return {path.name: path.read_bytes() for path in (directory / "out").iterdir()}

def disturb(point, mode):
    count = [0]
    def wrap(real):
        def wrapped(*arguments):
            count[0] += 1
            if count[0] == point:
                if mode == "full":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)
        return wrapped
    for name in ("fsync", "rename", "replace", "unlink", "truncate"):
        setattr(os, name, wrap(getattr(os, name)))
    return count

def attempt(point, mode):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        sys.stderr = open(os.devnull, "w")
        count = disturb(point, mode)
        try:
            run(files, scratch, *inputs, skip_bad=2)
        except UserError:
            pass
        os.write(writing, json.dumps(count).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        return stream.read()

run(files, scratch / "whole", *inputs, skip_bad=2)
expected = contents(scratch / "whole")
(operations,) = json.loads(attempt(0, "none"))
wrong = []
for mode in ("kill", "full"):
    for point in range(1, operations + 1):
        shutil.rmtree(scratch / "out")
        attempt(point, mode)
        (scratch / "out").mkdir(exist_ok=True)
        left = set(contents(scratch))
        names = {name for name in left if not name.startswith(".") and not name.endswith(".tmp")}
        if names not in (set(), set(expected), set(expected) - {"d_text_document.idx"}, {"d_text_document.bin"}):
            wrong.append(f"{mode} {point} left {names}")
        attempt(0, "none")
        if contents(scratch) != expected:
            wrong.append(f"{mode} {point}: then {sorted(contents(scratch))}")
print(json.dumps([operations, wrong]))
"""


def test_killed_or_out_of_disk_at_every_file_operation(files, inputs, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _POINTS, str(tmp_path), files.vocab_file, files.merge_file, *map(str, inputs)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    operations, wrong = json.loads(done.stdout)
    assert operations > 50 and wrong == []


_KILLED = """
import sys
from megatron.data import chunks, preprocessing
preprocessing.SAVE_SECONDS = 0.0
sys.argv.pop(0)
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_program_killed_with_its_workers_goes_on(files, tmp_path):
    """kill -9 as soon as a point is there; then the same command, as users start it."""
    paths = [pack(tmp_path / f"{n}.jsonl", jsonl(["some words to encode " * 400] * 600)) for n in range(2)]
    arguments = [
        *(str(ROOT / "tools/preprocess_data.py"), "--input", *map(str, paths), "--workers", "2", "--log-interval", "0"),
        *("--vocab-file", str(files.vocab_file), "--merge-file", str(files.merge_file), "--output-prefix"),
    ]
    whole = subprocess.run([sys.executable, *arguments, str(tmp_path / "whole")], check=True, capture_output=True)
    assert whole.stderr == b""
    process = subprocess.Popen([sys.executable, "-c", _KILLED, *arguments, str(tmp_path / "d")])
    point = tmp_path / "d_text_document.progress.tmp"
    deadline = time.monotonic() + 60
    while not point.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    shutil.copy(point, tmp_path / "point")
    done = subprocess.run(
        [sys.executable, *arguments, str(tmp_path / "d")], check=True, capture_output=True, text=True, timeout=120
    )
    assert "going on after the first " in done.stderr
    for ending in (".bin", ".idx", ".json"):
        one, two = (tmp_path / f"{name}_text_document{ending}" for name in ("whole", "d"))
        assert one.read_bytes() == two.read_bytes()
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*"))
