"""Decoding and sampling: against whole forward passes, Hugging Face's generate() and its filters of logits."""

from __future__ import annotations

import json
import os
import pty
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import random_weights
from zeroshot_models import save_hugging_face, small_gpt2

from megatron.checkpointing.weights import named_vocabulary, save_weights
from megatron.config import ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.evaluation.generation import (
    Continuation,
    Prompt,
    Sampling,
    generate,
    read_prompts,
    readable,
    write_samples,
)
from megatron.evaluation.loading import load_model
from megatron.model.decoding import Decoder
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import initialise
from megatron.tokenizer.gpt2_bpe import GPT2BPETokenizer
from megatron.tokenizer.training import TrainedTokenizer

VOCABULARY = 300
GREEDY = Sampling(greedy=True)
PROGRAM = Path(__file__).resolve().parents[1] / "tools" / "generate_samples_gpt2.py"


def build(vocabulary: int = VOCABULARY, **settings: float) -> GPT2Model:
    """A random model whose predictions differ from place to place."""
    config = ModelConfig(
        **{"num_layers": 3, "hidden_size": 48, "num_attention_heads": 4, "seq_length": 40, "init_method_std": 0.3}
        | settings
    )
    model = GPT2Model(config, vocabulary)
    initialise(model, seed=1)
    return model.eval()


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def recomputed(model: GPT2Model, tokens: list[int]) -> torch.Tensor:
    """Logits of the next token, by a whole forward pass over the sequence alone: [vocabulary]."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])))[-1, :VOCABULARY]


def test_cached_steps_equal_whole_passes_of_each_row_alone():
    model, rows = build(), random_prompts(3, 17, 1, 9)
    decoder = Decoder(model, rows, capacity=28)
    for step in range(11):
        if step == 4:  # two rows leave, and the others change places
            decoder.keep([3, 1])
            rows = [rows[3], rows[1]]
        alone = torch.stack([recomputed(model, row) for row in rows])
        torch.testing.assert_close(decoder.logits, alone, rtol=1e-4, atol=1e-4)
        tokens = torch.randint(VOCABULARY, (len(rows),), generator=torch.Generator().manual_seed(step))
        decoder.step(tokens)
        rows = [[*row, token] for row, token in zip(rows, tokens.tolist(), strict=True)]
    assert len(rows[1]) == 28
    with pytest.raises(UserError, match="a sequence has filled the 28 tokens"):
        decoder.step(torch.tensor([1, 2]))


def test_decoding_leaves_the_model_as_it_was():
    model, tokens = build(), torch.tensor(random_prompts(12))
    before = model(tokens)
    Decoder(model, random_prompts(4, 6), capacity=10).step(torch.tensor([1, 2]))
    assert torch.equal(model(tokens), before)
    assert not any("attend" in vars(block.attention) for block in model.blocks)


@pytest.mark.parametrize(
    ("lengths", "capacity", "message"),
    [
        ((4, 0), 10, "a prompt has no token"),
        ((4, 11), 10, "prompts of up to 11 tokens and room for 10 do not fit the model's 40 positions"),
        ((4, 2), 41, "room for 41 do not fit the model's 40 positions"),
    ],
)
def test_what_has_no_room_is_refused(lengths: tuple[int, ...], capacity: int, message: str):
    with pytest.raises(UserError, match=message):
        Decoder(build(), random_prompts(*lengths), capacity)


def test_greedy_equals_hugging_face_token_by_token(tmp_path: Path):
    pytest.importorskip("transformers")
    theirs = small_gpt2(VOCABULARY, positions=64)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path, device="cpu").model
    prompts = random_prompts(5, 12, 1, 30, 8, 8)
    longest = max(map(len, prompts))
    left_padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    straight = generate(ours, prompts, max_new_tokens=30, eod=-1, sampling=GREEDY)
    eod = straight[1].tokens[6]
    wanted = theirs.generate(
        left_padded, attention_mask=mask, do_sample=False, max_new_tokens=30, eos_token_id=eod, pad_token_id=eod
    )[:, longest:].tolist()
    got = generate(ours, prompts, max_new_tokens=30, eod=eod, sampling=GREEDY)
    assert len({tuple(row) for row in wanted}) == len(prompts)
    assert got == [
        Continuation(row[: row.index(eod)], True) if eod in row else Continuation(row, False) for row in wanted
    ]
    assert {one.finished for one in got} == {True, False}, "both ways to end are met"


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.6), Sampling(top_k=7), Sampling(top_p=0.7), Sampling(1.7, top_k=40, top_p=0.9),
     Sampling(top_k=VOCABULARY + 1, top_p=1.0), Sampling(top_k=1), Sampling(top_p=1e-9)],
    ids=repr,
)  # fmt: skip
def test_probabilities_equal_hugging_faces_filters(sampling: Sampling):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(16, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = process.TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        expected = process.TopKLogitsWarper(sampling.top_k)(None, expected)
    if sampling.top_p:
        expected = process.TopPLogitsWarper(sampling.top_p)(None, expected)
    torch.testing.assert_close(sampling.probabilities(logits), expected.softmax(-1))


def test_top_p_by_hand():
    """0.5 + 0.3 reach 0.8, whose two tokens share what is left; the least p leaves the likeliest."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]], dtype=torch.float64).log()
    kept = Sampling(top_p=0.75).probabilities(logits)
    torch.testing.assert_close(kept, torch.tensor([[0, 5 / 8, 0, 3 / 8]], dtype=torch.float64))
    assert Sampling(top_p=0.01).probabilities(logits).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_a_temperature_near_0_takes_the_likeliest(temperature: float):
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(2))
    for sampling in (Sampling(temperature), Sampling(temperature, top_k=5, top_p=0.9)):
        assert torch.equal(sampling.probabilities(logits).argmax(-1), logits.argmax(-1))
        assert sampling.probabilities(logits).amax(-1).tolist() == [1.0] * 5


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.randn(12, generator=torch.Generator().manual_seed(4))
    sampling, draws = Sampling(temperature=0.8, top_k=9, top_p=0.95), 40_000
    generator = torch.Generator().manual_seed(8)
    counts = sampling.choose(logits.expand(draws, -1), [generator] * draws).bincount(minlength=12)
    probabilities = sampling.probabilities(logits[None])[0]
    deviations = (probabilities * (1 - probabilities) / draws).sqrt()
    assert 3 <= (probabilities == 0).sum() < 9
    assert ((counts / draws - probabilities).abs() <= 4 * deviations).all()


def test_a_sample_depends_on_seed_and_number_not_on_its_batch():
    model, prompts = build(init_method_std=0.05), random_prompts(4, 9, 2, 31, 6, 3, 12)

    def samples(size: int, seed: int = 5) -> list[list[int]]:
        batches = [
            generate(model, prompts[first : first + size], max_new_tokens=20, eod=-1, sampling=Sampling(top_p=0.95),
                     seed=seed, first_sample=first)
            for first in range(0, len(prompts), size)
        ]  # fmt: skip
        return [one.tokens for batch in batches for one in batch]

    expected = samples(7)
    assert samples(1) == samples(3) == expected
    assert samples(7, seed=6) != expected
    assert [len(tokens) for tokens in expected] == [20, 20, 20, 9, 20, 20, 20], "40 positions end the fourth"
    same = generate(model, [prompts[0]] * 3, max_new_tokens=20, eod=-1, sampling=Sampling())
    assert len({tuple(one.tokens) for one in same}) == 3, "samples of one prompt differ"


def test_a_caller_can_stop_a_row():
    model, prompts = build(), random_prompts(4, 9)
    straight = generate(model, prompts, max_new_tokens=20, eod=-1, sampling=GREEDY)
    stopped = generate(
        model, prompts, max_new_tokens=20, eod=-1, sampling=GREEDY, stop=lambda tokens: tokens == straight[0].tokens[:3]
    )
    assert stopped == [Continuation(straight[0].tokens[:3], True), straight[1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0.0 must be above 0; --greedy takes the likeliest"),
        ({"temperature": float("nan")}, "--temperature nan must be above 0"),
        ({"temperature": float("inf")}, "--temperature inf must be above 0"),
        ({"top_k": -1}, "--top-k -1 must not be negative"),
        ({"top_p": 1.1}, r"--top-p 1.1 must be in \[0, 1\]"),
        ({"greedy": True, "top_k": 5}, "leave out --temperature, --top-k and --top-p"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(UserError, match="a prompt of 40 tokens leaves nothing of the model's 40"):
        generate(build(), random_prompts(3, 40), max_new_tokens=1, eod=0, sampling=GREEDY)


def test_a_damaged_model_writes_nothing():
    model = build()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3, 5] = torch.nan
    with pytest.raises(UserError, match="the model's predictions are not finite"):
        generate(model, random_prompts(3), max_new_tokens=4, eod=0, sampling=GREEDY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\n\nthree\n", "prompts.txt:2: is empty; expected a prompt"),
        (b"", "prompts.txt: is empty; expected a prompt a line"),
        (b"one\ntwo \xff\n", "prompts.txt:2: is not UTF-8 text"),
        (b"word " * 64, "prompts.txt:1: has [0-9]+ tokens, which leaves nothing of the model's 40"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, tiny_tokenizer: TrainedTokenizer, content: bytes, message: str):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    tokenizer = GPT2BPETokenizer(tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file)
    with pytest.raises(UserError, match=message):
        list(read_prompts(path, tokenizer, 40))


def test_on_a_terminal_a_sample_is_its_text_and_no_command():
    sample = {"prompt": "def\t", "text": "f\u00fcnf\n\x1b[2J\r\u202e", "tokens": [], "finished": True}
    assert readable(sample) == "def\tf\u00fcnf\n\\x1b[2J\\r\\u202e"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """tools/generate_samples_gpt2.py, within this process."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["generate_samples_gpt2.py", *map(str, arguments)])
        runpy.run_path(str(PROGRAM))["main"]()

    return call


def test_the_program_writes_json_lines(
    tmp_path: Path, tiny_tokenizer: TrainedTokenizer, program: Callable[..., None], capfd: pytest.CaptureFixture[str]
):
    pytest.importorskip("transformers")
    files = tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file
    model, tokenizer = small_gpt2(tiny_tokenizer.vocab_size, positions=64), GPT2BPETokenizer(*files)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("def test\r\n  gr\u00fcn \n", encoding="utf-8", newline="")
    base = ["--load", save_hugging_face(model, tmp_path / "model", *files), "--device", "cpu",
            "--sample-input-file", prompts, "--num-samples", 2, "--out-seq-length", 5]  # fmt: skip
    program(*base, "--sample-output-file", output, "--greedy", "--recompute")
    assert "--recompute does nothing here" in capfd.readouterr().err
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == ["def test"] * 2 + ["  gr\u00fcn "] * 2
    for line in lines:
        tokens = torch.tensor([tokenizer.encode(line["prompt"])])
        best = model.generate(tokens, do_sample=False, max_new_tokens=5, eos_token_id=tokenizer.eod)[0].tolist()
        assert line["tokens"] == best[tokens.shape[1] :]
        assert line["text"] == tokenizer.decode(line["tokens"])
        assert line["finished"] is False
    written = []
    for size in (1, 3):
        program(*base, "--top_k", 5, "--batch-size", size)
        written.append(capfd.readouterr().out)
    assert written[0] == written[1]
    assert len({json.loads(line)["text"] for line in written[0].splitlines()}) == 4
    with pytest.raises(UserError, match="argument --prompt: not allowed with argument --sample-input-file"):
        program(*base, "--prompt", "def")
    with pytest.raises(UserError, match="--out-seq-length: expected a whole number from 1, found '0'"):
        program(*base, "--out-seq-length", 0)
    program(*base, "--genfile", tmp_path / "none" / "out")
    assert len((tmp_path / "none" / "out").read_text().splitlines()) == 4
    with pytest.raises(UserError, match=r"out/x' cannot be written: .* is no directory"):
        program(*base, "--genfile", tmp_path / "none" / "out" / "x")
    if Path("/dev/full").exists():
        with pytest.raises(UserError, match="cannot write /dev/full: disk full"):
            program(*base, "--sample-output-file", "/dev/full")


def test_files_are_not_lost_and_the_type_is_taken(
    tmp_path: Path,
    tiny_tokenizer: TrainedTokenizer,
    program: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    files = tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file
    vocabulary = named_vocabulary(TokenizerConfig(vocab_file=str(files[0]), merge_file=str(files[1])))
    assert vocabulary is not None
    save_weights(random_weights(vocabulary=vocabulary), tmp_path / "run")
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("a\nb\nc\n")
    output.write_text("before")
    base = ["--load", tmp_path / "run", "--device", "cpu", "--out-seq-length", 2, "--batch-size", 1]
    base += ["--sample-input-file", prompts, "--genfile"]
    with pytest.raises(UserError, match=r"--sample-output-file .*txt would be written over --sample-input-file .*txt"):
        program(*base, prompts)
    assert prompts.read_text() == "a\nb\nc\n"

    program(*base[:8], "--prompt", "one", "--prompt", "two", "--greedy")
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "isatty", lambda descriptor: descriptor == 1)
        program(*base[:8], "--prompt", "one", "--prompt", "two", "--greedy")
    assert capfd.readouterr().out == "---\n".join(f"{readable(line)}\n" for line in lines)
    with pytest.raises(UserError, match=r"--prompt: has [0-9,]+ tokens, which leaves nothing of the model's"):
        program(*base[:8], "--prompt", "word " * 500)

    types = []

    def interrupted(model: GPT2Model, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Continuation]:
        types.append(model.word_embeddings.weight.dtype)
        if len(types) == 3:
            raise KeyboardInterrupt
        return generate(model, prompts, **settings)

    monkeypatch.setattr("megatron.evaluation.generation.generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program(*base, output, "--dtype", "bf16")
    part = tmp_path / "out.jsonl.part"
    assert output.read_text() == "before" and len(part.read_text().splitlines()) == 2
    assert set(types) == {torch.bfloat16}
    program(*base, output)
    assert len(output.read_text().splitlines()) == 3 and not part.exists()


def test_one_by_one_each_prompt_is_answered_before_the_next_is_read(tiny_tokenizer: TrainedTokenizer):
    tokenizer, read = GPT2BPETokenizer(tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file), []

    def typed() -> Iterator[Prompt]:
        for text in ("one", "two", "three"):
            read.append(text)
            yield Prompt(text, tokenizer.encode(text))

    seen = []
    for one_by_one in (True, False):
        read.clear()
        samples = write_samples(
            build(tokenizer.vocab_size), tokenizer, typed(), num_samples=3, out_seq_length=2, batch_size=2,
            sampling=Sampling(), seed=0, one_by_one=one_by_one,
        )  # fmt: skip
        seen.append([(sample, list(read)) for sample in samples])
    alone, together = seen
    assert [sample for sample, _ in alone] == [sample for sample, _ in together]
    assert [len(before) for _, before in alone] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [len(before) for _, before in together] == [1, 1, 2, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("terminal", "batches"), [(False, [4, 4, 2]), (True, [2, 2, 2, 2, 2])])
def test_standard_input_is_batched_unless_it_is_a_terminal(
    terminal: bool, batches: list[int], tmp_path: Path, tiny_tokenizer: TrainedTokenizer, program: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    pytest.importorskip("transformers")
    files = tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file
    directory = save_hugging_face(small_gpt2(tiny_tokenizer.vocab_size, positions=64), tmp_path / "model", *files)
    text = b"a\nbc\ndef\ng\nhi\n"
    reader, writer = pty.openpty()[::-1] if terminal else os.pipe()
    os.write(writer, text + (b"\x04" if terminal else b""))  # the end of a terminal's input is typed
    if not terminal:
        os.close(writer)
    found: list[int] = []

    def counted(model: GPT2Model, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Continuation]:
        found.append(len(prompts))
        return generate(model, prompts, **settings)

    monkeypatch.setattr("megatron.evaluation.generation.generate", counted)
    standard_input = os.dup(0)
    try:
        os.dup2(reader, 0)
        program("--load", directory, "--device", "cpu", "--sample-input-file", "-", "--num-samples", 2,
                "--out-seq-length", 1, "--batch-size", 4)  # fmt: skip
    finally:
        os.dup2(standard_input, 0)
        for descriptor in (standard_input, reader, *((writer,) if terminal else ())):
            os.close(descriptor)
    prompts = [json.loads(line)["prompt"] for line in capfd.readouterr().out.splitlines()]
    assert prompts == [line for line in text.decode().split() for _ in range(2)]
    assert found == batches


def test_without_prompts_samples_start_after_the_end_of_text(tiny_tokenizer: TrainedTokenizer):
    tokenizer = GPT2BPETokenizer(tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file)
    model = build(tokenizer.vocab_size)
    (sample,) = write_samples(
        model, tokenizer, None, num_samples=1, out_seq_length=6, batch_size=4, sampling=GREEDY, seed=0
    )
    (expected,) = generate(model, [[tokenizer.eod]], max_new_tokens=6, eod=tokenizer.eod, sampling=GREEDY)
    assert sample["prompt"] == ""
    assert sample["tokens"] == expected.tokens
