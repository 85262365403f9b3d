"""Zero-shot numbers against Hugging Face's model on the same weights, one window at a time and every logit."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zeroshot_models import Encode, learn, made_up_texts, save_hugging_face, small_gpt2, write_lambada
from zeroshot_models import obvious_lambada as slow_lambada
from zeroshot_models import obvious_wikitext as slow_wikitext

from megatron.errors import UserError
from megatron.evaluation.loading import Loaded, load_model
from megatron.evaluation.scoring import Piece, batches, score
from megatron.evaluation.wikitext import detokenise, windows
from megatron.evaluation.zeroshot import ZeroShotConfig, evaluate
from megatron.instability.zeroshot_results import LAMBADA, WIKITEXT, describe

transformers = pytest.importorskip("transformers")

WIKI = (
    " \n = River stone = \n \n The sailors ' lantern ( a <unk> one ) cost 1 @,@ 200 pounds , or 2 @.@ 5 times that "
    '; it was a well @-@ known " morning star " of the river . \n = = Home = = \n \n He told him : never again ! \n'
)


@dataclass(frozen=True)
class Both:
    """One model twice: ours, and Hugging Face's with its own tokenizer."""

    loaded: Loaded
    theirs: Any
    encode: Encode

    def check_wikitext(self, path: Path, seq_length: int, stride: int) -> dict[str, Any]:
        config = ZeroShotConfig(WIKITEXT, path, overlapping_eval=stride, seq_length=seq_length, micro_batch_tokens=300)
        result = evaluate(self.loaded, config)
        raw = path.read_bytes().decode()
        words = len(raw.strip().split(" "))
        expected = slow_wikitext(self.theirs, detokenise(raw), words, self.encode, seq_length, stride)
        assert result["adjusted_perplexity"] == pytest.approx(expected, rel=1e-4)
        assert (result["original_tokens"], result["tokens"]) == (words, len(self.encode(detokenise(raw))))
        return result

    def check_lambada(self, path: Path, texts: list[str], strict: bool) -> None:
        result = evaluate(self.loaded, ZeroShotConfig(LAMBADA, path, strict_lambada=strict, micro_batch_tokens=300))
        right = slow_lambada(self.theirs, texts, self.encode, strict=strict)
        assert (result["correct"], result["examples"], result["truncated"]) == (sum(right), len(texts), 0)
        assert result["accuracy"] == sum(right) / len(texts)
        assert 0 < result["accuracy"] < 1


def both(model: Any, directory: Path) -> Both:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return Both(load_model(directory, device="cpu"), model, lambda text: tokenizer(text, verbose=False)["input_ids"])


@pytest.fixture(scope="module")
def small(tiny_tokenizer, tmp_path_factory) -> Both:
    """Knows the first six of the made-up texts by heart."""
    files = tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file
    model = small_gpt2(tiny_tokenizer.vocab_size, positions=128)
    found = both(model, save_hugging_face(model, tmp_path_factory.mktemp("untrained"), *files))
    learn(model, [found.encode(text) for text in made_up_texts(12)[:6]], targets=8, steps=20)
    return both(model, save_hugging_face(model, tmp_path_factory.mktemp("trained"), *files))


@pytest.fixture(scope="module")
def untrained(tiny_tokenizer, tmp_path_factory) -> Both:
    """Random weights."""
    model = small_gpt2(tiny_tokenizer.vocab_size, positions=128)
    files = tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file
    return both(model, save_hugging_face(model, tmp_path_factory.mktemp("random"), *files))


def test_random_weights_equal_a_slow_loop(untrained, tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_text(WIKI)
    untrained.check_wikitext(path, 64, 16)
    texts = made_up_texts(12)
    # Its own next words, so that some targets are the likeliest.
    guesses = [untrained.theirs(torch.tensor([untrained.encode(text)])).logits[0, -1].argmax() for text in texts[:4]]
    decode = untrained.loaded.require_tokenizer().decode
    texts += [text + decode([int(guess)]) for text, guess in zip(texts, guesses, strict=False)]
    untrained.check_lambada(write_lambada(tmp_path / "lambada.jsonl", texts), texts, strict=False)


@pytest.mark.parametrize(("seq_length", "stride"), [(64, 16), (64, 64), (40, 7), (64, 1), (128, 128)])
def test_wikitext_equals_a_slow_loop(small, tmp_path, seq_length, stride):
    path = tmp_path / "wiki.tokens"
    path.write_text(WIKI[: 150 + 50 * stride])  # a window a token takes the slow loop long
    result = small.check_wikitext(path, seq_length, stride)
    assert result["loss"] == pytest.approx(math.log(result["perplexity"]))
    assert result["perplexity"] < result["adjusted_perplexity"], "a word has several tokens"


@pytest.mark.parametrize("strict", [True, False])
def test_lambada_equals_a_slow_loop(small, tmp_path, strict):
    texts = made_up_texts(12)
    small.check_lambada(write_lambada(tmp_path / "lambada.jsonl", texts), texts, strict)


def test_perplexity_of_the_last_word(small, tmp_path):
    text = "told him never home"
    result = evaluate(
        small.loaded, ZeroShotConfig(LAMBADA, write_lambada(tmp_path / "one.jsonl", [text]), strict_lambada=True)
    )
    context, labels = small.encode("told him never"), small.encode(" home")
    with torch.no_grad():
        logs = small.theirs(torch.tensor([context + labels])).logits[0].log_softmax(-1)
    loss = -sum(float(logs[len(context) - 1 + i, label]) for i, label in enumerate(labels))
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert len(labels) > 1


@pytest.mark.parametrize(("count", "seq_length", "stride"), [(2, 8, 3), (9, 8, 3), (10, 8, 3), (50, 8, 8), (50, 8, 1)])
def test_every_token_is_a_target_once(count, seq_length, stride):
    found = []
    for number, piece in enumerate(windows(np.arange(count, dtype=np.int32), seq_length, stride)):
        assert piece.tokens[0] == number * stride
        assert len(piece.tokens) <= seq_length + 1
        found += piece.tokens[-piece.targets :].tolist()
    assert found == list(range(1, count))


def test_batches_hold_the_budget_and_every_piece_once():
    lengths = [3, 9, 1, 30, 9, 2, 3]
    found = list(batches(lengths, 20))
    assert [[lengths[i] for i in batch] for batch in found] == [[30], [9, 9], [3, 3, 2, 1]]
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))


def test_batching_does_not_change_scores(small):
    rng = np.random.default_rng(0)
    pieces = [
        Piece(rng.integers(0, 400, n, dtype=np.int32), t) for n, t in [(40, 39), (7, 1), (129, 5), (40, 2), (2, 1)]
    ]
    alone = score(small.loaded.model, pieces, micro_batch_tokens=1)
    seen: list[int] = []
    together = score(small.loaded.model, pieces, micro_batch_tokens=10_000, advance=seen.append)
    assert seen == [sum(len(piece.tokens) - 1 for piece in pieces)]
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-5)
    assert (together.greedy == alone.greedy).all()


def test_detokenised_by_hand():
    assert detokenise(WIKI) == (
        "\n= River stone =\n\nThe sailors' lantern (a <unk> one) cost 1,200 pounds, or 2.5 times that; "
        'it was a well-known "morning star" of the river.\n== Home ==\n\nHe told him: never again!\n'
    )
    for given, expected in [
        ("a [ b ] { c } d", "a [b] {c} d"),
        ("= = = = Deep = = = =", "==== Deep ===="),
        ("= = = Deep = = =", "=== Deep ==="),
        ("20 ° C", "20°C"),
        ("say ' it is so ' ?", "say 'it is so' ?"),
        ("the boat 's crew", "the boat's crew"),
        ("the boats ' crew and boat 's flag", "the boats'crew and boat's flag"),  # taken for a quotation, as there
        ("section N of", "section 1 of"),
        ("why ? because", "why? because"),
    ]:
        assert detokenise(given) == expected


def test_detokenised_as_another_program_does(shared_data):
    other = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    raw = (shared_data / "wiki.valid.tokens").read_bytes().decode()
    assert detokenise(raw) == other.wikitext_detokenizer({"page": raw})


def test_weights_that_are_not_finite_are_refused(small, tmp_path):
    path = write_lambada(tmp_path / "lambada.jsonl", made_up_texts(2))
    weight = small.loaded.model.final_norm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(UserError, match="the model's loss is not finite"):
            evaluate(small.loaded, ZeroShotConfig(LAMBADA, path))
    finally:
        with torch.no_grad():
            weight.copy_(before)


# The real files, with GPT-2's vocabulary.


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory) -> Both:
    """Knows the ends of every other of LAMBADA's first 20 examples by heart."""
    files = shared_data / "gpt2-vocab.json", shared_data / "gpt2-merges.txt"
    model = small_gpt2(50257, positions=256, hidden=16)
    found = both(model, save_hugging_face(model, tmp_path_factory.mktemp("random"), *files))
    learn(model, [found.encode(text) for text in lambada_texts(shared_data)[:20:2]], targets=3, steps=25)
    return both(model, save_hugging_face(model, tmp_path_factory.mktemp("trained"), *files))


def lambada_texts(directory: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (directory / "lambada_first1000.jsonl").read_text().splitlines()]


def test_a_part_of_the_real_wikitext(real, shared_data, tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_bytes((shared_data / "wiki.valid.tokens").read_bytes()[:2500])
    assert describe(real.check_wikitext(path, 64, 32)).startswith("WIKITEXT103: adjusted perplexity ")


@pytest.mark.parametrize("strict", [True, False])
def test_a_part_of_the_real_lambada(real, shared_data, tmp_path, strict):
    texts = lambada_texts(shared_data)[:20]
    real.check_lambada(write_lambada(tmp_path / "lambada.jsonl", texts), texts, strict)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_the_whole_real_lambada(real, shared_data, strict):
    real.check_lambada(shared_data / "lambada_first1000.jsonl", lambada_texts(shared_data), strict)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_real_wikitext(real, shared_data):
    real.check_wikitext(shared_data / "wiki.valid.tokens", 64, 32)
