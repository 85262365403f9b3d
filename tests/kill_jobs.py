"""The jobs that kill_points.py disturbs: saves, deletions, preprocessing, sample indices."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import checkpoint_ranks
import numpy as np
import small_training
import torch._dynamo  # noqa: F401  (AdamW imports it at its first step: once here, not in every child)
from small_training import newest_whole

from megatron.checkpointing.checkpoint import load_checkpoint
from megatron.checkpointing.commit import reap_temporary
from megatron.checkpointing.saver import Saver
from megatron.checkpointing.state import collect, restore
from megatron.data import chunks, preprocessing
from megatron.data.gpt2_dataset import GPT2Dataset
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.preprocessing import PreprocessConfig, preprocess
from megatron.distributed.world import World
from megatron.tokenizer.build import TokenizerFiles
from megatron.tokenizer.training import train_bpe

Work = Callable[[Path, World], None]
"""Changes files below a directory; `inputs` stands beside that directory's parent."""


@dataclass(frozen=True)
class Job:
    """Work that changes files below a directory, and is started again when it dies. Both run in children."""

    work: Work
    before: Work = lambda directory, world: None
    """What makes the directory as the work finds it."""
    ranks: int = 1
    deletes: bool = False
    """It ends by deleting old checkpoints; a deletion that fails does not end it."""
    background: bool = False
    """The calls of interest are those of the thread that saves while the main one goes on."""


def train(until: int) -> Work:
    """The small training, up to a step, from what is there."""

    def work(directory: Path, world: World) -> None:
        reap_temporary(directory)
        small_training.main(directory, until)

    return work


def damaged(directory: Path, world: World) -> None:
    """Checkpoints of steps 2 and 4, of which the newer has lost its end."""
    train(2)(directory, world)
    train(4)(directory, world)
    for shard in (directory / "iter_0000004").glob("*.safetensors"):
        os.truncate(shard, shard.stat().st_size - 1)


def train_keeping(last: int | None, steps: range, *, background: bool = False) -> Work:
    """The small training from what is there up to each of `steps`, with a save there and the newest `last` kept.

    It trains one step further, which is in time for a save in the background.
    """

    def work(directory: Path, world: World) -> None:
        reap_temporary(directory)
        training = small_training.Training()
        latest = newest_whole(directory)
        if latest is not None:
            training.take(latest)
        with Saver(directory, world, background=background, report=print, keep_last=last) as saver:
            for step in range(max(steps.start, training.progress.iteration), steps.stop):
                training.run(step)
                tensors = collect(training.model, training.optimizer)
                saver.save(iteration=step, tensors=tensors, state=training.state(), config_text="lr: 1e-2\n")
                training.run(step + 1)

    return work


def train_ranks(until: int, *, background: bool = False) -> Work:
    """A model that all ranks share, up to a step, from what is there, saved as the trainer does, and one step more."""

    def work(directory: Path, world: World) -> None:
        training = checkpoint_ranks.Training(world, seed=5)
        world.on_main(lambda: bool(reap_temporary(directory)))
        latest = world.on_main(lambda: str(newest_whole(directory) or ""))
        done = 0
        if latest:
            done = load_checkpoint(Path(latest), world=world).iteration
            restore(training.model, training.optimizer, Path(latest), world=world)
        training.steps(until - done)
        with Saver(directory, world, background=background, report=print) as saver:
            saver.save(iteration=until, tensors=training.table(), state={"iteration": until}, config_text="seed: 5\n")
            training.steps(1)

    return work


def encode_in_parts(directory: Path, world: World) -> None:
    """Preprocess in chunks of a few documents, noting after each how far it has come."""
    chunks.CHUNK_BYTES, preprocessing.SAVE_SECONDS = 4096, 0.0
    encode("texts.jsonl")(directory, world)


def encode(texts: str) -> Work:
    """Preprocess the file `texts` of the inputs into the directory."""

    def work(directory: Path, world: World) -> None:
        inputs = directory.parents[1] / "inputs"
        files = TokenizerFiles(vocab_file=inputs / "vocab.json", merge_file=inputs / "merges.txt")
        output = str(directory / "out/corpus")
        preprocess(PreprocessConfig([str(inputs / texts)], output, files, log_interval=0, overwrite=True))

    return work


def index(directory: Path, world: World) -> None:
    """Build the sample indices of two epochs into a cache."""
    corpus = IndexedDataset(directory.parents[1] / "inputs/corpus/out/corpus_text_document")
    everything = range(corpus.document_count)
    dataset = GPT2Dataset(
        corpus, everything, seq_length=8, seed=1, cache_dir=str(directory / "index-cache"), name="train"
    )
    dataset.samples(np.arange(dataset.num_samples_per_epoch + 1))


def careless(directory: Path, world: World) -> None:
    """What not to do: the negative control."""
    with open(directory / "careless.npy", "wb", buffering=0) as stream:
        stream.write(b"one half")
        stream.write(b"the other")
    os.rename(directory / "careless.npy", directory / "renamed.npy")


JOBS = {
    "save": Job(train(4)),
    "save-next": Job(train(4), before=train(2)),
    "save-replacing": Job(train(4), before=damaged),
    "retention": Job(train_keeping(2, range(4, 5)), before=train_keeping(None, range(1, 4)), deletes=True),
    "background": Job(
        train_keeping(2, range(4, 5), background=True),
        before=train_keeping(None, range(1, 4)),
        deletes=True,
        background=True,
    ),
    "save-sharded": Job(train_ranks(2), before=train_ranks(1), ranks=2),
    "background-sharded": Job(train_ranks(2, background=True), before=train_ranks(1), ranks=2, background=True),
    "preprocess": Job(encode("texts.jsonl")),
    "preprocess-replacing": Job(encode("texts.jsonl"), before=encode("older.jsonl")),
    "preprocess-in-parts": Job(encode_in_parts),
    "index": Job(index),
    "careless": Job(careless),
}


def make_inputs(directory: Path, world: World) -> None:
    """A tokenizer, two small corpora as text, and one of them preprocessed."""
    texts = [f"document {n} says {n * n}, and no more than that " * (1 + n % 5) for n in range(60)]
    train_bpe(texts, 300, directory)
    for name, some in (("texts.jsonl", texts), ("older.jsonl", texts[:20])):
        (directory / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    encode("texts.jsonl")(directory / "corpus", world)
