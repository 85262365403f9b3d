"""Learning rate against the formulas of the paper's runs."""

import math

import pytest

from megatron.config import Config, LearningRateConfig, TrainingConfig
from megatron.errors import UserError
from megatron.pacing.plan import walk
from megatron.progress import Duration, Progress


def rates(config: Config) -> list[float]:
    return [step.lr for _, step in walk(config)]


def make(training: dict, lr: dict, **other) -> Config:
    return Config(training=TrainingConfig(**training), learning_rate=LearningRateConfig(**lr), **other)


def test_warmup_in_steps_then_cosine_over_tokens_with_the_clip():
    batch, length, peak = 4, 1024, 1e-3
    total, warm = 20 * batch * length, 5
    got = rates(
        make({"train_tokens": total, "global_batch_size": batch}, {"lr": peak, "min_lr": 1e-4, "lr_warmup_iters": warm})
    )
    want = []
    for t in range(1, 21):
        if t <= warm:
            want.append(peak * t / warm)
        else:
            before, anchor = (t - 1) * batch * length, warm * batch * length
            want.append(max(peak / 2 * (1 + math.cos(math.pi * (before - anchor) / (total - anchor))), 1e-4))
    assert got == pytest.approx(want, rel=1e-12)
    assert got[0] == peak / 5, "the first step is not wasted"
    assert got[4] == got[5] == peak
    assert got[-1] == 1e-4


def test_interpolation_to_the_floor():
    clip = rates(make({"train_iters": 10, "global_batch_size": 1}, {"lr": 1.0, "min_lr": 0.5, "lr_floor": "clip"}))
    inter = rates(
        make({"train_iters": 10, "global_batch_size": 1}, {"lr": 1.0, "min_lr": 0.5, "lr_floor": "interpolate"})
    )
    cosine = [0.5 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]
    assert clip == pytest.approx([max(c, 0.5) for c in cosine])
    assert inter == pytest.approx([0.5 + 0.5 * c for c in cosine])


def test_warmup_in_tokens_counts_this_step_and_is_taken_without_exact_equality():
    # 4 x 1024 tokens a step, a warmup of 10,000 tokens ends inside step 3 (the fork wanted exact equality).
    got = rates(make({"train_tokens": 40_960, "global_batch_size": 4}, {"lr": 1.0, "lr_warmup_tokens": 10_000}))
    assert got[0] == 4096 / 10_000
    assert got[1] == 8192 / 10_000
    assert got[2] == 1.0
    start = 10_000
    assert got[3:] == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * (n * 4096 - start) / (40_960 - start))) for n in range(3, 10)]
    )


def test_warmup_in_samples_then_tokens():
    got = rates(make({"train_tokens": 8 * 4096, "global_batch_size": 4}, {"lr": 1.0, "lr_warmup_samples": 10}))
    assert got[:2] == [0.4, 0.8]
    assert got[2] == 1.0
    anchor = 3 * 4096
    assert got[3] == 1.0
    assert got[4] == pytest.approx(0.5 * (1 + math.cos(math.pi * (4 * 4096 - anchor) / (8 * 4096 - anchor))))


def test_stepwise_decay_of_the_appendix():
    got = rates(
        make({"train_iters": 30, "global_batch_size": 1}, {"lr": 1.0, "lr_warmup_iters": 10, "lr_decay_iters": 30})
    )
    assert got[20] == pytest.approx(0.5 * (1 + math.cos(math.pi * 10 / 20)))


def test_linear_constant_and_wsd():
    base = {"train_iters": 10, "global_batch_size": 1}
    assert rates(make(base, {"lr": 1.0, "lr_decay_style": "linear"})) == pytest.approx([1 - t / 10 for t in range(10)])
    assert rates(make(base, {"lr": 1.0, "lr_decay_style": "constant"})) == [1.0] * 10
    wsd = rates(make(base, {"lr": 1.0, "lr_decay_style": "wsd", "lr_wsd_fraction": 0.4}))
    assert wsd == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_after_the_decay_the_floor_stays():
    got = rates(make({"train_iters": 9, "global_batch_size": 1}, {"lr": 1.0, "min_lr": 0.1, "lr_decay_iters": 5}))
    assert got[5:] == [0.1] * 4


def test_the_anchor_is_set_once_by_advance():
    progress = Progress()
    warmup = Duration(2, "iters")
    seen = []
    for _ in range(4):
        progress.advance(samples=2, tokens=16, lr_warmup=warmup)
        seen.append(progress.lr_anchor_tokens)
    assert seen == [None, 32, 32, 32]
    assert (progress.iteration, progress.consumed_samples, progress.consumed_tokens) == (4, 8, 64)
    tokens = Progress()
    tokens.advance(samples=2, tokens=16, lr_warmup=Duration(10, "tokens"))
    assert tokens.lr_anchor_tokens == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_warmup_iters": 5, "lr_warmup_tokens": 5}, "one length of the learning rate warmup"),
        ({"lr_decay_iters": 5, "lr_decay_tokens": 5}, "one length of the learning rate decay"),
        ({"min_lr": 1.0}, "--min-lr"),
        ({"lr_warmup_fraction": 1.5}, "--lr-warmup-fraction"),
        ({"lr_warmup_iters": 100}, "must end before"),
        ({"lr_warmup_tokens": 100}, "a decay over iters needs"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        make({"train_iters": 10}, settings)
