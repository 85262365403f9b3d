"""Text from a model: greedy or sampled, in batches, after prompts or from nothing.

Sample number i of a seed does not depend on the batch in which it is computed: each sample draws from a generator of
its own. (Batches of other sizes round the last bits of a logit differently; a draw that is almost a tie may differ.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from megatron.config import require
from megatron.errors import UserError
from megatron.files import explain, file_errors, make_parent
from megatron.model.decoding import Decoder
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import generator_for
from megatron.tokenizer.base import Tokenizer

STANDARD_INPUT = Path("-")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: by default from all of the model's distribution."""

    temperature: float = 1.0
    """Logits are divided by this."""
    top_k: int = 0
    """Of so many of the likeliest tokens only (0: of all)."""
    top_p: float = 0.0
    """Of the fewest likeliest tokens whose probabilities add up to this (0: of all); of the top_k, if both are given
    (Holtzman et al., The Curious Case of Neural Text Degeneration, 2020)."""
    greedy: bool = False
    """The likeliest token, without chance."""

    def __post_init__(self) -> None:
        require(
            0 < self.temperature < math.inf,
            f"--temperature {self.temperature} must be above 0; --greedy takes the likeliest token",
        )
        require(self.top_k >= 0, f"--top-k {self.top_k} must not be negative (0: choose among all tokens)")
        require(0 <= self.top_p <= 1, f"--top-p {self.top_p} must be in [0, 1] (0: choose among all tokens)")
        require(
            not self.greedy or (self.temperature, self.top_k, self.top_p) == (1.0, 0, 0.0),
            "--greedy takes the likeliest token: leave out --temperature, --top-k and --top-p",
        )

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each token to be chosen, fp64: [rows, vocabulary] -> the same shape. Not for greedy."""
        logits = logits.double()
        # The largest first becomes 0, so that a temperature near 0 leaves it and sends the others to -inf, not to nan.
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -math.inf)
        if 0 < self.top_p < 1:
            ordered, tokens = logits.softmax(-1).sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered  # of the likelier ones: the first stays, whatever top_p is
            logits = logits.masked_fill((before >= self.top_p).gather(-1, tokens.argsort(-1)), -math.inf)
        return logits.softmax(-1)

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """A token of each row, drawn with its own generator: [rows, vocabulary] -> [rows] int64.

        Each token gets an exponential delay divided by its probability, and the first one wins. Where logits change by
        rounding only near ties can change, unlike in the inversion of a cumulative sum over the whole vocabulary.
        """
        if self.greedy:
            return logits.argmax(-1)
        # On the CPU: a GPU's generator gives other numbers. In fp64: one fp32 draw in 2^24 is 0, and would always win.
        delays = [torch.empty(logits.shape[-1], dtype=torch.float64).exponential_(generator=one) for one in generators]
        return (self.probabilities(logits) / torch.stack(delays).to(logits.device)).argmax(-1)


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt."""

    tokens: list[int]
    """Without the end of text."""
    finished: bool
    """It came to the end of text, or to where the caller stopped it; else to its longest length."""


def generate(
    model: GPT2Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eod: int,
    sampling: Sampling,
    seed: int = 0,
    first_sample: int = 0,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[Continuation]:
    """Continue `prompts`, as one batch, until each has ended: by `eod`, by length, or at the model's full length.

    Args:
        prompts: tokens, at least one of each.
        seed: with the number of a sample it decides the draws; the first prompt is sample `first_sample`.
        stop: asked after each token, with the new tokens of a row; true ends the row.

    Raises:
        UserError: for a prompt that is empty, or leaves nothing of the full length to write to; for predictions that
            are not finite.
    """
    seq_length = model.config.seq_length  # there may be more positions, but what was trained on ends here
    longest = max(len(prompt) for prompt in prompts)
    if longest >= seq_length:
        raise UserError(
            f"a prompt of {longest:,} tokens leaves nothing of the model's {seq_length:,} to write to: shorten it"
        )
    limits = [min(max_new_tokens, seq_length - len(prompt)) for prompt in prompts]
    written: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    generators = [generator_for(seed, f"sample {first_sample + row}") for row in range(len(prompts))]
    alive = list(range(len(prompts)))
    decoder = Decoder(model, prompts, max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)))
    while True:
        if not decoder.logits.isfinite().all():
            raise UserError(
                "the model's predictions are not finite: its weights are damaged, or too large for --dtype (fp32 holds "
                "the most)"
            )
        chosen = sampling.choose(decoder.logits, [generators[row] for row in alive]).tolist()
        going = []
        for place, (row, token) in enumerate(zip(alive, chosen, strict=True)):
            if token == eod:
                finished[row] = True
                continue
            written[row].append(token)
            finished[row] = stop is not None and stop(written[row])
            if not finished[row] and len(written[row]) < limits[row]:
                going.append(place)
        if not going:
            return [Continuation(*both) for both in zip(written, finished, strict=True)]
        if len(going) < len(alive):
            decoder.keep(going)
            alive, chosen = [alive[place] for place in going], [chosen[place] for place in going]
        decoder.step(torch.tensor(chosen))


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    tokens: list[int]


def read_prompts(path: Path, tokenizer: Tokenizer, seq_length: int) -> Iterator[Prompt]:
    """A prompt a line of the UTF-8 text file `path`, without the line's end; - is standard input, line by line.

    Raises:
        UserError: naming file and line, for an empty line, a prompt that leaves nothing of `seq_length` to write to, or
            what is not UTF-8; for a file that cannot be read or has no line.
    """
    with (
        file_errors("read", path),
        open(0 if path == STANDARD_INPUT else path, "rb", closefd=path != STANDARD_INPUT) as file,
    ):
        number = 0
        for number, line in enumerate(file, start=1):
            where = f"--sample-input-file {path}:{number}"
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"{where}: is not UTF-8 text; convert the file") from None
            yield prompt_of(text, tokenizer, seq_length, where)
    if number == 0:
        raise UserError(f"--sample-input-file {path}: is empty; expected a prompt a line")


def prompt_of(text: str, tokenizer: Tokenizer, seq_length: int, where: str) -> Prompt:
    """The prompt `text`. Raises UserError, which begins with `where`, for an empty one and one that leaves nothing of
    `seq_length` to write to."""
    tokens = tokenizer.encode(text)
    if not tokens:
        raise UserError(f"{where}: is empty; expected a prompt (to write from nothing, give none)")
    if len(tokens) >= seq_length:
        raise UserError(
            f"{where}: has {len(tokens):,} tokens, which leaves nothing of the model's {seq_length:,} to write to; "
            "shorten it"
        )
    return Prompt(text, tokens)


def write_samples(
    model: GPT2Model,
    tokenizer: Tokenizer,
    prompts: Iterable[Prompt] | None,
    *,
    num_samples: int,
    out_seq_length: int,
    batch_size: int,
    sampling: Sampling,
    seed: int,
    one_by_one: bool = False,
) -> Iterator[dict[str, object]]:
    """`num_samples` samples of each prompt, or, without `prompts`, from the end of text on, in their order.

    Args:
        batch_size: samples that are computed at a time, of several prompts together.
        one_by_one: answer each prompt before the next is read, so that a batch holds samples of one alone.

    Yields:
        prompt and text, both as text; tokens, the ids of the text; finished, whether the end of text came after it.
    """
    asked = [Prompt("", [tokenizer.eod])] if prompts is None else prompts
    done = 0
    for batch in _batches(asked, num_samples, batch_size, one_by_one):
        continuations = generate(
            model,
            [prompt.tokens for prompt in batch],
            max_new_tokens=out_seq_length,
            eod=tokenizer.eod,
            sampling=sampling,
            seed=seed,
            first_sample=done,
        )
        done += len(batch)
        for prompt, continuation in zip(batch, continuations, strict=True):
            yield {
                "prompt": prompt.text,
                "text": tokenizer.decode(continuation.tokens),
                "tokens": continuation.tokens,
                "finished": continuation.finished,
            }


def readable(sample: dict[str, object]) -> str:
    """A sample of `write_samples` for people: prompt and text, with what a terminal would obey made visible."""
    text = f"{sample['prompt']}{sample['text']}"
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def _batches(prompts: Iterable[Prompt], num_samples: int, batch_size: int, one_by_one: bool) -> Iterator[list[Prompt]]:
    """Each prompt `num_samples` times, cut into batches; no more prompts are read than the next batch needs."""
    for group in ([prompt] for prompt in prompts) if one_by_one else (prompts,):
        samples = (prompt for prompt in group for _ in range(num_samples))
        while batch := list(islice(samples, batch_size)):
            yield batch


@contextmanager
def output_stream(path: Path | None) -> Iterator[TextIO]:
    """A stream for samples, to the file `path` or standard output; in UTF-8, whatever the terminal's encoding is.

    What stands in a file is replaced at the end of the block; until then, and where the block fails, what has been
    written is in PATH.part beside it. A pipe or a device is written to as it is.

    Raises:
        UserError: where it cannot be written. (A reader of standard output may leave: BrokenPipeError.)
    """
    beside = None if path is None or (path.exists() and not path.is_file()) else path.with_name(f"{path.name}.part")
    if beside is not None:
        make_parent(beside)
    try:
        with open(1 if path is None else beside or path, "w", encoding="utf-8", closefd=path is not None) as stream:
            yield stream
        if beside is not None and path is not None:
            beside.replace(path)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise explain(error, "write", path or Path("standard output")) from error
