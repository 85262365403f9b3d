"""Requests of lm-eval at the edges of a context: one of blanks alone, and one longer than the trained length."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from random_models import SMALL, random_weights

from megatron.checkpointing.weights import build_model, named_vocabulary
from megatron.config import TokenizerConfig
from megatron.evaluation.loading import Loaded
from megatron.tokenizer.training import TrainedTokenizer

TRAINED = 20
"""Tokens, of 32 positions."""


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """The module under test, where the extra is installed."""
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    from megatron.evaluation import harness

    return harness


@pytest.fixture(scope="module")
def loaded(tiny_tokenizer: TrainedTokenizer) -> Loaded:
    """A random model with more positions than it was trained on."""
    flags = TokenizerConfig(vocab_file=str(tiny_tokenizer.vocab_file), merge_file=str(tiny_tokenizer.merge_file))
    vocabulary = named_vocabulary(flags)
    assert vocabulary is not None
    weights = random_weights(replace(SMALL, seq_length=TRAINED, max_position_embeddings=32), vocabulary)
    return Loaded(build_model(weights), vocabulary.tokenizer, weights.config, vocabulary.size, weights.source)


def likelihood(loaded: Loaded, tokens: list[int], targets: int) -> float:
    """Of the last `targets` tokens, from every logit of one forward pass."""
    with torch.no_grad():
        hidden = loaded.model(torch.tensor([tokens[:-1]]))
        logs = loaded.model.logits(hidden)[:, : loaded.vocab_size].log_softmax(-1)
    rows = range(len(tokens) - 1 - targets, len(tokens) - 1)
    return sum(float(logs[row, tokens[row + 1]]) for row in rows)


@pytest.mark.parametrize("others", [[], ["def test(tmp", "import"]])
def test_a_context_of_blanks_is_the_end_of_text(harness: ModuleType, loaded: Loaded, others: list[str]) -> None:
    model, text = harness.MegatronSLW(loaded), loaded.require_tokenizer()
    pairs = [*((other, " x = 1") for other in others), (" ", "assert x")]
    requests = [harness.Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    answers = model.loglikelihood(requests, disable_tqdm=True)
    target = text.encode(" assert x")  # the harness moves the blank to the continuation
    assert answers[-1][0] == pytest.approx(likelihood(loaded, [text.eod, *target], len(target)), rel=1e-5)


def test_what_is_read_is_the_trained_length_not_the_positions(harness: ModuleType, loaded: Loaded) -> None:
    model = harness.MegatronSLW(loaded)
    context, target = list(range(40, 70)), [7, 8]
    ((found, _),) = model._loglikelihood_tokens([(None, context, target)], disable_tqdm=True)
    assert found == pytest.approx(likelihood(loaded, [*context, *target][-(TRAINED + 1) :], 2), rel=1e-5)
    assert model.cut == 1
    text = "def test_that(tmp_path: Path) -> None: assert x == 1 # and more"
    tokens = [loaded.require_tokenizer().eod, *loaded.require_tokenizer().encode(text)]
    (whole,) = model.loglikelihood_rolling([harness.Instance("loglikelihood_rolling", {}, (text,), 0)], True)
    first = tokens[: TRAINED + 1]
    rest = len(tokens) - len(first)
    assert 0 < rest < TRAINED
    expected = likelihood(loaded, first, TRAINED) + likelihood(loaded, tokens[-(TRAINED + 1) :], rest)
    assert whole == pytest.approx(expected, rel=1e-5)
