"""Every file that is read, made up and damaged: it is refused in one line, or read as an independent reader does.

Each law holds over some examples here, and over 10,000 with `pytest -m faults`. The command line and recipes have a
file of their own.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from made_up import DEEPSPEED_KEYS, EXAMPLES, NUMBERS, damaged, deepspeed_documents, law, outcome, value_at
from slow_readers import read_index_slowly, read_line_slowly, read_safetensors_slowly

from megatron.checkpointing.manifest import FileEntry, Manifest, check_sizes, read_manifest
from megatron.checkpointing.tensors import Piece, read_tensors, stored_tensors, write_pieces
from megatron.data.chunks import BadDocument, ReadPosition, find_inputs, read_chunks
from megatron.data.documents import parse_chunk
from megatron.data.index_cache import IndexKey, load_or_build
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter, PartWritten
from megatron.data.resuming import ResumePoint, read_point, write_point
from megatron.data.sample_index import SampleIndex
from megatron.deepspeed_config import DeepSpeedConfig, read_deepspeed_config
from megatron.errors import UserError
from megatron.instability.summary import read_run, summarise
from megatron.metrics import read_lines

# The data: PREFIX.idx, PREFIX.bin, PREFIX.json

PACKED = st.builds(struct.pack, st.sampled_from(["<Q", "<q", "<i"]), st.sampled_from(NUMBERS[:6])) | st.builds(
    struct.pack, st.just("<Q"), st.sampled_from(NUMBERS)
)


def read_documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset.read_document(number).tolist() for number in range(dataset.document_count)]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with IndexedDatasetWriter(tmp_path / "d", np.uint16) as writer:
        for tokens, sizes in (([1, 2, 3], [3]), ([], [0]), ([4, 5, 6], [1, 2]), ([7, 8], [2])):
            writer.add_document(np.array(tokens, dtype=np.int64), sizes)
    return tmp_path / "d"


@EXAMPLES
def test_index(examples: int, prefix: Path) -> None:
    index, tokens, sidecar = (Path(f"{prefix}{ending}") for ending in (".idx", ".bin", ".json"))
    sidecar.unlink()
    whole = index.read_bytes()

    @law(examples, content=damaged(whole, PACKED), length=st.sampled_from([16, 16, 16, 8, 32, 0]))
    def _(content: bytes, length: int) -> None:
        index.write_bytes(content)
        tokens.write_bytes(bytes(range(length)))
        found, expected = outcome(read_documents, prefix), read_index_slowly(content, bytes(range(length)))
        assert isinstance(found, UserError) if expected is None else found == expected


@EXAMPLES
@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_damage_beside_a_sidecar_is_refused(examples: int, prefix: Path, ending: str) -> None:
    whole, path = read_documents(prefix), Path(f"{prefix}{ending}")
    content = path.read_bytes()

    @law(examples, changed=damaged(content, PACKED))
    def _(changed: bytes) -> None:
        path.write_bytes(changed)
        found = outcome(read_documents, prefix)
        assert found == whole if changed == content else isinstance(found, UserError)


@EXAMPLES
def test_sidecar(examples: int, prefix: Path) -> None:
    """Of a damaged one nothing is believed."""
    path = Path(f"{prefix}.json")
    content, whole = path.read_bytes(), IndexedDataset(prefix).sidecar
    words = st.sampled_from([b"null", b"-1", b"1e999", b"NaN", b"true", b'"x"', b"[]", b"[" * 2000, b"9" * 5000])

    @law(examples, changed=damaged(content, words))
    def _(changed: bytes) -> None:
        path.write_bytes(changed)
        dataset = IndexedDataset(prefix)
        assert dataset.sidecar in (None, whole) and dataset.max_token_id() == 8


# Text: JSON lines


def read_jsonl(path: Path) -> list[tuple[str, object]]:
    """(line's number, text or None for a bad document) of each record."""
    found: list[tuple[str, object]] = []
    for item in read_chunks(find_inputs([str(path)]), ["text"], 4096, ReadPosition()):
        for record in [item] if isinstance(item, BadDocument) else parse_chunk(item, ["text"], 4096):
            found.append((record.where, None if isinstance(record, BadDocument) else record.texts[0]))
    return found


@EXAMPLES
def test_text_comes_back(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    @law(examples, texts=st.lists(st.text(min_size=1), min_size=1, max_size=4), escaped=st.booleans())
    def _(texts: list[str], escaped: bool) -> None:
        lines = [json.dumps({"n": 1, "text": text}, ensure_ascii=escaped) for text in texts]
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
        assert read_jsonl(path) == [(f"{path}:{number}", text) for number, text in enumerate(texts, start=1)]


@EXAMPLES
def test_json_lines(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    whole = (
        b'{"text": "one \\u00e9\\ud83d\\ude00\\n", "n": [1, -2.5e3]}\n{"n": {"a": null, "b": true}, "text": "two"}\n'
    )
    puts = st.sampled_from(
        [b"\n", b'"', b"\\", b"{}", b"[" * 9, b"text", b"\\ud800", b"\\u0000", b"\xff", b"NaN", b"\r", b"1" * 5000]
    )

    @law(examples, content=damaged(whole, puts))
    def _(content: bytes) -> None:
        path.write_bytes(content)
        found = read_jsonl(path)
        lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        records = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
        if not records:
            assert found == [(str(path), None)]
            return
        assert [where for where, _ in found] == [where for where, _ in records]
        for (_, text), (_, line) in zip(found, records, strict=True):
            if len(line) <= 4096 and b"NaN" not in line:  # which Python takes for a number
                assert text == read_line_slowly(line)


# Checkpoints: the manifest, safetensors

NAMES = st.text(st.sampled_from("abc./\\\0\u00e9-_ "), max_size=8) | st.sampled_from(
    ["..", "manifest.json", "/a", "a/../b"]
)


def plain(name: str) -> bool:
    """Whether `name` can only be that of a file in the directory itself."""
    return not set(name) & set("/\\\0") and name not in ("", ".", "..", "manifest.json")


@EXAMPLES
def test_manifest_comes_back_or_leaves_its_directory(examples: int, tmp_path: Path) -> None:
    entries = st.builds(FileEntry, st.integers(0, 2**70), st.text("0123456789abcdef", min_size=8, max_size=8))

    @law(examples, manifest=st.builds(Manifest, st.integers(0, 2**70), st.dictionaries(NAMES, entries, max_size=4)))
    def _(manifest: Manifest) -> None:
        (tmp_path / "manifest.json").write_bytes(manifest.to_bytes())
        found = outcome(read_manifest, tmp_path)
        if all(map(plain, manifest.files)):
            assert found == manifest
            with contextlib.suppress(UserError):  # the files are not there, or other ones of that name
                check_sizes(tmp_path, manifest)
        else:
            assert "is not a plain file name" in str(found)


@EXAMPLES
def test_damaged_manifest_is_refused(examples: int, tmp_path: Path) -> None:
    manifest = Manifest(10, {"a.safetensors": FileEntry(12, "0123abcd"), "state.json": FileEntry(3, "ffffffff")})
    content = manifest.to_bytes()
    puts = st.sampled_from([b"../", b"true", b"1e9", b"[" * 3000, b'"', b"9" * 5000, b"null"])

    @law(examples, changed=damaged(content, puts))
    def _(changed: bytes) -> None:
        (tmp_path / "manifest.json").write_bytes(changed)
        found = outcome(read_manifest, tmp_path)
        assert found == manifest if changed == content else isinstance(found, UserError)


def load(directory: Path) -> dict[str, list[object]]:
    stored = stored_tensors(directory)
    tensors = read_tensors(directory)
    assert {name: entry.size for name, entry in stored.items()} == {n: t.shape for n, t in tensors.items()}
    return {
        name: [list(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()]
        for name, tensor in tensors.items()
    }


@EXAMPLES
def test_safetensors(examples: int, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.tensor([1, -1])}
    (name,) = write_pieces(tmp_path, [Piece(n, (0,) * t.dim(), t) for n, t in tensors.items()], rank=0)
    path = tmp_path / name
    content = path.read_bytes()
    whole = load(tmp_path)
    assert whole == read_safetensors_slowly(content)
    puts = PACKED | st.sampled_from([b"F16", b"I32", b"[0]", b"[]", b"-1", b"0", b"6", b"b", b"}", b"null"])
    words = [
        b'"a"',
        b'"b"',
        b"F32",
        b"I64",
        b"[2,3]",
        b"[2]",
        b"[0,24]",
        b"[24,40]",
        b"saved_offsets",
        b"[0, 0]",
        b"[0]",
    ]

    @st.composite
    def renamed(draw: st.DrawFn) -> bytes:
        """One word of the header another, the header's length as before."""
        header = content[8:-40]
        word = draw(st.sampled_from([w for w in words if w in header]))
        new = header.replace(word, draw(st.sampled_from([*words, b'"c"', b"[-1]", b"[3,2]", b"[0,8]", b"F8"])), 1)
        return struct.pack("<Q", len(new)) + new + content[-40:]

    @law(examples, changed=damaged(content, puts) | renamed())
    def _(changed: bytes) -> None:
        path.write_bytes(changed)
        found = outcome(load, tmp_path)
        assert isinstance(found, UserError) or found == read_safetensors_slowly(changed)


# What a run writes and reads again: its log, the point of a preprocessing


@EXAMPLES
def test_metrics(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = (
        b'{"iteration": 1, "consumed_tokens": 64, "loss": 5.5, "loss_by_position": {"0-7": 5.5}, "lr": null}\n'
        b'{"iteration": 2, "consumed_tokens": 128, "loss": "nan", "seconds": 1.5, "sizes": [1]}\n'
        b'{"event": "validation", "iteration": 2, "consumed_tokens": 128, "loss": 5.25, "perplexity": 190.5}\n'
    )
    puts = st.sampled_from(
        [
            b"\n",
            b"{}",
            b"[" * 9,
            b"[" * 3000,
            b"null",
            b"true",
            b"1e999",
            b"9" * 400,
            b"9" * 5000,
            b'"x"',
            b"NaN",
            b'{"a": {"b": []}}',
        ]
    )

    odd = st.sampled_from([None, True, -1, 10**400, 2.5, "nan", "x", [], [1], {}, {"0-7": {"a": 1}}, {"0-7": 1e400}])
    names = st.sampled_from(["iteration", "event", "loss", "loss_by_position", "consumed_tokens", "seconds"])
    made = st.dictionaries(names, odd).map(lambda entry: json.dumps({"iteration": 3, **entry}).encode() + b"\n")

    @law(examples, content=damaged(whole, puts) | made.map(whole.__add__))
    def _(content: bytes) -> None:
        path.write_bytes(content)
        found = outcome(lambda: list(read_lines(path)))
        lines = content.split(b"\n")[:-1]  # the last has no end: it is being written
        if isinstance(found, UserError):
            number = int(str(found).removeprefix(f"{path}:").partition(":")[0])
            assert lines[number - 1] not in whole.split(b"\n")[:-1]
        else:
            assert [line.encode() for line, _ in found] == [line.rstrip(b"\r") for line in lines]
            for (_, entry), line in zip(found, lines, strict=True):
                assert type(entry["iteration"]) is int and str(entry["iteration"]).encode() in line
        run = outcome(read_run, tmp_path)
        if not isinstance(run, UserError):
            summarise(run)


@EXAMPLES
def test_point_of_a_preprocessing(examples: int, tmp_path: Path) -> None:
    path, run = tmp_path / "point", {"input": [["a", 1]], "--append-eod": True}
    bad, part = BadDocument("a:3", "is bad"), PartWritten(3, 9, 7, 1, 2)
    point = ResumePoint(
        run, items=[1, 2], skip=1, documents=3, input_bytes=40, seconds=1.5, skipped=[bad], parts=[part]
    )
    write_point(path, point)
    content = path.read_bytes()
    assert read_point(path, run) == point and read_point(path, {**run, "--append-eod": False}) is None
    puts = st.sampled_from([b"null", b"[" * 3000, b"9" * 5000, b"-1", b"true"])

    @law(examples, changed=damaged(content, puts))
    def _(changed: bytes) -> None:
        path.write_bytes(changed)
        found = read_point(path, run)
        same = changed.strip(b" \n\r\t") == content.strip()
        assert found == point if same else found in (None, point)  # blanks between the words are no damage


# DeepSpeed's JSON


@EXAMPLES
def test_deepspeed_configuration(examples: int, tmp_path: Path) -> None:
    path, others = tmp_path / "ds.json", st.dictionaries(st.text(max_size=3), st.integers() | st.text(), max_size=2)

    @law(examples, made=deepspeed_documents(), unknown=others)
    def _(made: tuple[dict[str, object], dict[str, object]], unknown: dict[str, object]) -> None:
        document, settings = made
        path.write_text(json.dumps({**unknown, **document}))
        found = read_deepspeed_config(path)
        assert {name: found.settings.get(name) for name in settings} == settings
        assert len(found.notes) == bool(unknown) and "\n" not in "".join(found.notes)
        assert found.seq_length == value_at(document, "curriculum_learning.max_difficulty")


@EXAMPLES
def test_damaged_deepspeed_configuration(examples: int, tmp_path: Path) -> None:
    """What is read of it is what it says; what is refused names the file."""
    path, tutorial = tmp_path / "ds.json", Path(__file__).parents[1] / "recipes/deepspeed-tutorial.json"
    words = rb'NaN 1e999 -1 0 16 true false, null "x" [] {} [1,2] "fp16":{}, "\n":1, fixed_root fixed_discrete \ud800'
    puts = st.sampled_from([*words.split(), b"\xef\xbb\xbf", b"[" * 3000, b"9" * 5000, b"9" * 400])

    @law(examples, content=damaged(tutorial.read_bytes(), puts))
    def _(content: bytes) -> None:
        path.write_bytes(content)
        found = outcome(read_deepspeed_config, path)
        if isinstance(found, UserError):
            assert str(found).startswith(f"--deepspeed-config {path}: ")
            return
        assert isinstance(found, DeepSpeedConfig) and "\n" not in "".join(found.notes)
        document = json.loads(content.decode("utf-8-sig"))
        disabled = [name for name in ("fp16", "curriculum_learning") if value_at(document, f"{name}.enabled") is False]
        for key, setting in DEEPSPEED_KEYS.items():
            value = value_at(document, key)
            if value is not None and key.partition(".")[0] not in disabled:
                assert type(value) is not bool and found.settings[setting] == value, key


# Nothing that is read runs code


class _Canary:
    """Makes a file where it is unpickled."""

    def __init__(self, sung: Path) -> None:
        self.sung = sung

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.sung), "w")


@pytest.mark.parametrize("form", ["objects in a .npy", "bare"])
def test_a_pickle_in_the_index_cache_is_not_read(tmp_path: Path, form: str) -> None:
    sung, built = tmp_path / "sung", []
    key = IndexKey("corpus", range(1), seq_length=4, seed=1, epoch=0)

    def build() -> SampleIndex:
        built.append(1)
        return SampleIndex(np.zeros(1, np.int64), np.zeros((3, 2), np.int64), np.arange(2))

    def plant() -> None:
        if form == "bare":
            path.write_bytes(pickle.dumps(_Canary(sung)))
        else:
            np.save(path, np.array([_Canary(sung)] * 9, dtype=object), allow_pickle=True)

    load_or_build(tmp_path / "cache", key, 9, build, "train")
    (path,) = (tmp_path / "cache").glob("*.npy")
    plant()
    load_or_build(tmp_path / "cache", key, 9, build, "train")
    assert not sung.exists() and len(built) == 2
    plant()
    np.load(path, allow_pickle=True)
    assert sung.exists(), "the canary must sing where a pickle is read"
