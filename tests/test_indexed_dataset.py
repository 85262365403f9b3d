"""Megatron's .bin/.idx: golden bytes, round trips, every corruption, crashes of the writer."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.indexed_dataset import IndexedDataset, best_dtype
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.errors import UserError

DOCUMENTS = [[[1, 2, 3]], [[4], [5, 6]], [[7, 8]]]  # the second document has two sequences


def golden_index(code: int, itemsize: int) -> bytes:
    """The .idx of DOCUMENTS, spelled out."""
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<Q", 4)
        + struct.pack("<Q", 4)
        + struct.pack("<4i", 3, 1, 2, 2)
        + struct.pack("<4q", 0, 3 * itemsize, 4 * itemsize, 6 * itemsize)
        + struct.pack("<4q", 0, 1, 3, 4)
    )


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            flat = np.array([token for sequence in document for token in sequence], dtype=np.int64)
            writer.add_document(flat, [len(sequence) for sequence in document])
    return prefix


@pytest.mark.parametrize(
    ("dtype", "code", "letter"),
    [("u1", 1, "B"), ("i1", 2, "b"), ("i2", 3, "h"), ("i4", 4, "i"), ("i8", 5, "q"), ("u2", 8, "H")],
)
def test_golden_bytes(tmp_path, dtype, code, letter):
    write(tmp_path / "d", dtype=np.dtype(dtype))
    assert (tmp_path / "d.idx").read_bytes() == golden_index(code, np.dtype(dtype).itemsize)
    assert (tmp_path / "d.bin").read_bytes() == struct.pack(f"<8{letter}", 1, 2, 3, 4, 5, 6, 7, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.json"]


def test_reads_the_golden_bytes_without_a_sidecar(tmp_path):
    (tmp_path / "d.idx").write_bytes(golden_index(4, 4))
    (tmp_path / "d.bin").write_bytes(struct.pack("<8i", 1, 2, 3, 4, 5, 6, 7, 100_000))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.dtype == np.int32 and dataset.num_tokens == 8 and len(dataset) == 4 and dataset.document_count == 3
    assert dataset.sizes.tolist() == [3, 1, 2, 2] and dataset.sizes.dtype == np.int32
    assert dataset.documents.tolist() == [0, 1, 3, 4]
    assert dataset.pointers_in_tokens.tolist() == [0, 3, 4, 6] and dataset.pointers_in_tokens.dtype == np.int64
    assert dataset.document_starts.tolist() == [0, 3, 6] and dataset.document_lengths.tolist() == [3, 3, 2]
    assert dataset.document_starts.dtype == dataset.document_lengths.dtype == np.int64
    assert dataset.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 100_000]
    assert dataset.sidecar is None and dataset.max_token_id() == 100_000
    assert [dataset.read(i).tolist() for i in range(4)] == [[1, 2, 3], [4], [5, 6], [7, 100_000]]
    assert dataset.read_document(1).tolist() == [4, 5, 6]
    with pytest.raises(IndexError):
        dataset.read(4)


@pytest.mark.parametrize(("dtype", "code"), [("i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5)])
def test_negative_token_ids_are_refused(tmp_path, dtype, code):
    """Found where the tokens are read; a sidecar comes from our writer, which takes none."""
    (tmp_path / "d.idx").write_bytes(golden_index(code, np.dtype(dtype).itemsize))
    (tmp_path / "d.bin").write_bytes(np.array([1, 2, 3, 4, 5, -6, 7, 8], dtype=dtype).tobytes())
    with pytest.raises(UserError, match=r"d\.bin: expected token ids from 0, found -6"):
        IndexedDataset(tmp_path / "d").max_token_id()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=5), min_size=1, max_size=3), max_size=8),
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
)
def test_round_trip(tmp_path, documents, dtype):
    dataset = IndexedDataset(write(tmp_path / "d", documents, dtype))
    flat = [[token for sequence in document for token in sequence] for document in documents]
    assert [dataset.read_document(i).tolist() for i in range(dataset.document_count)] == flat
    assert [dataset.read(i).tolist() for i in range(len(dataset))] == [s for document in documents for s in document]
    assert dataset.sidecar is not None
    assert dataset.max_token_id() == max((token for document in flat for token in document), default=-1)


def test_many_documents_at_once_give_the_same_files(tmp_path):
    documents = [[1, 2, 3], [], [4], [5, 6]]
    write(tmp_path / "a", [[document] for document in documents])
    with IndexedDatasetWriter(tmp_path / "b", np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3, 4], dtype=np.int32), [3, 0, 1])
        writer.add_documents([], [])
        writer.add_documents([5, 6], [2])
    for ending in (".bin", ".idx", ".json"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_going_on_after_a_part_gives_the_same_files(tmp_path):
    sizes = [2, 0, 3, 1]
    with IndexedDatasetWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_documents([1, 2, 300, 4, 5, 6], sizes)
    part = None
    for begin, end in ((0, 2), (2, 3), (3, 4)):
        with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "b", np.uint16, part=part) as writer:
            writer.add_documents([1, 2, 300, 4, 5, 6][sum(sizes[:begin]) : sum(sizes[:end])], sizes[begin:end])
            part = writer.save()
            writer.keep = True
            writer.add_documents([9, 9, 9], [3])  # not saved: it is lost
            raise KeyboardInterrupt
    with IndexedDatasetWriter(tmp_path / "b", np.uint16, part=part):
        pass
    for ending in (".bin", ".idx", ".json"):
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()
    with pytest.raises(ValueError, match="one sequence each"), IndexedDatasetWriter(tmp_path / "c", "u2") as writer:
        writer.add_document([1, 2], [1, 1])
        writer.add_document([], [])
        writer.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{n}.{e}" for n in "ab" for e in ("bin", "idx", "json")
    ]


def test_nothing_written_is_a_dataset_of_nothing(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "d", []))
    assert (dataset.num_tokens, dataset.document_count, dataset.max_token_id()) == (0, 0, -1)
    assert dataset.document_lengths.tolist() == []


@pytest.mark.parametrize(
    ("size", "dtype"), [(65499, np.uint16), (65500, np.int32), (256, np.uint16), (10**6, np.int32)]
)
def test_type_by_vocabulary(size, dtype):
    assert best_dtype(size) == dtype


class TestWriterRefuses:
    @pytest.mark.parametrize(
        ("dtype", "token", "fits"),
        [
            (np.uint16, 65535, True),
            (np.uint16, 65536, False),
            (np.uint16, -1, False),
            (np.int32, 2**31 - 1, True),
            (np.int32, 2**31, False),
            (np.uint8, 256, False),
        ],
    )
    def test_tokens_that_would_wrap_around(self, tmp_path, dtype, token, fits):
        if fits:
            assert IndexedDataset(write(tmp_path / "d", [[[token]]], dtype)).tokens.tolist() == [token]
            return
        with pytest.raises(ValueError, match=f"token id {token} does not fit"):
            write(tmp_path / "d", [[[token]]], dtype)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("tokens", "sizes", "match"),
        [
            ([1, 2], [1], "add up to 1, but there are 2"),
            ([0.5], None, "integer"),
            ([[1]], None, "a row"),
            ([], [-1], "not -1 to -1"),
        ],
    )
    def test_other_shapes(self, tmp_path, tokens, sizes, match):
        with pytest.raises(ValueError, match=match), IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
            writer.add_document(tokens, sizes)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("dtype", [np.float32, np.uint32, np.bool_])
    def test_types_that_the_format_lacks(self, tmp_path, dtype):
        with pytest.raises(ValueError, match="cannot stand"):
            IndexedDatasetWriter(tmp_path / "d", dtype)

    def test_a_second_writer_of_the_same_prefix(self, tmp_path):
        with IndexedDatasetWriter(tmp_path / "d", np.uint16) as first:
            first.add_document([1])
            with (
                pytest.raises(UserError, match="another process is writing"),
                IndexedDatasetWriter(tmp_path / "d", "u2"),
            ):
                pass
        assert IndexedDataset(tmp_path / "d").num_tokens == 1

    def test_a_place_where_nothing_can_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(UserError, match=r"cannot write .*file/d\.bin"),
            IndexedDatasetWriter(tmp_path / "file/d", "u2"),
        ):
            pass


class TestCrashes:
    def test_an_error_leaves_the_old_dataset(self, tmp_path):
        write(tmp_path / "d")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(KeyboardInterrupt), IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
            writer.add_document([9])
            raise KeyboardInterrupt
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("call", ["fsync", "rename", "unlink"])
    @pytest.mark.parametrize("when", range(6))
    def test_killed_at_each_step_of_the_commit(self, tmp_path, call, when):
        """Old and new have different token counts: a mixture of the two cannot be opened."""
        old, new = [[[1, 2, 3]]], [[[4, 5]], [[6, 7]]]
        write(tmp_path / "d", old)
        script = (
            "import os, signal, sys, pathlib\n"
            "from megatron.data.indexed_writer import IndexedDatasetWriter\n"
            "call, when, prefix = sys.argv[1], int(sys.argv[2]), sys.argv[3]\n"
            "calls = 0\n"
            "def wrap(original):\n"
            "    def wrapped(*args, **kwargs):\n"
            "        global calls\n"
            "        if calls == when: os.kill(os.getpid(), signal.SIGKILL)\n"
            "        calls += 1\n"
            "        return original(*args, **kwargs)\n"
            "    return wrapped\n"
            "with IndexedDatasetWriter(prefix, 'u2') as writer:\n"
            "    setattr(os, call, wrap(getattr(os, call)))\n"
            "    writer.add_documents([4, 5, 6, 7], [2, 2])\n"
        )
        command = [sys.executable, "-c", script, call, str(when), str(tmp_path / "d")]
        root = Path(__file__).resolve().parents[1]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
        try:
            tokens = IndexedDataset(tmp_path / "d").tokens.tolist()
        except UserError as error:
            assert "d.idx: does not exist" in str(error)
        else:
            assert tokens in ([1, 2, 3], [4, 5, 6, 7])
        assert IndexedDataset(write(tmp_path / "d", new)).tokens.tolist() == [4, 5, 6, 7]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx", "d.json"]

    def test_the_order_of_the_commit(self, tmp_path, monkeypatch):
        write(tmp_path / "d")
        calls = []
        rename, unlink, fsync = os.rename, os.unlink, os.fsync
        monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"rename {Path(b).name}"), rename(a, b)))
        monkeypatch.setattr(os, "unlink", lambda a: (calls.append(f"unlink {Path(a).name}"), unlink(a)))
        monkeypatch.setattr(os, "fsync", lambda a: (calls.append("fsync"), fsync(a)))
        write(tmp_path / "d")
        renames = ["rename d.bin", "fsync", "rename d.json", "fsync", "rename d.idx", "fsync"]
        assert calls == ["unlink d.idx.tmp", "fsync", "fsync", "fsync", "unlink d.idx", "fsync", *renames]


class TestDamage:
    @pytest.fixture
    def prefix(self, tmp_path: Path) -> Path:
        return write(tmp_path / "d")

    @pytest.mark.parametrize(
        ("offset", "packed", "match"),
        [
            (0, b"XXIDIDX\x00\x00", r"d\.idx: expected to begin with b'MMIDIDX.*found b'XXIDIDX"),
            (9, struct.pack("<Q", 2), "expected format version 1, found 2"),
            (17, b"\x00", "expected a token type of .*found 0"),
            (17, b"\x06", r"expected a token type of .*found 6 \(float64\)"),
            (17, b"\x09", "found 9"),
            (17, b"\x04", r"d\.bin|d\.idx: sequence 1: expected to begin at byte 12"),
            (18, struct.pack("<Q", 5), r"expected 126 bytes for 5 sequences.*found 114"),
            (18, struct.pack("<Q", 3), "found 114"),
            (18, struct.pack("<Q", 2**64 - 1), "found 114"),
            (26, struct.pack("<Q", 3), "3 document indices, found 114"),
            (26, struct.pack("<Q", 0), "found 114"),
            (34, struct.pack("<i", -3), "sequence 0: expected a size from 0, found -3"),
            (34, struct.pack("<i", 4), "sequence 1: expected to begin at byte 8.*found 6"),
            (46, struct.pack("<i", 3), r"d\.bin: expected 18 bytes for the 9 tokens of d\.idx, found 16"),
            (50, struct.pack("<q", 2), "sequence 0: expected to begin at byte 0.*found 2"),
            (74, struct.pack("<q", -1), "sequence 3: expected to begin at byte 12.*found -1"),
            (82, struct.pack("<q", 1), "first document index to be 0, found 1"),
            (90, struct.pack("<q", 4), "document index 2: expected at least 4, found 3"),
            (98, struct.pack("<q", 0), "document index 2: expected at least 1, found 0"),
            (106, struct.pack("<q", 5), "last document index to be the number of sequences, 4, found 5"),
            (106, struct.pack("<q", 3), "last document index to be the number of sequences, 4, found 3"),
        ],
    )
    def test_header_fields(self, prefix, offset, packed, match):
        path = Path(f"{prefix}.idx")
        content = bytearray(path.read_bytes())
        content[offset : offset + len(packed)] = packed
        path.write_bytes(content)
        with pytest.raises(UserError, match=match):
            IndexedDataset(prefix)

    @pytest.mark.parametrize("size", [0, 5, 9, 33, 34, 60, 113])
    def test_truncated_index(self, prefix, size):
        os.truncate(f"{prefix}.idx", size)
        with pytest.raises(UserError, match=rf"d\.idx: expected .* found {size}"):
            IndexedDataset(prefix)

    @pytest.mark.parametrize("size", [0, 1, 15, 17, 100])
    def test_wrong_size_of_bin(self, prefix, size):
        os.truncate(f"{prefix}.bin", size)
        with pytest.raises(UserError, match=rf"d\.bin: expected 16 bytes for the 8 tokens .* found {size}"):
            IndexedDataset(prefix)

    def test_longer_index_and_multimodal_index(self, prefix):
        path = Path(f"{prefix}.idx")
        content = path.read_bytes()
        path.write_bytes(content + bytes(4))
        with pytest.raises(UserError, match="multimodal"):
            IndexedDataset(prefix)
        path.write_bytes(content + bytes(5))
        with pytest.raises(UserError, match="found 119; make the data again"):
            IndexedDataset(prefix)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(position=st.integers(0, 113), value=st.integers(0, 255))
    def test_any_byte(self, tmp_path, position, value):
        """Whatever one byte of the index becomes: refused, or (another grouping into documents) consistent."""
        prefix = write(tmp_path / "d")
        content = bytearray(Path(f"{prefix}.idx").read_bytes())
        content[position] = value
        Path(f"{prefix}.idx").write_bytes(content)
        try:
            dataset = IndexedDataset(prefix)
        except UserError as error:
            assert "d.idx" in str(error) or "d.bin" in str(error)
        else:
            assert dataset.document_lengths.sum() == dataset.num_tokens == 8

    def test_missing_files(self, prefix):
        Path(f"{prefix}.bin").unlink()
        with pytest.raises(UserError, match=r"d\.bin: does not exist"):
            IndexedDataset(prefix)
        with pytest.raises(UserError, match=r"d\.idx: give the data's prefix without its ending: .*/d$"):
            IndexedDataset(f"{prefix}.idx.bin".removesuffix(".bin"))

    def test_suggests_the_dataset_that_is_meant(self, tmp_path):
        write(tmp_path / "books_text_document")
        with pytest.raises(UserError, match=r"did you mean .*books_text_document\?"):
            IndexedDataset(tmp_path / "books")
        with pytest.raises(UserError, match=r"did you mean .*/books_text_document\?"):
            IndexedDataset(tmp_path / "books_text_documnet")
        Path(tmp_path / "books_text_document.bin").unlink()
        for name in ("books_text_document", "shelf", "nowhere/books_text_document"):
            with pytest.raises(UserError, match=r"made by tools/preprocess_data\.py$"):
                IndexedDataset(tmp_path / name)

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "documents": "x"}', "\udcff", '{"schema": 1}']
    )
    def test_a_broken_sidecar_is_not_believed(self, prefix, content):
        Path(f"{prefix}.json").write_text(content, encoding="utf-8", errors="surrogateescape")
        dataset = IndexedDataset(prefix)
        assert dataset.sidecar is None and dataset.max_token_id() == 8

    @pytest.mark.parametrize("name", ["tokens", "max_token_id", "bin_crc32", "bin_sample_crc32", "idx_crc32", "eod"])
    def test_a_changed_sidecar_is_not_believed(self, prefix, name):
        path = Path(f"{prefix}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), name: 3}))
        dataset = IndexedDataset(prefix)
        assert dataset.sidecar is None and dataset.max_token_id() == 8

    def test_the_sidecar_of_other_data_is_not_believed(self, prefix, tmp_path):
        other = write(tmp_path / "other", [[[1, 2, 3]], [[9], [5, 6]], [[7], [10]]])
        Path(f"{other}.json").replace(f"{prefix}.json")
        dataset = IndexedDataset(prefix)
        assert dataset.sidecar is None and dataset.max_token_id() == 8

    def test_a_sidecar_without_digests_is_believed_by_its_counts(self, prefix):
        path = Path(f"{prefix}.json")
        fields = json.loads(path.read_text())
        for name in ("bin_sample_crc32", "idx_crc32", "crc32"):
            del fields[name]
        path.write_text(json.dumps({**fields, "max_token_id": 7}))
        assert IndexedDataset(prefix).max_token_id() == 7
        path.write_text(json.dumps({**fields, "tokens": 9}))
        assert IndexedDataset(prefix).sidecar is None

    @pytest.mark.parametrize("ending", [".bin", ".idx"])
    def test_a_file_of_other_data_of_the_same_size_is_refused(self, prefix, tmp_path, ending):
        """The same counts everywhere: neither sizes nor offsets tell."""
        other = write(tmp_path / "other", [[[1, 2, 3], [9]], [[5, 6]], [[7, 10]]])
        Path(f"{other}{ending}").replace(f"{prefix}{ending}")
        with pytest.raises(UserError, match=rf"d\{ending}: expected the file that d\.json describes, found another"):
            IndexedDataset(prefix)
        Path(f"{prefix}.json").unlink()
        assert IndexedDataset(prefix).num_tokens == 8

    def test_other_tokens_anywhere_in_a_large_bin_are_seen(self, tmp_path):
        """Blocks of 4096 bytes are looked at, spread over the file with its first and last bytes."""
        prefix = write(tmp_path / "d", [[list(range(50_000))]])
        content = Path(f"{prefix}.bin").read_bytes()
        for begin in (0, 12_288, 50_000, 100_000 - 4_096):
            changed = content[:begin] + bytes(8_192) + content[begin + 8_192 :]
            Path(f"{prefix}.bin").write_bytes(changed[: len(content)])
            with pytest.raises(UserError, match=r"d\.bin: expected the file"):
                IndexedDataset(prefix)


def test_fingerprint_follows_the_cut_into_documents(tmp_path):
    prints = [
        IndexedDataset(write(tmp_path / name, documents)).fingerprint
        for name, documents in [
            ("a", DOCUMENTS),
            ("b", DOCUMENTS),
            ("c", DOCUMENTS[:2]),
            ("d", [[[1], [2, 3]], *DOCUMENTS[1:]]),
        ]
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_more_than_two_to_the_31_tokens(tmp_path):
    """Pointers beyond 2^31 tokens, over a sparse .bin."""
    size, count = 2**31 - 1, 3
    pointers = [size * 2 * i for i in range(count)]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    (tmp_path / "d.idx").write_bytes(
        header + struct.pack("<3i", *[size] * 3) + struct.pack("<3q", *pointers) + struct.pack("<4q", *range(4))
    )
    try:
        with (tmp_path / "d.bin").open("wb") as stream:
            stream.truncate(size * 2 * count)
    except OSError:
        pytest.skip("the file system has no sparse files of 12 GiB")
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.num_tokens == 3 * size and dataset.document_starts.tolist() == [0, size, 2 * size]
    assert dataset.read(2)[size - 2 :].tolist() == [0, 0]
