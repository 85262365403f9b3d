"""Samples by number: equal to the obvious way, the same for longer runs, cached and never stale."""

from __future__ import annotations

import errno
import logging
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from corpora import CorpusInMemory, obvious_epoch
from hypothesis import given
from hypothesis import strategies as st

from megatron.data import gpt2_dataset, index_cache
from megatron.data.gpt2_dataset import GPT2Dataset, Piece
from megatron.data.sampler import SampleLoader, share
from megatron.errors import UserError

LENGTHS = [13, 0, 7, 1, 40, 5, 0, 22, 9, 3, 17, 2, 64, 8]


def dataset(corpus: CorpusInMemory, documents: range | None = None, **changes) -> GPT2Dataset:
    settings = {"seq_length": 8, "seed": 3, "cache_dir": None, "name": "train"} | changes
    return GPT2Dataset(corpus, range(len(corpus.lengths)) if documents is None else documents, **settings)


def read(data: GPT2Dataset, numbers: range | list[int]) -> list[list[int]]:
    return data.samples(np.array(numbers, dtype=np.int64)).tolist()


@pytest.mark.parametrize("copy_from", [0, 10**9])
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=20),
    st.integers(1, 15),
    st.integers(0, 4),
    st.data(),
)
def test_samples_equal_the_obvious_way(
    copy_from: int, lengths: list[int], seq_length: int, skipped: int, data: st.DataObject
) -> None:
    """Over three epochs, in any order, by both ways of copying."""
    corpus = CorpusInMemory(lengths, dtype=np.uint16)
    documents = range(min(skipped, len(lengths)), len(lengths))
    if sum(lengths[documents.start :]) <= seq_length:
        with pytest.raises(UserError, match=r"corpus: .* documents for train: found"):
            dataset(corpus, documents, seq_length=seq_length)
        return
    found = dataset(corpus, documents, seq_length=seq_length)
    expected = [sample for epoch in range(3) for sample in obvious_epoch(corpus, documents, seq_length, 3, epoch)]
    assert len(expected) == 3 * found.num_samples_per_epoch
    numbers = data.draw(st.lists(st.integers(0, len(expected) - 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2_dataset, "COPY_FROM", copy_from)
        assert read(found, range(len(expected))) == expected
        assert read(found, numbers) == [expected[number] for number in numbers]


def test_neighbouring_samples_share_one_token_and_cover_the_stream() -> None:
    corpus = CorpusInMemory(LENGTHS)
    data = dataset(corpus)
    samples = data.samples(np.arange(data.num_samples_per_epoch))
    assert samples.dtype == np.int64
    inputs = samples[:, :-1].reshape(-1).tolist()
    assert len(inputs) == len(set(inputs)) == data.num_samples_per_epoch * 8
    ends = set(samples[:, -1].tolist()) - set(samples[:, 0].tolist())
    assert len(ends) == 1, "each last token but one is the first of another sample"


def test_same_beginning_whatever_is_read_later() -> None:
    corpus = CorpusInMemory(LENGTHS)
    first = read(dataset(corpus), range(10))
    data = dataset(corpus)
    later = read(data, range(5000, 5010))
    assert read(data, range(10)) == first
    assert read(dataset(corpus), range(5000, 5010)) == later
    assert len(data._epochs) == gpt2_dataset.EPOCHS_KEPT


def test_documents_of_a_sample() -> None:
    corpus = CorpusInMemory(LENGTHS)
    data = dataset(corpus, range(3, len(LENGTHS)))
    for number in range(2 * data.num_samples_per_epoch):
        pieces = data.documents_of(number)
        tokens = [t for p in pieces for t in corpus.document(p.document)[p.offset : p.offset + p.length]]
        assert tokens == read(data, [number])[0]
        assert all(piece.document >= 3 and piece.length > 0 for piece in pieces)


class TestCache:
    @pytest.fixture()
    def corpus(self, tmp_path: Path) -> CorpusInMemory:
        return CorpusInMemory(LENGTHS, directory=tmp_path)

    @pytest.fixture()
    def builds(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Grows by one with every index built."""
        built: list[int] = []
        build = gpt2_dataset.build_sample_index

        def counted(lengths, seq_length, seed, epoch):
            built.append(epoch)
            return build(lengths, seq_length, seed, epoch)

        monkeypatch.setattr(gpt2_dataset, "build_sample_index", counted)
        return built

    def test_small_index_needs_no_file(self, corpus: CorpusInMemory, tmp_path: Path) -> None:
        read(dataset(corpus), range(3))
        assert list(tmp_path.iterdir()) == []

    def test_large_index_is_cached_beside_the_corpus(
        self, corpus: CorpusInMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpt2_dataset, "CACHE_FROM", 1)
        read(dataset(corpus), range(3))
        assert [path.name[:20] for path in (tmp_path / "index-cache").glob("*.npy")] == ["corpus-train-epoch0-"]

    def test_second_run_reads_what_the_first_saved(
        self, corpus: CorpusInMemory, tmp_path: Path, builds: list[int]
    ) -> None:
        straight = read(dataset(corpus), range(60))
        assert builds == [0, 1, 2]
        first = read(dataset(corpus, cache_dir=str(tmp_path / "new" / "cache")), range(60))
        assert builds == [0, 1, 2] * 2
        second = read(dataset(corpus, cache_dir=str(tmp_path / "new" / "cache")), range(60))
        assert builds == [0, 1, 2] * 2
        assert first == second == straight
        assert not list((tmp_path / "new" / "cache").glob(".index-*"))

    @pytest.mark.parametrize("change", ["corpus", "documents", "seq_length", "seed"])
    def test_nothing_stale_is_used(
        self, change: str, corpus: CorpusInMemory, tmp_path: Path, builds: list[int]
    ) -> None:
        cache = str(tmp_path)
        read(dataset(corpus, cache_dir=cache), range(5))
        other = CorpusInMemory([*LENGTHS[:-2], 63, 9], directory=tmp_path) if change == "corpus" else corpus
        documents = range(1, len(LENGTHS)) if change == "documents" else None
        changes = {"seq_length": 9} if change == "seq_length" else {"seed": 4} if change == "seed" else {}
        found = read(dataset(other, documents, cache_dir=cache, **changes), range(5))
        assert len(builds) == 2
        assert found == read(dataset(other, documents, **changes), range(5))

    def test_changed_split_leaks_nothing_between_train_and_validation(
        self, corpus: CorpusInMemory, tmp_path: Path
    ) -> None:
        for border in (9, 5, 11):
            train = dataset(corpus, range(border), cache_dir=str(tmp_path))
            held_out = dataset(corpus, range(border, len(LENGTHS)), cache_dir=str(tmp_path), name="validation")
            seen = {token for sample in read(train, range(train.num_samples_per_epoch)) for token in sample}
            held = {token for sample in read(held_out, range(held_out.num_samples_per_epoch)) for token in sample}
            assert seen and held and not seen & held

    @pytest.mark.parametrize("damage", ["truncated", "header cut", "empty", "other shape", "other type", "pickle"])
    def test_damaged_file_is_built_again_and_said(
        self, damage: str, corpus: CorpusInMemory, tmp_path: Path, builds: list[int], caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = read(dataset(corpus, cache_dir=str(tmp_path)), range(5))
        (path,) = tmp_path.glob("*.npy")
        content = path.read_bytes()
        array = np.load(path)
        if damage == "truncated":
            path.write_bytes(content[:-8])
        elif damage == "header cut":
            path.write_bytes(content[:20])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "other shape":
            np.save(path, array[:-1])
        elif damage == "other type":
            np.save(path, array.astype(np.int16))
        else:
            np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        with caplog.at_level(logging.WARNING):
            assert read(dataset(corpus, cache_dir=str(tmp_path)), range(5)) == expected
        assert builds == [0, 0]
        assert str(path) in caplog.text and "damaged" in caplog.text
        assert path.read_bytes() == content

    def test_of_two_at_once_one_builds_and_the_other_waits(
        self, corpus: CorpusInMemory, tmp_path: Path, builds: list[int]
    ) -> None:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: read(dataset(corpus, cache_dir=str(tmp_path)), range(5)), range(4)))
        assert builds == [0]
        assert all(samples == found[0] for samples in found)

    @pytest.fixture()
    def holder(self, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A process that has the lock of `tmp_path` until it is killed."""
        program = (
            "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
            process.kill()

    def test_waiting_for_another_process_is_said_once(
        self,
        holder: subprocess.Popen[bytes],
        corpus: CorpusInMemory,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(index_cache, "NOTICE_SECONDS", 0.2)
        timer = threading.Timer(0.6, holder.kill)
        timer.start()
        with caplog.at_level(logging.WARNING):
            assert read(dataset(corpus, cache_dir=str(tmp_path)), range(5)) == read(dataset(corpus), range(5))
        assert not timer.is_alive(), "it did not wait"
        assert caplog.messages == [f"{tmp_path}: waiting for another process that builds a sample index there"]

    def test_waiting_for_another_process_has_an_end(
        self, holder: subprocess.Popen[bytes], corpus: CorpusInMemory, tmp_path: Path, builds: list[int]
    ) -> None:
        with pytest.raises(UserError, match=rf"^{tmp_path}/\.lock: another process .* --distributed-timeout-minutes"):
            read(dataset(corpus, cache_dir=str(tmp_path), timeout=0.2), range(5))
        assert builds == []
        assert holder.poll() is None

    def test_without_locks_everyone_builds(
        self, corpus: CorpusInMemory, tmp_path: Path, builds: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(index_cache.fcntl, "flock", missing)
        read(dataset(corpus, cache_dir=str(tmp_path)), range(5))
        assert builds == [0]

    def test_directory_that_cannot_be_written(self, corpus: CorpusInMemory, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match=r"file/corpus-train.*--data-cache-path"):
            read(dataset(corpus, cache_dir=str(tmp_path / "file")), range(5))

    def test_full_disk_leaves_nothing_behind(
        self, corpus: CorpusInMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(index_cache.os, "fsync", full)
        with pytest.raises(UserError, match=r"disk full \(No space left on device\).*--data-cache-path"):
            read(dataset(corpus, cache_dir=str(tmp_path)), range(5))
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    @pytest.mark.parametrize("room", [20, 200, 300])
    def test_disk_that_fills_up_while_the_index_is_written(
        self, room: int, corpus: CorpusInMemory, tmp_path: Path
    ) -> None:
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
        try:
            with pytest.raises(UserError, match="disk full"):
                read(dataset(corpus, cache_dir=str(tmp_path)), range(5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    def test_killed_while_writing_leaves_no_file_under_the_final_name(
        self, corpus: CorpusInMemory, tmp_path: Path
    ) -> None:
        program = (
            "import os, signal, sys\n"
            "import numpy as np\n"
            "from corpora import CorpusInMemory\n"
            "from megatron.data.gpt2_dataset import GPT2Dataset\n"
            "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"corpus = CorpusInMemory({LENGTHS})\n"
            "data = GPT2Dataset(corpus, range(14), seq_length=8, seed=3, cache_dir=sys.argv[1], name='train')\n"
            "data.samples(np.arange(3))\n"
        )
        here = Path(__file__).parent
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
        assert done.returncode == -9
        assert not list(tmp_path.glob("*.npy"))
        assert len(list(tmp_path.glob(".index-*.tmp"))) == 1
        other_host = tmp_path / ".index-elsewhere-12345678.tmp"
        other_host.write_text("")
        assert read(dataset(corpus, cache_dir=str(tmp_path)), range(5)) == read(dataset(corpus), range(5))
        assert list(tmp_path.glob(".index-*.tmp")) == [other_host]


class TestSampleLoader:
    @pytest.fixture()
    def data(self) -> GPT2Dataset:
        return dataset(CorpusInMemory(LENGTHS))

    @pytest.mark.parametrize("workers", [0, 1, 3])
    def test_prefetched_or_not_a_batch_is_the_same(self, workers: int, data: GPT2Dataset) -> None:
        with SampleLoader(data, workers) as loader:
            for first, sequences, announced in [(0, 8, None), (8, 8, (8, 8)), (16, 4, (16, 8)), (20, 2, (20, 2))]:
                if announced:
                    loader.prefetch(*announced)
                assert loader.batch(first, sequences).tolist() == read(data, range(first, first + sequences))

    @pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
    def test_ranks_in_a_row_give_the_global_order(self, world: int, data: GPT2Dataset) -> None:
        with SampleLoader(data, 1) as loader:
            parts = []
            for rank in range(world):
                loader.prefetch(7, 6, rank, world)
                parts.append(loader.batch(7, 6, rank, world))
        assert np.concatenate(parts).tolist() == read(data, range(7, 13))
        sizes = [len(share(6, rank, world)) for rank in range(world)]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)

    def test_an_error_of_the_thread_reaches_the_caller(self, data: GPT2Dataset) -> None:
        class Broken:
            seq_length = 8
            num_samples_per_epoch = 10

            def samples(self, indices: np.ndarray) -> np.ndarray:
                raise UserError(f"cannot read {indices[0]} in {threading.current_thread().name}")

            def documents_of(self, index: int) -> list[Piece]:
                return []

        with SampleLoader(Broken(), 1) as loader:
            loader.prefetch(5, 2)
            with pytest.raises(UserError, match="cannot read 5 in read-ahead"):
                loader.batch(5, 2)
