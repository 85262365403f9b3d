"""Reading raw text: every input format, every bad input, records around the edges of the blocks."""

from __future__ import annotations

import gzip
import json
import os

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_text import TEXTS, decoded, jsonl, pack, run

from megatron.data import chunks
from megatron.data.chunks import CHUNK_BYTES, BadDocument, ReadPosition, find_inputs, read_chunks
from megatron.data.documents import Document, parse_chunk, read_texts
from megatron.data.indexed_dataset import IndexedDataset
from megatron.errors import UserError
from megatron.tokenizer.build import TokenizerFiles
from megatron.tokenizer.training import TrainedTokenizer


@pytest.fixture(scope="module")
def files(tiny_tokenizer: TrainedTokenizer) -> TokenizerFiles:
    return TokenizerFiles("GPT2BPETokenizer", str(tiny_tokenizer.vocab_file), str(tiny_tokenizer.merge_file))


class TestFormats:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson"])
    def test_json_lines(self, files, tmp_path, name):
        summary = run(files, tmp_path, pack(tmp_path / name, jsonl(TEXTS)))
        assert decoded(files, tmp_path / "out/d_text_document") == TEXTS
        dataset = IndexedDataset(summary.prefixes[0])
        assert (summary.documents, summary.tokens) == (5, dataset.num_tokens)
        assert dataset.dtype.name == "uint16"
        assert dataset.sidecar.tokenizer_fingerprint == files.build().fingerprint

    @pytest.mark.parametrize("end", [b"", b"\n", b"\n\n  \n"])
    def test_line_ends_blank_lines_and_byte_order_mark(self, files, tmp_path, end):
        content = b"\xef\xbb\xbf" + b"\r\n \n\n".join(json.dumps({"text": text}).encode() for text in TEXTS) + end
        run(files, tmp_path, pack(tmp_path / "a.jsonl", content))
        assert decoded(files, tmp_path / "out/d_text_document") == TEXTS

    @pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
    def test_plain_text_is_one_document(self, files, tmp_path, name):
        text = "first line\r\n\r\nthird \u00e9\n"
        run(files, tmp_path, pack(tmp_path / name, text.encode()))
        assert decoded(files, tmp_path / "out/d_text_document") == [text]

    def test_parquet(self, files, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.pa.table if hasattr(parquet, "pa") else pytest.importorskip("pyarrow").table
        texts = TEXTS * 200 + ["long " * 400_000]
        parquet.write_table(table({"n": range(len(texts)), "text": texts}), tmp_path / "a.parquet", row_group_size=300)
        run(files, tmp_path, tmp_path / "a.parquet")
        assert decoded(files, tmp_path / "out/d_text_document") == texts

    def test_several_members_in_one_packed_file(self, files, tmp_path):
        first, second = jsonl(TEXTS[:2]), jsonl(TEXTS[2:])
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(first) + gzip.compress(second))
        (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(first) + zstandard.compress(second))
        run(files, tmp_path, tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.zst")
        assert decoded(files, tmp_path / "out/d_text_document") == TEXTS * 2

    def test_several_files_and_globs_in_their_order(self, files, tmp_path):
        for name in ("b2", "b1", "a"):
            (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name]))
        (tmp_path / "[odd].txt").write_text("odd")
        run(files, tmp_path, tmp_path / "b*.jsonl", tmp_path / "a.jsonl", tmp_path / "[odd].txt")
        assert decoded(files, tmp_path / "out/d_text_document") == ["b1", "b2", "a", "odd"]

    def test_format_by_flag(self, files, tmp_path):
        (tmp_path / "wiki.tokens").write_text("some text")
        with pytest.raises(UserError, match=r"wiki\.tokens: its ending does not tell.*--input-format"):
            run(files, tmp_path, tmp_path / "wiki.tokens")
        run(files, tmp_path, tmp_path / "wiki.tokens", input_format="text")
        assert decoded(files, tmp_path / "out/d_text_document") == ["some text"]


BAD_LINES = [
    (b'{"text": ""}', "'text' is empty"),
    (b'{"text": "a"', "is not valid JSON"),
    (b"{'text': 'a'}", r"is not valid JSON \(.* at column 2\)"),
    (b'{"title": "a", "n": 1}', r"has no key 'text', which --json-keys names \(its keys: 'title', 'n'\)"),
    (b"{}", "has no key 'text'"),
    (b'{"text": null}', "'text' must be a string, not null"),
    (b'{"text": 3}', "must be a string, not a number"),
    (b'{"text": ["a"]}', "must be a string, not a list"),
    (b'["text"]', "expected a JSON object, found a list"),
    (b'"text"', "expected a JSON object, found a string"),
    (b'{"text": "\xff"}', r"is not valid UTF-8 \(byte 0xff"),
    (b'{"text": "\xed\xa0\x80"}', "is not valid UTF-8"),
    (b'{"text": "a\\ud800"}', r"lone surrogate U\+D800"),
    (b'{"text": ' + b"[" * 100_000, "is not JSON that can be read"),
    (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "is not JSON that can be read"),
    (b"\x00", "is not valid JSON"),
    (b'{"text": "' + b"a" * 200_000 + b'"}', "is larger than --max-document-mb 0.15"),
]


class TestBadInput:
    @pytest.mark.parametrize(("line", "match"), BAD_LINES, ids=lambda value: str(value)[:24])
    def test_bad_line(self, files, tmp_path, line, match):
        path = tmp_path / "a.jsonl"
        path.write_bytes(jsonl(TEXTS[:2]) + b"\n" + line + b"\n" + jsonl(TEXTS[2:]))
        with pytest.raises(UserError, match=rf"a\.jsonl:4: .*{match}"):
            run(files, tmp_path, path, max_document_mb=0.15)
        assert list((tmp_path / "out").iterdir()) == []
        summary = run(files, tmp_path, path, max_document_mb=0.15, skip_bad=1)
        assert decoded(files, tmp_path / "out/d_text_document") == TEXTS
        assert [bad.where for bad in summary.skipped] == [f"{path}:4"]

    @pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf \r\n\n\t"])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz"])
    def test_empty_file(self, files, tmp_path, name, content):
        path, good = pack(tmp_path / name, content), pack(tmp_path / "good.jsonl", jsonl(TEXTS))
        for unit in chunks.TEXT_UNITS:
            with pytest.raises(UserError, match=rf"{name}: the file is empty"):
                run(files, tmp_path, good, path, text_unit=unit)
        assert len(run(files, tmp_path, good, path, skip_bad=1).skipped) == 1
        with pytest.raises(UserError, match="nothing to write from 1 file: all were bad"):
            run(files, tmp_path, path, skip_bad=1)

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
    @pytest.mark.parametrize("damage", ["cut", "flip", "plain"])
    def test_damaged_packed_file(self, files, tmp_path, name, damage):
        path = pack(tmp_path / name, jsonl([os.urandom(40).hex() for _ in range(200)]))
        content = bytearray(path.read_bytes())
        if damage == "cut":
            content = content[: len(content) // 2]
        elif damage == "flip":
            content[0] ^= 255
        else:
            content = bytearray(jsonl(TEXTS))
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}: is damaged or cut short"):
            run(files, tmp_path, path)
        assert list((tmp_path / "out").iterdir()) == []

    def test_text_that_is_no_utf8(self, files, tmp_path):
        path = pack(tmp_path / "a.txt", b"one\ntwo\nthr\xffee\n")
        with pytest.raises(UserError, match=r"a\.txt:3: is not valid UTF-8"):
            run(files, tmp_path, path)

    def test_text_that_is_too_large(self, files, tmp_path):
        path = pack(tmp_path / "a.txt", b"a" * 2000)
        with pytest.raises(
            UserError, match=r"a\.txt:1: the document is larger than --max-document-mb 0\.001; .* --text-unit"
        ):
            run(files, tmp_path, path, max_document_mb=0.001)

    def test_bad_parquet(self, files, tmp_path):
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.table({"text": ["a", None, "c"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"a\.parquet:row 2: 'text' must be a string, not null"):
            run(files, tmp_path, tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"a\.parquet: has no column 'body'.*it has text, n"):
            run(files, tmp_path, tmp_path / "a.parquet", json_keys=("body",))
        pack(tmp_path / "b.parquet", b"PAR1 not parquet")
        with pytest.raises(UserError, match=r"b\.parquet: (is no parquet file|cannot be read)"):
            run(files, tmp_path, tmp_path / "b.parquet")

    def test_missing_and_unusable_files(self, files, tmp_path):
        good = pack(tmp_path / "a.jsonl", jsonl(TEXTS))
        (tmp_path / "dir.jsonl").mkdir()
        (tmp_path / "link.jsonl").symlink_to("nowhere")
        for inputs, match in [
            ([tmp_path / "no.jsonl"], r"--input .*no\.jsonl: no such file"),
            ([tmp_path / "*.zst"], "no such file matches"),
            ([tmp_path / "dir.jsonl"], "is a directory; name its files"),
            ([tmp_path / "link.jsonl"], "a link to a file that does not exist"),
            ([good, tmp_path / "a*"], r"a\.jsonl: is named twice"),
            ([pack(tmp_path / "b.parquet.gz", b"")], "unpack it"),
        ]:
            with pytest.raises(UserError, match=match):
                run(files, tmp_path, *inputs)
        assert not (tmp_path / "out").exists()


def records(path, unit, max_document_bytes=1000):
    """(FILE:LINE's line, text, or None for a bad document) of a plain text file."""
    found = []
    for item in read_chunks(find_inputs([str(path)], None, unit), ["text"], max_document_bytes, ReadPosition()):
        for record in [item] if isinstance(item, BadDocument) else parse_chunk(item, ["text"], max_document_bytes):
            line = int(record.where.removeprefix(f"{path}:"))
            found.append((line, record.texts[0] if isinstance(record, Document) else None))
    return found


def expected_records(text, unit, max_document_bytes=1000):
    """The same, line by line: slow and plain."""
    found: list[list] = []
    open_paragraph = False
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            open_paragraph = False
        elif unit == "paragraph" and open_paragraph:
            found[-1][1] += "\n" + line
        else:
            found.append([number, line])
            open_paragraph = True
    texts = [(number, text.removesuffix("\r")) for number, text in found]
    return [(number, text if len(text.encode()) <= max_document_bytes else None) for number, text in texts]


class TestTextUnits:
    def test_paragraphs_and_lines(self, files, tmp_path):
        path = pack(tmp_path / "a.txt", b"\xef\xbb\xbf\n  one\n two \n\n \t\nthree\n\n\nfour")
        for unit, texts in [
            ("paragraph", ["  one\n two ", "three", "four"]),
            ("line", ["  one", " two ", "three", "four"]),
        ]:
            run(files, tmp_path, path, text_unit=unit)
            assert decoded(files, tmp_path / "out/d_text_document") == texts
        path = pack(tmp_path / "a.txt", b"one\r\ntwo\r\n\r\nthree\r\n")
        assert records(path, "paragraph") == [(1, "one\r\ntwo"), (4, "three")]
        assert records(path, "line") == [(1, "one"), (2, "two"), (4, "three")]

    def test_other_formats_are_read_as_ever(self, files, tmp_path):
        run(files, tmp_path, pack(tmp_path / "a.jsonl", jsonl(TEXTS)), text_unit="paragraph")
        assert decoded(files, tmp_path / "out/d_text_document") == TEXTS

    @pytest.mark.parametrize("unit", ["paragraph", "line"])
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        parts=st.lists(st.sampled_from(["\n", "\n\n", "\r\n", " ", "\t", "a", "\u00e9", "bcd", "x" * 9]), max_size=60),
        block=st.integers(1, 9),
        ending=st.sampled_from([".txt", ".txt.gz", ".txt.zst"]),
    )
    def test_any_text_cut_into_blocks_anywhere(self, tmp_path, unit, parts, block, ending):
        """Some records are larger than the 12 bytes allowed: bad ones, and the line numbers after them are right."""
        text = "".join(parts)
        path = pack(tmp_path / f"a{ending}", text.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "CHUNK_BYTES", block)
            if text.strip():
                assert records(path, unit, 12) == expected_records(text, unit, 12)

    @pytest.mark.parametrize(("unit", "line"), [("paragraph", 4), ("line", 5)])
    def test_bad_documents(self, files, tmp_path, unit, line):
        content = b"one\ntwo\n\nsmall\n" + b"a" * 1500 + b"\n\nth\nr\xffee\n\nfour\n"
        path = pack(tmp_path / "a.txt", content)
        summary = run(files, tmp_path, path, text_unit=unit, max_document_mb=0.001, skip_bad=2)
        assert [bad.where for bad in summary.skipped] == [f"{path}:{line}", f"{path}:8"]
        with pytest.raises(UserError, match=rf"a\.txt:{line}: the document is larger than --max-document-mb 0\.001;"):
            run(files, tmp_path, path, text_unit=unit, max_document_mb=0.001)

    @pytest.mark.parametrize("unit", ["paragraph", "line"])
    def test_the_files_do_not_depend_on_the_workers(self, files, tmp_path, unit):
        text = "".join(f"{i:100}\n" + "\n" * (i % 3 == 2) for i in range(24_000))
        path = pack(tmp_path / "a.txt.gz", text.encode())
        for workers in (1, 2):
            run(files, tmp_path / str(workers), path, text_unit=unit, workers=workers)
        one, two = (tmp_path / n / "out/d_text_document" for n in "12")
        assert IndexedDataset(one).document_count == (8_000 if unit == "paragraph" else 24_000)
        for ending in (".bin", ".idx", ".json"):
            assert one.with_suffix(ending).read_bytes() == two.with_suffix(ending).read_bytes()

    def test_memory_is_bounded_by_the_document(self, tmp_path):
        """64 MB of paragraphs, and one of 64 MB: a few megabytes at a time."""
        path = tmp_path / "a.txt.gz"
        with gzip.open(path, "wb", compresslevel=1) as stream:
            for _ in range(64):
                stream.write(b"word word\n\n" * 90_000)
            for _ in range(64):
                stream.write(b"word word\n" * 100_000)
        sizes = [
            item.size if isinstance(item, chunks.Chunk) else item.where
            for item in read_chunks(find_inputs([str(path)], None, "paragraph"), ["text"], 1 << 20, ReadPosition())
        ]
        assert sizes.pop() == f"{path}:{64 * 90_000 * 2 + 1}"
        assert sum(sizes) == 64 * 90_000 * 11 and max(sizes) <= 2 * CHUNK_BYTES


class TestChunks:
    def test_lines_around_the_edges_of_the_blocks(self, tmp_path):
        """Texts that end just before, on and after a block's end, and one of several blocks."""
        overhead = len(jsonl([""]))
        sizes = [CHUNK_BYTES - overhead + shift for shift in (-1, 0, 1)] + [3 * CHUNK_BYTES, 1, 2]
        texts = [chr(97 + i) * size for i, size in enumerate(sizes)]
        path = tmp_path / "a.jsonl"
        for order in (texts, texts[::-1], texts[2:] + texts[:2]):
            path.write_bytes(jsonl(order))
            assert list(read_texts(find_inputs([str(path)]), ["text"])) == order

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_line_of_several_blocks_is_skipped_and_the_numbers_go_on(self, files, tmp_path, place):
        long = jsonl(["a" * int(2.5 * CHUNK_BYTES)])
        parts = [jsonl(["x", "y"]), jsonl(["z"])]
        parts.insert(place, long)
        path = pack(tmp_path / "a.jsonl", b"".join(parts) + b"{}\n")
        summary = run(files, tmp_path, path, skip_bad=2, max_document_mb=1)
        assert [bad.where for bad in summary.skipped] == [f"{path}:{(1, 3, 4)[place]}", f"{path}:5"]
        assert decoded(files, tmp_path / "out/d_text_document") == ["x", "y", "z"]
