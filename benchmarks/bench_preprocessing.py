"""From text to token ids, against Hugging Face's tokenizers: python benchmarks/bench_preprocessing.py

tools/preprocess_data.py and plain_preprocessing.py, what people write with `tokenizers`, encode the same JSON lines by
the same vocabulary on 1 and on 2 cores, in turn, each as a command of its own; their tokens are compared. `command` is
all of it, start and imports included; `encoding` is the speed that each prints of itself, without them. A last round
on `--grow` times the input shows whether memory grows. Without --input the text is the standard library's.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
from flags import make_parser
from processes import Finished, run_command

from megatron.data.chunks import find_inputs
from megatron.data.documents import read_texts
from megatron.data.stdlib_corpus import write_stdlib_corpus
from megatron.data.unpacking import unpacked
from megatron.errors import UserError, run
from megatron.flags import positive
from megatron.tokenizer.build import TokenizerFiles
from megatron.tokenizer.training import train_bpe

ENDINGS = (".jsonl", ".jsonl.gz")
VOCAB_LIMIT = 65500
"""Below it both write uint16."""
SPEED = r"\(([\d.,]+) MB/s\)"
"""What both print of themselves."""
MIB = 2**20
Contestant = Callable[[Path], Finished]
"""Encodes an input."""


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--input", help=f"{' or '.join(ENDINGS)} with the key text (default: the standard library)")
    parser.add_argument("--vocab-file", help="vocab.json of a GPT-2 BPE (default: one is trained on the input)")
    parser.add_argument("--merge-file", help="merges.txt of a GPT-2 BPE")
    parser.add_argument("--vocab-size", type=positive, default=4096, help="of the vocabulary that is trained")
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2], help="cores of each contestant")
    parser.add_argument("--grow", type=positive, default=10, help="times the input in the last round (1: none)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        source = find_source(arguments.input, directory)
        megabytes = unpacked_size(source) / 1e6
        vocabulary = find_vocabulary(arguments, source, directory)
        contestants = make_contestants(arguments.workers, vocabulary, directory)
        rounds = {1: run_round(contestants, source, arguments.repeats)}
        check_equal(arguments.workers, directory)
        if arguments.grow > 1:
            large = directory / f"large-{source.name}"
            repeat(source, arguments.grow, large)
            rounds[arguments.grow] = run_round(contestants, large, 1)
    report(rounds, megabytes, arguments)
    return 0


def find_source(given: str | None, directory: Path) -> Path:
    """The JSON lines to encode. Raises UserError where the plain program could not read what was given."""
    if given is None:
        source = directory / "text.jsonl"
        write_stdlib_corpus(source)
        return source
    if not given.endswith(ENDINGS):
        raise UserError(f"--input {given}: expected a name that ends with {' or '.join(ENDINGS)}")
    return find_inputs([given])[0].path


def unpacked_size(source: Path) -> int:
    """Bytes of its lines. Raises UserError where they are too few to be timed."""
    with source.open("rb") as raw:
        blocks = iter(partial(unpacked(raw, ".gz" if source.suffix == ".gz" else "").read, MIB), b"")
        size = sum(map(len, blocks))
    if size < 1e6:
        raise UserError(f"--input {source}: expected at least 1 MB of JSON lines, found {size / 1e6:.3f} MB")
    return size


def find_vocabulary(arguments: argparse.Namespace, source: Path, directory: Path) -> tuple[str, str]:
    """vocab.json and merges.txt: those given, or trained on `source`. Raises UserError where they are of no use."""
    given = [arguments.vocab_file, arguments.merge_file]
    if given == [None, None]:
        trained = train_bpe(read_texts(find_inputs([str(source)]), ["text"]), arguments.vocab_size, directory)
        given = [str(trained.vocab_file), str(trained.merge_file)]
    size = TokenizerFiles(vocab_file=given[0], merge_file=given[1]).build().vocab_size
    if size >= VOCAB_LIMIT:
        raise UserError(
            f"the vocabulary must have fewer than {VOCAB_LIMIT:,} tokens, as both write uint16, not {size:,}"
        )
    return given[0], given[1]


def make_contestants(workers: Sequence[int], vocabulary: tuple[str, str], directory: Path) -> dict[str, Contestant]:
    """Ours and Hugging Face's, each with every number of cores."""

    def ours(cores: int, source: Path) -> Finished:
        command = [sys.executable, f"{measure.ROOT}/tools/preprocess_data.py", "--input", f"{source}", "--append-eod"]
        command += ["--output-prefix", f"{directory}/ours-{cores}", "--workers", f"{cores}", "--log-interval", "0"]
        command += ["--overwrite"]
        return run_command([*command, "--vocab-file", vocabulary[0], "--merge-file", vocabulary[1]])

    def theirs(cores: int, source: Path) -> Finished:
        program = str(Path(__file__).with_name("plain_preprocessing.py"))
        command = [sys.executable, program, str(source), f"{directory}/theirs-{cores}.bin", *vocabulary]
        env = {"TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false", "RAYON_NUM_THREADS": str(cores)}
        return run_command(command, env=env)

    both = {"ours": ours, "Hugging Face": theirs}
    return {label(who, cores): partial(way, cores) for cores in workers for who, way in both.items()}


def label(who: str, cores: int) -> str:
    """The name of a contestant."""
    return f"{who}, {cores} core{'s' if cores > 1 else ''}"


def run_round(contestants: Mapping[str, Contestant], source: Path, repeats: int) -> dict[str, list[Finished]]:
    """All contestants on `source`, in turn."""
    finished: dict[str, list[Finished]] = {name: [] for name in contestants}

    def once(name: str) -> None:
        finished[name].append(contestants[name](source))

    measure.in_turn({name: partial(once, name) for name in contestants}, repeats, warmups=0)
    return finished


def check_equal(workers: Sequence[int], directory: Path) -> None:
    """Raise UserError unless all have written the same tokens."""
    files = [directory / name for n in workers for name in (f"ours-{n}_text_document.bin", f"theirs-{n}.bin")]
    for file in files[1:]:
        if not filecmp.cmp(files[0], file, shallow=False):
            raise UserError(f"{files[0].name} and {file.name} hold different tokens: the times cannot be compared")


def repeat(source: Path, times: int, target: Path) -> None:
    """Write `source` so many times over: its lines so many times, packed (gzip goes on after an end) or not."""
    with target.open("wb") as out:
        for _ in range(times):
            with source.open("rb") as part:
                shutil.copyfileobj(part, out)


def report(
    rounds: Mapping[int, Mapping[str, Sequence[Finished]]], megabytes: float, arguments: argparse.Namespace
) -> None:
    """Print the table and write the JSON."""
    rows = [
        row
        for times, finished in rounds.items()
        for row in summaries(times, times * megabytes, finished, arguments.workers)
    ]
    print(
        f"{megabytes:.1f} MB of JSON lines, medians of {arguments.repeats}, larger input once; ratios: over "
        "Hugging Face on as many cores"
    )
    measure.print_table([*rows[0]], [[*row.values()] for row in rows])
    measure.finish(arguments.output, {"arguments": vars(arguments), "megabytes": megabytes, "rows": rows})


def summaries(
    times: int, megabytes: float, finished: Mapping[str, Sequence[Finished]], workers: Sequence[int]
) -> list[dict[str, Any]]:
    """A row for each contestant on `times` the input, of `megabytes`."""
    rows: dict[str, dict[str, Any]] = {}
    for name, runs in finished.items():
        seconds = statistics.median(run.seconds for run in runs)
        speeds = [float(run.search(SPEED)[1].replace(",", "")) for run in runs]
        rows[name] = {
            "contestant": name,
            "input": times,
            "command s": seconds,
            "command MB/s": megabytes / seconds,
            "encoding MB/s": statistics.median(speeds),
            "largest process, MiB": max(run.largest_bytes for run in runs) // MIB,
            "all processes, MiB": max(run.sum_bytes for run in runs) // MIB,
        }
    for cores in workers:
        reference = rows[label("Hugging Face", cores)]
        for row in (rows[label("ours", cores)], reference):
            row["ratio of commands"] = row["command MB/s"] / reference["command MB/s"]
            row["ratio of encoding"] = row["encoding MB/s"] / reference["encoding MB/s"]
    return list(rows.values())


if __name__ == "__main__":
    run(main)
