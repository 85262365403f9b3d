"""Damaged, unsafe and unfinished checkpoints: each is detected, and named, before anything of it is used."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_training import newest_whole

from megatron.checkpointing import manifest as manifests
from megatron.checkpointing.checkpoint import find_whole, load_checkpoint, save_checkpoint
from megatron.checkpointing.commit import LATEST, open_manifest, reap_temporary
from megatron.checkpointing.manifest import MANIFEST, FileEntry, Manifest, read_manifest
from megatron.checkpointing.tensors import Piece, read_tensors, write_pieces
from megatron.checkpointing.verification import verify_checkpoint
from megatron.errors import UserError

SHARD = "shard-00001-model-00001-of-00001.safetensors"
FILES = ["config.yaml", MANIFEST, SHARD, "state.json"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two checkpoints, of iterations 5 and 10."""
    for iteration in (5, 10):
        tensors = {"x": torch.arange(100.0) + iteration, "y": torch.full((3, 2), float(iteration))}
        save_checkpoint(
            tmp_path, iteration=iteration, tensors=tensors, state={"i": iteration}, config_text=f"seed: {iteration}\n"
        )
    return tmp_path


def newest(directory: Path) -> Path:
    return directory / "iter_0000010"


def rewrite_manifest(path: Path, files: dict[str, FileEntry]) -> None:
    """Put a manifest into place that is sound but for what it says."""
    (path / MANIFEST).write_bytes(Manifest(int(path.name.removeprefix("iter_")), files).to_bytes())


def describe_again(path: Path) -> None:
    """Make the manifest agree with files that were changed."""
    rewrite_manifest(path, manifests.describe(path, [name for name in FILES if name != MANIFEST]))


def require_named(directory: Path, path: Path) -> None:
    """The damaged file `path` of the newest checkpoint is named by whatever reads it, with what to do about it."""
    with pytest.raises(UserError) as caught:
        find_whole(directory, fallback=False)
    message, older = str(caught.value), directory / "iter_0000005"
    assert f"{path}: " in message and message.endswith(
        f"; the newest older whole checkpoint is {older}: name it with --load; "
        "training also takes it with --load-fallback"
    )
    lines: list[str] = []
    found = find_whole(directory, fallback=True, report=lines.append)
    assert found is not None and (found.path, found.iteration, found.state) == (older, 5, {"i": 5})
    assert len(lines) == 1
    assert lines[0].startswith(f"--load-fallback: {path.parent} is damaged and left behind: {path}: ")
    faults = verify_checkpoint(path.parent).faults
    assert faults and all(fault.startswith(f"{path}: ") for fault in faults)


def flip(directory: Path, name: str, first: int, end: int, count: int) -> None:
    """Flip `count` random bits of the bytes from `first` to before `end` of a file, one at a time: each is found."""
    path = newest(directory) / name
    original = path.read_bytes()
    positions = range(8 * first, 8 * min(end, len(original)))
    for position in random.Random(0).sample(positions, min(count, len(positions))):
        flipped = bytearray(original)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        require_named(directory, path)
    path.write_bytes(original)
    load_checkpoint(path.parent)


def truncate(directory: Path, name: str, sizes: Iterable[int]) -> None:
    """Cut a file to each of `sizes`: each is found, and by the mere size."""
    path = newest(directory) / name
    original = path.read_bytes()
    for size in sizes:
        path.write_bytes(original[:size])
        require_named(directory, path)
        with pytest.raises(UserError, match=name):
            open_manifest(path.parent)
    path.write_bytes(original)


def header_end(directory: Path) -> int:
    """Where the header of the shard ends and its data begin."""
    content = (newest(directory) / SHARD).read_bytes()
    return 8 + int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_detected_and_named(directory: Path, name: str) -> None:
    flip(directory, name, 0, sys.maxsize, 50)


@pytest.mark.parametrize("name", FILES)
def test_truncations_are_detected_and_never_resumed_from(directory: Path, name: str) -> None:
    size = (newest(directory) / name).stat().st_size
    truncate(directory, name, {0, 1, size - 1, *random.Random(0).sample(range(size), min(22, size))})


@pytest.mark.faults
@pytest.mark.parametrize("name", [*FILES, "header of the shard"])
def test_200_flipped_bits_of_each_part_are_detected_and_named(directory: Path, name: str) -> None:
    end = header_end(directory)
    if name in FILES:
        flip(directory, name, end if name == SHARD else 0, sys.maxsize, 200)
    else:
        flip(directory, SHARD, 0, end, 200)


@pytest.mark.faults
@pytest.mark.parametrize("name", FILES)
def test_truncation_to_every_length_is_detected_and_named(directory: Path, name: str) -> None:
    truncate(directory, name, range((newest(directory) / name).stat().st_size))


@pytest.mark.parametrize("name", FILES)
def test_every_deleted_file_is_detected_and_named(directory: Path, name: str) -> None:
    os.unlink(newest(directory) / name)
    with pytest.raises(UserError, match=name):
        load_checkpoint(newest(directory))
    assert newest_whole(directory) == directory / "iter_0000005"


def test_message_says_what_was_expected_and_found_and_what_to_do(directory: Path) -> None:
    shard = newest(directory) / SHARD
    with open(shard, "r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\xff")
    with pytest.raises(
        UserError, match=r"damaged, expected crc32 \w{8} over [\d,]+ bytes, found \w{8}; the newest older"
    ):
        load_checkpoint(newest(directory))
    shutil.rmtree(directory / "iter_0000005")
    with pytest.raises(UserError, match="there is no older whole checkpoint beside it"):
        load_checkpoint(newest(directory))


def test_appended_bytes_and_foreign_shards_are_refused(directory: Path) -> None:
    shutil.copy(newest(directory) / SHARD, newest(directory) / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match=r"shard-00002.*not in the checkpoint's manifest"):
        load_checkpoint(newest(directory))
    os.unlink(newest(directory) / "shard-00002-model-00001-of-00001.safetensors")
    with open(newest(directory) / SHARD, "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(UserError, match=SHARD):
        load_checkpoint(newest(directory))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret", "..", "", ".", "a\\b", "a\0b"])
def test_names_that_leave_the_directory_are_refused(directory: Path, name: str) -> None:
    (directory / "secret").write_text("secret")
    files = read_manifest(newest(directory)).files | {name: FileEntry(6, "00000000")}
    rewrite_manifest(newest(directory), files)
    with pytest.raises(UserError, match="is not a plain file name"):
        load_checkpoint(newest(directory))


def test_links_that_leave_the_directory_are_refused(directory: Path) -> None:
    outside = directory / "outside.json"
    shutil.move(newest(directory) / "state.json", outside)
    (newest(directory) / "state.json").symlink_to(outside)
    with pytest.raises(UserError, match=r"state.json: leads outside the checkpoint, to .*outside.json"):
        load_checkpoint(newest(directory))


def test_something_else_than_a_file_is_refused(directory: Path) -> None:
    os.unlink(newest(directory) / "state.json")
    (newest(directory) / "state.json").mkdir()
    with pytest.raises(UserError, match=r"state.json: expected a regular file"):
        load_checkpoint(newest(directory))


def test_manifest_of_another_iteration_or_a_newer_format_is_refused(directory: Path) -> None:
    shutil.copytree(newest(directory), directory / "iter_0000020")
    with pytest.raises(UserError, match="expected iteration 20, found 10"):
        load_checkpoint(directory / "iter_0000020")
    parsed = json.loads((newest(directory) / MANIFEST).read_text())
    (newest(directory) / MANIFEST).write_text(json.dumps(parsed | {"format": 2}))
    with pytest.raises(UserError, match="expected format 1, found 2; use a newer version"):
        load_checkpoint(newest(directory))


def test_tensor_with_a_missing_piece_is_refused(tmp_path: Path) -> None:
    pieces = [Piece("x", (0, 0), torch.ones(2, 3)), Piece("x", (4, 0), torch.ones(2, 3))]
    write_pieces(tmp_path, pieces[:1], 0)
    write_pieces(tmp_path, pieces[1:], 1)
    with pytest.raises(UserError, match="expected 18 values of x in its shards, found 12"):
        read_tensors(tmp_path)


def test_manifest_without_the_needed_files_is_refused(directory: Path) -> None:
    files = {name: entry for name, entry in read_manifest(newest(directory)).files.items() if name != "state.json"}
    rewrite_manifest(newest(directory), files)
    with pytest.raises(UserError, match=r"its manifest has no state.json"):
        load_checkpoint(newest(directory))


def test_shard_that_is_no_safetensors_file_is_refused(directory: Path) -> None:
    (newest(directory) / SHARD).write_bytes(b"\xff" * 64)
    describe_again(newest(directory))
    load_checkpoint(newest(directory))
    with pytest.raises(UserError, match=r"cannot read the tensors of .*iter_0000010"):
        read_tensors(newest(directory))


class Canary:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_no_pickle_is_ever_read(directory: Path) -> None:
    sung = directory / "sung"
    for name in (".metadata", "__0_0.distcp", "common.pt"):
        (newest(directory) / name).write_bytes(pickle.dumps(Canary(sung)))
    assert newest_whole(directory) == newest(directory)
    assert load_checkpoint(newest(directory)).state == {"i": 10}
    (newest(directory) / SHARD).write_bytes(pickle.dumps(Canary(sung)))
    describe_again(newest(directory))
    with pytest.raises(UserError):
        read_tensors(newest(directory))
    assert not sung.exists()
    pickle.loads((newest(directory) / ".metadata").read_bytes())
    assert sung.exists(), "the canary must sing where a pickle is read"


def test_temporary_directories_are_ignored_told_of_and_reaped(directory: Path) -> None:
    shutil.copytree(newest(directory), directory / "iter_0000020.tmp-0123abcd")
    (directory / "iter_0000030.tmp-ffffffff").mkdir()
    (directory / ".latest.tmp-0123abcd").write_text("iter")
    (directory / "iter_20.tmp-not-ours").mkdir()
    (directory / "metrics.jsonl").write_text("{}\n")
    lines: list[str] = []
    assert newest_whole(directory, lines.append) == newest(directory)
    assert [line.split(":")[0] for line in lines] == [
        str(directory / "iter_0000030.tmp-ffffffff"),
        str(directory / "iter_0000020.tmp-0123abcd"),
    ]
    assert len(reap_temporary(directory)) == 3
    assert sorted(p.name for p in directory.iterdir()) == [
        "iter_0000005",
        "iter_0000010",
        "iter_20.tmp-not-ours",
        LATEST,
        "metrics.jsonl",
    ]
    assert reap_temporary(directory) == [] == reap_temporary(directory / "nowhere")


@pytest.mark.parametrize("content", [b"", b"iter_0000005\n", b"../../etc", b"\xff\xfe\0", b"x" * 100_000, None])
def test_latest_is_only_a_hint(directory: Path, content: bytes | None) -> None:
    lines: list[str] = []
    if content is None:
        os.unlink(directory / LATEST)
    else:
        (directory / LATEST).write_bytes(content)
    assert newest_whole(directory, lines.append) == newest(directory)
    assert bool(lines) == (content is not None)


def test_interrupted_replacement_is_found_and_finished(directory: Path) -> None:
    aside = directory / "iter_0000010.old-0123abcd"
    os.rename(newest(directory), aside)
    assert newest_whole(directory) == aside
    assert load_checkpoint(aside).state == {"i": 10}
    assert reap_temporary(directory) == []
    assert newest_whole(directory) == newest(directory)
    shutil.copytree(newest(directory), aside)
    assert reap_temporary(directory) == [aside]
    assert newest_whole(directory) == newest(directory)
    shutil.copytree(newest(directory), aside)
    (newest(directory) / SHARD).write_bytes(bytes((newest(directory) / SHARD).stat().st_size))
    assert reap_temporary(directory) == [], "the old one is all there is"
    os.unlink(newest(directory) / SHARD)
    assert reap_temporary(directory) == []
    assert newest_whole(directory) == aside


@pytest.mark.parametrize("fallback", [False, True])
def test_without_a_manifest_it_was_never_finished_and_is_no_damage(directory: Path, fallback: bool) -> None:
    os.unlink(newest(directory) / MANIFEST)
    shutil.copytree(newest(directory), directory / "iter_0000020.gone-0123abcd")
    lines: list[str] = []
    found = find_whole(directory, fallback=fallback, report=lines.append)
    assert found is not None and found.iteration == 5
    assert lines == [
        f"{directory / 'iter_0000020.gone-0123abcd'}: ignored, what is left of a deleted checkpoint",
        f"{newest(directory)}: ignored, never finished: it has no {MANIFEST}",
    ]
    os.unlink(directory / "iter_0000005" / MANIFEST)
    with pytest.raises(UserError, match=r"none of its 2 checkpoints is whole \(newest: iter_0000010, without"):
        find_whole(directory, fallback=fallback)
    assert find_whole(directory / "nowhere", fallback=fallback) is None


@pytest.mark.parametrize("fallback", [False, True])
def test_what_is_damaged_throughout_is_an_error_not_a_fresh_start(directory: Path, fallback: bool) -> None:
    for path in directory.glob("iter_*"):
        (path / SHARD).write_bytes(bytes((path / SHARD).stat().st_size))
    expected = (
        r"--load-fallback: none of the 2 .*\(newest: iter_0000010\)" if fallback else rf"{SHARD}: damaged, expected"
    )
    lines: list[str] = []
    with pytest.raises(UserError, match=expected):
        find_whole(directory, fallback=fallback, report=lines.append)
    assert [line.split()[1] for line in lines] == [str(newest(directory)), f"{directory / 'iter_0000005'}"][
        : 2 * fallback
    ]
    shutil.rmtree(directory / "iter_0000005")
    with pytest.raises(UserError, match=rf"{SHARD}: damaged, .*there is no older whole checkpoint beside it"):
        find_whole(directory, fallback=fallback)


def test_fallback_is_not_for_a_checkpoint_that_was_named(directory: Path) -> None:
    (newest(directory) / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json: damaged, .* older whole checkpoint is .*iter_0000005"):
        find_whole(newest(directory), fallback=True)
    found = find_whole(directory / "iter_0000005", fallback=False)
    assert found is not None and found.config_text == "seed: 5\n"


def test_named_checkpoint_that_is_not_whole_is_an_error_not_a_fresh_start(directory: Path) -> None:
    os.unlink(newest(directory) / SHARD)
    for fallback in (False, True):
        with pytest.raises(UserError, match=SHARD):
            find_whole(newest(directory), fallback=fallback)
        with pytest.raises(UserError, match="there is no such checkpoint"):
            find_whole(directory / "iter_0000099", fallback=fallback)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LIKE_A_MANIFEST = st.fixed_dictionaries(
    {},
    optional={
        "format": JSON,
        "iteration": JSON,
        "crc32": JSON,
        "files": JSON | st.dictionaries(st.text(max_size=8), st.fixed_dictionaries({"size": JSON, "crc32": JSON})),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64) | (JSON | LIKE_A_MANIFEST).map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_manifest_are_a_user_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_deeply_nested_manifest_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged manifest"):
        read_manifest(tmp_path)
