"""Raw text to datasets: keys, ends of documents, what may be skipped, any number of workers, killed workers, memory."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from raw_text import TEXTS, decoded, jsonl, pack, run

from megatron.data import preprocessing
from megatron.data.chunks import CHUNK_BYTES, ReadPosition, find_inputs, read_chunks
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.preprocessing import PreprocessConfig
from megatron.errors import UserError
from megatron.tokenizer.build import TokenizerFiles
from megatron.tokenizer.training import TrainedTokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tiny_tokenizer: TrainedTokenizer) -> TokenizerFiles:
    return TokenizerFiles("GPT2BPETokenizer", str(tiny_tokenizer.vocab_file), str(tiny_tokenizer.merge_file))


def tool(name: str, *arguments: object, cwd: Path | None = None, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, **options)


class TestDatasets:
    def test_several_keys(self, files, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"title": "T1", "text": "one"}\n{"text": "two", "title": "T2"}\n')
        summary = run(files, tmp_path, tmp_path / "a.jsonl", json_keys=("title", "text"))
        assert [Path(prefix).name for prefix in summary.prefixes] == ["d_title_document", "d_text_document"]
        assert decoded(files, tmp_path / "out/d_title_document") == ["T1", "T2"]
        assert decoded(files, tmp_path / "out/d_text_document") == ["one", "two"]

    def test_end_of_document(self, files, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
        run(files, tmp_path, tmp_path / "a.jsonl", append_eod=True)
        dataset, tokenizer = IndexedDataset(tmp_path / "out/d_text_document"), files.build()
        expected = [[*tokenizer.encode(text), tokenizer.eod] for text in TEXTS]
        assert [dataset.read_document(i).tolist() for i in range(5)] == expected

    def test_tokenizer_json(self, files, tiny_tokenizer, tmp_path):
        other = TokenizerFiles("HFTokenizer", tokenizer_file=tiny_tokenizer.tokenizer_file)
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
        run(files, tmp_path / "1", tmp_path / "a.jsonl")
        run(other, tmp_path / "2", tmp_path / "a.jsonl")
        for ending in (".bin", ".idx"):
            one, two = (tmp_path / n / f"out/d_text_document{ending}" for n in "12")
            assert one.read_bytes() == two.read_bytes()

    def test_the_number_that_may_be_skipped(self, files, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes((b"{}\n" + jsonl(["x"])) * 5)
        assert len(run(files, tmp_path, path, skip_bad=5).skipped) == 5
        with pytest.raises(UserError, match=r"a\.jsonl:9: .*one more than the 4 bad documents that --skip-bad allows"):
            run(files, tmp_path, path, skip_bad=4)
        assert IndexedDataset(tmp_path / "out/d_text_document").document_count == 5  # what stood there before

    def test_a_bad_key_leaves_out_the_whole_record(self, files, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"a": "1", "b": "1"}\n{"a": "2", "b": ""}\n{"a": "3", "b": "3"}\n')
        run(files, tmp_path, tmp_path / "a.jsonl", json_keys=("a", "b"), skip_bad=1)
        for key in "ab":
            assert decoded(files, tmp_path / f"out/d_{key}_document") == ["1", "3"]

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"workers": 0}, "--workers must be at least 1"),
            ({"log_interval": -1}, "--log-interval"),
            ({"skip_bad": -1}, "--skip-bad"),
            ({"max_document_mb": 0}, "--max-document-mb"),
            ({"json_keys": ("a", "a")}, "--json-keys must be different"),
            ({"json_keys": ("../a",)}, "--json-keys '../a' cannot be part of a file name"),
        ],
    )
    def test_flags(self, files, changes, match):
        with pytest.raises(UserError, match=match):
            PreprocessConfig(**{"input": ["a"], "output_prefix": "d", "tokenizer": files, **changes})

    def test_memory_is_bounded_by_the_largest_document_that_is_allowed(self, files, tmp_path):
        """One line of 256 MB, packed to 250 KB: refused before it is in memory."""
        path = tmp_path / "a.jsonl.gz"
        with gzip.open(path, "wb", compresslevel=1) as stream:
            stream.write(b'{"text": "')
            for _ in range(256):
                stream.write(b"a" * 1_000_000)
        script = (
            "import runpy, sys; del sys.argv[0]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally: print(*[l for l in open('/proc/self/status') if l.startswith('VmHWM')])\n"
        )
        command = [sys.executable, "-c", script, str(ROOT / "tools/preprocess_data.py"), "--input", str(path)]
        flags = ["--vocab-file", files.vocab_file, "--merge-file", files.merge_file, "--max-document-mb", "8"]
        done = subprocess.run(
            [*command, *flags, "--output-prefix", str(tmp_path / "d")], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "a.jsonl.gz:1: the document is larger than --max-document-mb 8" in done.stderr
        if not done.stdout:
            pytest.skip("needs VmHWM in /proc/self/status to measure the peak")
        assert int(done.stdout.split()[1]) < 200_000  # KiB


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """About 6 MB in three files: several chunks for every worker."""
    directory = tmp_path_factory.mktemp("corpus")
    source = Path(__file__).read_text(encoding="utf-8")
    for number in range(3):
        texts = [source[i % 5000 : i % 5000 + 40 + 97 * i % 4000] for i in range(number, 3000, 3)]
        pack(directory / f"{number}.jsonl", jsonl(texts))
    return directory


class TestWorkers:
    def test_the_files_do_not_depend_on_their_number(self, files, corpus, tmp_path):
        for workers in (1, 2, 3):
            run(files, tmp_path / str(workers), corpus / "*.jsonl", workers=workers, append_eod=True)
        for ending in (".bin", ".idx", ".json"):
            contents = {(tmp_path / n / f"out/d_text_document{ending}").read_bytes() for n in "123"}
            assert len(contents) == 1

    def test_nor_does_the_first_error(self, files, corpus, tmp_path):
        bad = pack(tmp_path / "bad.jsonl", (corpus / "0.jsonl").read_bytes() + b"{}\n[]\n")
        worse = pack(tmp_path / "worse.jsonl", b"broken\n")
        for workers in (1, 2):
            with pytest.raises(UserError, match=r"bad\.jsonl:1001: has no key"):
                run(files, tmp_path, corpus / "1.jsonl", bad, worse, workers=workers)
            assert list((tmp_path / "out").iterdir()) == []
            with pytest.raises(UserError, match=r"worse\.jsonl:1: "):
                run(files, tmp_path, corpus / "1.jsonl", bad, worse, workers=workers, skip_bad=2)

    def start(self, files: TokenizerFiles, tmp_path: Path) -> subprocess.Popen[str]:
        """The tool on a pipe that never ends, so that it is at work until something happens to it."""
        os.mkfifo(tmp_path / "a.jsonl")
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(tmp_path / "a.jsonl")]
        flags = ["--vocab-file", files.vocab_file, "--merge-file", files.merge_file, "--log-interval", "1"]
        process = subprocess.Popen(
            [*command, *map(str, flags), "--output-prefix", str(tmp_path / "d"), "--workers", "2"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def feed() -> None:
            try:
                with (tmp_path / "a.jsonl").open("wb", buffering=0) as stream:
                    while True:
                        stream.write(jsonl(["some words to encode " * 1000] * 20))
            except BrokenPipeError:
                pass

        threading.Thread(target=feed, daemon=True).start()
        assert process.stderr is not None
        assert "documents" in process.stderr.readline()
        return process

    def workers_of(self, process: subprocess.Popen[str]) -> list[int]:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("needs /proc/PID/task/PID/children to find the workers")
        found = [int(child) for child in children.read_text().split()]
        return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def test_a_killed_worker_is_an_error_within_seconds(self, files, tmp_path):
        process = self.start(files, tmp_path)
        workers = self.workers_of(process)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1
        message = errors.strip().split("\n")[-1]
        assert message.startswith("error: a worker process died") and f"{tmp_path / 'a.jsonl'} from record" in message
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]

    def test_killed_itself_it_leaves_no_worker_and_no_final_name(self, files, tmp_path):
        process = self.start(files, tmp_path)
        workers = self.workers_of(process)
        process.kill()
        process.communicate(timeout=30)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
        assert {path.name for path in tmp_path.iterdir()} <= {"a.jsonl", "d_text_document.bin.tmp"}
        (tmp_path / "a.jsonl").unlink()
        path = pack(tmp_path / "a.jsonl", jsonl(TEXTS))
        tool(
            "preprocess_data.py",
            "--input",
            path,
            "--output-prefix",
            tmp_path / "d",
            "--vocab-file",
            files.vocab_file,
            "--merge-file",
            files.merge_file,
        )
        assert decoded(files, tmp_path / "d_text_document") == TEXTS
        assert not (tmp_path / "d_text_document.bin.tmp").exists()


def test_a_dataset_that_is_there_is_replaced_only_where_that_is_asked_for(files, tmp_path):
    first, second = (pack(tmp_path / name, jsonl(texts)) for name, texts in (("a.jsonl", TEXTS), ("b.jsonl", ["new"])))
    prefix = run(files, tmp_path, first, overwrite=False).prefixes[0]
    with pytest.raises(UserError) as refused:
        run(files, tmp_path, second, overwrite=False)
    assert str(refused.value) == (
        f"{prefix}.idx is already there: choose another --output-prefix, or replace it with --overwrite"
    )
    assert decoded(files, prefix) == TEXTS
    run(files, tmp_path, second, overwrite=True)
    assert decoded(files, prefix) == ["new"]


def test_a_run_stopped_between_two_keys_goes_on_over_its_own_output(files, tmp_path, monkeypatch):
    path = pack(tmp_path / "a.jsonl", b'{"title": "t", "text": "x"}\n')
    monkeypatch.setattr(preprocessing, "SAVE_SECONDS", 0.0)
    commit, committed = IndexedDatasetWriter._commit, []

    def stopped(writer: IndexedDatasetWriter) -> None:
        if committed:
            raise KeyboardInterrupt
        commit(writer)
        committed.append(writer.prefix)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IndexedDatasetWriter, "_commit", stopped)
        run(files, tmp_path, path, json_keys=["title", "text"], overwrite=False)
    assert Path(f"{committed[0]}.idx").exists()
    summary = run(files, tmp_path, path, json_keys=["title", "text"], overwrite=False)
    assert [decoded(files, prefix) for prefix in summary.prefixes] == [["t"], ["x"]]


def shares(text: str) -> list[str]:
    """The percentage of each progress line."""
    return re.findall(r"(\d+)% done", text)


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_the_percentage_is_of_what_is_encoded_not_of_what_is_read(files, tmp_path, monkeypatch, capsys, ending):
    """Five equal chunks in two files, all of them read before the first is encoded."""
    chunk = b"".join(b"%0255d\n" % number for number in range(CHUNK_BYTES // 256))
    inputs = [pack(tmp_path / f"a{ending}", chunk), pack(tmp_path / f"b{ending}", 4 * chunk)]

    def after_all_is_read(chunks, config, tokenizer):
        yield from (
            preprocessing._Encoded(item.size, 1, [np.ones(1, int)], [np.ones(1, int)], []) for item in list(chunks)
        )

    monkeypatch.setattr(preprocessing, "_encode_all", after_all_is_read)
    run(files, tmp_path, *inputs, text_unit="line", log_interval=1)
    found = [int(share) for share in shares(capsys.readouterr().err)]
    assert len(found) == 5 and found[-1] == 100 and found == sorted(set(found)), found
    if ending == ".txt":
        assert found == [20, 40, 60, 80, 100]


def test_of_a_run_that_goes_on_it_is_of_what_was_left(tmp_path):
    """Two files, of which the first and half of the second were done before."""
    line = b"x" * (CHUNK_BYTES - 1) + b"\n"
    inputs = find_inputs([str(pack(tmp_path / name, 4 * line)) for name in ("a.txt", "b.txt")], None, "line")
    position = ReadPosition(items=[4])
    seen = []
    for _ in read_chunks(inputs, ["text"], 1 << 23, position, skip=2):
        position.done()
        seen.append(position.fraction())
    assert seen == [0.5, 1.0]


class TestTools:
    def test_train_preprocess_inspect_from_any_directory(self, corpus, tmp_path):
        trained = tool(
            "train_tokenizer.py", "--input", corpus / "*.jsonl", "--vocab-size", 500, "--output", "tok", cwd=tmp_path
        )
        assert trained.returncode == 0, trained.stderr
        assert "500 tokens" in trained.stdout
        *lines, last = trained.stderr.splitlines()
        assert shares(trained.stderr) == ["33", "66", "100"] and len(lines) == 3, trained.stderr
        assert last == "note: all text is read; the merges are being learnt"
        again = tool("train_tokenizer.py", "--input", "no.jsonl", "--vocab-size", 300, "--output", "tok", cwd=tmp_path)
        assert again.stderr == (
            "error: tok/tokenizer.json is already there: choose another --output, or replace it with --overwrite\n"
        )
        again = tool(
            "train_tokenizer.py", "--input", corpus / "*.jsonl", "--vocab-size", 500, "--output", "tok", "--overwrite",
            "--log-interval", 0, cwd=tmp_path,
        )  # fmt: skip
        assert (again.returncode, again.stderr) == (0, "")
        made = tool(
            "preprocess_data.py",
            "--input",
            corpus / "0.jsonl",
            corpus / "1.jsonl",
            "--output-prefix",
            "data/d",
            "--tokenizer-type",
            "HFTokenizer",
            "--tokenizer-file",
            "tok/tokenizer.json",
            "--append-eod",
            "--workers",
            2,
            "--log-interval",
            500,
            cwd=tmp_path,
        )
        assert made.returncode == 0, made.stderr
        assert made.stdout.startswith("2,000 documents, ")
        assert "MB/s" in made.stderr and "left" in made.stderr and "\r" not in made.stderr
        shown = tool(
            "inspect_data.py",
            "data/d_text_document",
            "--vocab-file",
            "tok/vocab.json",
            "--merge-file",
            "tok/merges.txt",
            "--documents",
            2,
            cwd=tmp_path,
        )
        assert shown.returncode == 0, shown.stderr
        for expected in ("of uint16", "documents  2,000", "at the end of 2,000 documents", "median", "document 1999 ("):
            assert expected in shown.stdout
        assert "Raw text to datasets" in shown.stdout
        refused = tool("inspect_data.py", "data/d_text_document", "--documents", -1, cwd=tmp_path)
        assert refused.returncode == 1 and "--documents: expected a whole number from 0, found '-1'" in refused.stderr
        assert "Traceback" not in refused.stderr
        plain = tool("inspect_data.py", "data/d_text_document", cwd=tmp_path)
        assert plain.returncode == 0 and "document 0 (" in plain.stdout

    @pytest.mark.parametrize("unit", ["file", "paragraph"])
    def test_one_text_file_that_became_one_document_is_said(self, files, tmp_path, unit):
        (tmp_path / "a.txt").write_text("one paragraph\n")
        made = tool(
            "preprocess_data.py", "--input", "a.txt", "--output-prefix", "a", "--text-unit", unit, "--vocab-file",
            files.vocab_file, "--merge-file", files.merge_file, cwd=tmp_path,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        assert ("note: one plain text file is one document" in made.stderr) == (unit == "file")

    def test_errors_are_one_line(self, files, tmp_path):
        for name, arguments in [
            (
                "preprocess_data.py",
                [
                    "--input",
                    "no.jsonl",
                    "--output-prefix",
                    "d",
                    "--vocab-file",
                    files.vocab_file,
                    "--merge-file",
                    files.merge_file,
                ],
            ),
            ("preprocess_data.py", ["--input", "no.jsonl", "--output-prefix", "d"]),
            ("train_tokenizer.py", ["--input", "no.jsonl", "--output", "d", "--vocab-size", "300"]),
            ("inspect_data.py", ["d"]),
        ]:
            done = tool(name, *arguments, cwd=tmp_path)
            assert done.returncode == 1
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_inspect_refuses_another_tokenizer(self, files, tmp_path):
        summary = run(files, tmp_path, pack(tmp_path / "a.jsonl", jsonl(TEXTS)), append_eod=True)
        trained = tool(
            "train_tokenizer.py", "--input", tmp_path / "a.jsonl", "--vocab-size", 257, "--output", tmp_path / "t"
        )
        assert trained.returncode == 0, trained.stderr
        done = tool("inspect_data.py", summary.prefixes[0], "--tokenizer-file", tmp_path / "t/tokenizer.json")
        assert done.returncode == 1 and "holds token id 399, but the tokenizer has 257" in done.stderr


def test_books_come_back_exactly(shared_data, tmp_path):
    """The first 500 chapters of the books, through two workers and GPT-2's vocabulary."""
    with gzip.open(shared_data / "books-100mb.jsonl.gz", "rb") as stream:
        lines = [stream.readline() for _ in range(500)]
    path = pack(tmp_path / "books.jsonl.gz", b"".join(lines))
    files = TokenizerFiles(vocab_file=shared_data / "gpt2-vocab.json", merge_file=shared_data / "gpt2-merges.txt")
    run(files, tmp_path, path, workers=2)
    assert decoded(files, tmp_path / "out/d_text_document") == [json.loads(line)["text"] for line in lines]
