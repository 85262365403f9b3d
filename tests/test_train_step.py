"""One step: the gradient must not depend on how the step was cut, and nothing non-finite may be applied."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron.data.batch import Batch
from megatron.distributed.world import ALONE
from megatron.errors import UserError
from megatron.instability.loss_ratio import bucket_name, position_buckets
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import initialise
from megatron.optimizer.adamw import build_optimizer
from megatron.optimizer.loss_scale import LossScaler
from megatron.pacing.plan import StepPlan
from megatron.training.evaluation import evaluate
from megatron.training.step import NonFiniteError, PositionLosses, TrainStep
from pretrain_gpt2 import forward_step

VOCAB, LENGTH = 120, 32
CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=LENGTH, hidden_dropout=0.0, attention_dropout=0.0
)


def model_of(seed: int = 0, dropout: float = 0.0) -> GPT2Model:
    model = GPT2Model(replace(CONFIG, hidden_dropout=dropout), VOCAB)
    initialise(model, seed)
    return model


def samples(n: int, seed: int = 0):
    return torch.randint(0, VOCAB, (n, LENGTH + 1), generator=torch.Generator().manual_seed(seed)).numpy()


def stepper(
    model: GPT2Model, forward=forward_step, clip: float = 0.0, scaler=None, realisation="truncate", **training
) -> TrainStep:
    config = TrainingConfig(**{"train_iters": 1, "global_batch_size": 12} | training)
    optimizer_config = OptimizerConfig(clip_grad=clip)
    return TrainStep(
        model, build_optimizer(model, optimizer_config), scaler or LossScaler(config), forward, config,
        optimizer_config, ParallelConfig(), ALONE, realisation,
    )  # fmt: skip


def one_step_gradients(batch: Batch, seqlen: int, **training):
    """Gradients of one step: caught on their way into the optimizer."""
    model = model_of()
    step = stepper(model, **training)
    caught = {}

    def catch(*_):
        caught.update({n: p.grad.clone() for n, p in model.named_parameters()})

    step.optimizer.register_step_pre_hook(catch)
    kept = None if training.get("realisation", "truncate") == "truncate" else batch.seqlen
    result = step(batch, StepPlan(seqlen, batch.sequences, 1e-3, kept))
    return result, caught


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seqlen", [8, 12, 24, 32])
def test_window_is_full_length_training_under_a_block_wise_mask(seqlen: int, masked: bool):
    """SkyLadder's mask: token i attends to floor(i / w) * w .. i."""
    rows = samples(12)
    batch = Batch.from_samples(rows, eod=3, eod_mask_loss=masked)
    blocks = (torch.arange(LENGTH) // seqlen).expand(12, -1)
    result, grads = one_step_gradients(batch, seqlen, realisation="window", micro_batch_tokens=64)
    expected, expected_grads = one_step_gradients(replace(batch, segment_ids=blocks), LENGTH, micro_batch_tokens=64)
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert sum(result.bucket_tokens) == sum(expected.bucket_tokens) == batch.loss_tokens(LENGTH)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seqlen", [8, 12, 24, 32])
def test_reshape_is_training_on_every_piece(seqlen: int):
    rows = samples(12)
    model = model_of()
    losses = [
        F.cross_entropy(
            model.logits(model(piece[:, :-1], None, None))[:, :VOCAB], piece[:, 1:].flatten(), reduction="sum"
        )
        for start in range(0, LENGTH, seqlen)
        for piece in [torch.from_numpy(rows[:, start : min(start + seqlen, LENGTH) + 1])]
    ]
    loss = sum(losses) / (12 * LENGTH)
    loss.backward()
    result, grads = one_step_gradients(
        Batch.from_samples(rows), seqlen, realisation="reshape", micro_batch_size=2, fixed_micro_batch=True
    )
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seqlen", [8, 24, 32])
@pytest.mark.parametrize(
    "cut",
    [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"micro_batch_tokens": 100}, {"micro_batch_tokens": 7 * 24},
     {"micro_batch_size": 3, "fixed_micro_batch": True}],
)  # fmt: skip
def test_gradients_and_loss_do_not_depend_on_micro_batches(seqlen, cut):
    """Also where they are unequal and where the mask leaves each a different number of tokens."""
    batch = Batch.from_samples(samples(12), eod=7, eod_mask_loss=True)
    whole, want = one_step_gradients(batch, seqlen, micro_batch_size=12)
    result, got = one_step_gradients(batch, seqlen, **cut)
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert result.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_gradient_is_that_of_the_mean_over_counted_tokens():
    batch = Batch.from_samples(samples(12), eod=7, eod_mask_loss=True)
    result, got = one_step_gradients(batch, 16, micro_batch_size=4)
    model = model_of()
    tokens, labels, mask = batch.tokens[:, :16], batch.labels[:, :16], batch.loss_mask[:, :16]
    losses = F.cross_entropy(model.logits(model(tokens)), labels.flatten(), reduction="none")
    loss = losses[mask.flatten()].mean()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-7)


def test_token_budget_sets_the_sequences_of_a_micro_batch():
    sizes = []

    def spy(model, batch, seqlen):
        sizes.append((batch.sequences, seqlen))
        return forward_step(model, batch, seqlen)

    for seqlen in (8, 32):
        stepper(model_of(), forward=spy, micro_batch_tokens=64)(
            Batch.from_samples(samples(12)), StepPlan(seqlen, 12, 1e-3)
        )
    assert sizes == [(8, 8), (4, 8), *[(2, 32)] * 6]
    budget = TrainingConfig(train_iters=1, global_batch_size=512, micro_batch_size=4)
    assert [budget.micro_batch_sequences(s, 1024) for s in (8, 64, 1000, 1024)] == [512, 64, 4, 4]
    fixed = TrainingConfig(train_iters=1, global_batch_size=512, micro_batch_size=4, fixed_micro_batch=True)
    assert fixed.micro_batch_sequences(8, 1024) == 4


def test_clipping_is_reported_and_limits_the_update():
    batch = Batch.from_samples(samples(12))
    model = model_of()
    step = stepper(model, clip=1e-3)
    norms = []
    step.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    )
    result = step(batch, StepPlan(LENGTH, 12, 1e-3))
    assert result.clipped
    assert result.grad_norm > 1e-3
    assert norms[0] == pytest.approx(1e-3, rel=1e-2)
    assert not stepper(model_of(), clip=1e9)(batch, StepPlan(LENGTH, 12, 1e-3)).clipped


def poisoned(model, batch, seqlen):
    losses, mask = forward_step(model, batch, seqlen)
    return losses * torch.tensor(math.nan), mask


def overflowing(model, batch, seqlen):
    """A finite loss whose gradient is infinite, as one that a loss scale has made too large."""
    losses, mask = forward_step(model, batch, seqlen)
    losses.register_hook(lambda gradient: gradient * math.inf)
    return losses, mask


def test_a_nan_stops_before_the_update():
    model = model_of()
    before = [p.detach().clone() for p in model.parameters()]
    step = stepper(model, forward=poisoned)
    with pytest.raises(NonFiniteError, match="nan"):
        step(Batch.from_samples(samples(12)), StepPlan(LENGTH, 12, 1e-3))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not step.optimizer.state


def test_an_overflow_under_dynamic_scaling_skips_and_lowers_the_scale():
    model = model_of()
    before = [p.detach().clone() for p in model.parameters()]
    scaler = LossScaler(TrainingConfig(train_iters=1, fp16=True, initial_loss_scale=64.0, hysteresis=1))
    step = stepper(model, forward=overflowing, scaler=scaler)
    result = step(Batch.from_samples(samples(12)), StepPlan(LENGTH, 12, 1e-3))
    assert result.skipped
    assert result.loss_scale == 64.0
    assert scaler.scale == 32.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("forward", "scale"), [(poisoned, 64.0), (overflowing, 1.0)])
def test_dynamic_scaling_does_not_skip_what_no_scale_can_mend(forward, scale):
    """A loss that is itself NaN, and an overflow at the smallest scale."""
    scaler = LossScaler(TrainingConfig(train_iters=1, fp16=True, initial_loss_scale=scale, min_loss_scale=1.0))
    with pytest.raises(NonFiniteError):
        stepper(model_of(), forward=forward, scaler=scaler)(Batch.from_samples(samples(12)), StepPlan(LENGTH, 12, 1e-3))


def test_a_step_without_a_token_to_learn_from_is_refused():
    batch = Batch.from_samples(samples(12) * 0 + 7, eod=7, eod_mask_loss=True)
    with pytest.raises(UserError, match="masked"):
        stepper(model_of())(batch, StepPlan(LENGTH, 12, 1e-3))


@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_the_update_uses_the_planned_learning_rate(lr):
    """The first AdamW step by hand: weights decay, then move by lr * g / (|g| + eps)."""
    batch = Batch.from_samples(samples(12))
    _, gradients = one_step_gradients(batch, LENGTH)
    model = model_of()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stepper(model)(batch, StepPlan(LENGTH, 12, lr))
    for name, p in model.named_parameters():
        g = gradients[name]
        decay = 0.01 if p.ndim == 2 else 0.0
        want = before[name] * (1 - lr * decay) - lr * g / (g.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), want, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(p, before[name]) == (lr == 0)


def test_a_loss_scale_changes_nothing_in_exact_arithmetic():
    batch = Batch.from_samples(samples(12))
    results = []
    for scale in (1.0, 1024.0):
        model = model_of()
        scaler = LossScaler(TrainingConfig(train_iters=1, fp16=True, loss_scale=scale))
        step = stepper(model, scaler=scaler, clip=0.5)
        results.append((step(batch, StepPlan(LENGTH, 12, 1e-3)), [p.detach().clone() for p in model.parameters()]))
    (a, first), (b, second) = results
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
    for p, q in zip(first, second, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_bf16_stays_close_to_fp32():
    batch = Batch.from_samples(samples(12))
    a = stepper(model_of())(batch, StepPlan(LENGTH, 12, 1e-3))
    b = stepper(model_of(), bf16=True)(batch, StepPlan(LENGTH, 12, 1e-3))
    assert b.loss == pytest.approx(a.loss, rel=1e-2)
    assert b.loss != a.loss, "bf16 was not used"


def test_position_losses_by_hand():
    losses = torch.arange(2 * 12, dtype=torch.float32).view(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 3] = False
    sums = PositionLosses(LENGTH, torch.device("cpu"))
    assert sums.add(losses, mask).item() == losses.sum().item() - 3
    sums.add(losses[:, :8], None)
    totals, counts, extra = sums.by_bucket(sums.totals(ALONE, torch.tensor(2.5)))
    assert counts == [15 + 16, 8]
    assert totals == [losses[:, :8].sum().item() * 2 - 3, losses[:, 8:].sum().item()]
    assert extra == [2.5]


def test_an_empty_bucket_does_not_move_the_others():
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, :8] = False
    sums = PositionLosses(LENGTH, torch.device("cpu"))
    sums.add(torch.ones(2, 16), mask)
    totals, counts, _ = sums.by_bucket(sums.totals(ALONE))
    assert (totals, counts) == ([0, 16], [0, 16])


class FixedDataset:
    seq_length = LENGTH
    num_samples_per_epoch = 10

    def __init__(self):
        self.asked = []

    def samples(self, indices):
        self.asked += indices.tolist()
        return samples(10, seed=4)[indices]


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_evaluation_is_the_exact_mean_over_exactly_the_samples_asked_for(chunk):
    model = model_of(dropout=0.5)
    model.train()
    dataset = FixedDataset()
    state = torch.get_rng_state()
    result = evaluate(
        model, forward_step, dataset, Batch.from_samples, samples=7, world=ALONE,
        training=TrainingConfig(train_iters=1, global_batch_size=12, micro_batch_size=chunk),
    )  # fmt: skip
    assert dataset.asked == list(range(7))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    rows = torch.from_numpy(samples(10, seed=4)[:7])
    with torch.no_grad():
        losses = F.cross_entropy(
            model.eval().logits(model(rows[:, :-1])), rows[:, 1:].flatten(), reduction="none"
        ).view(7, LENGTH)
    assert result.loss == pytest.approx(losses.mean().item(), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-6)
    assert result.tokens == 7 * LENGTH
    want = {bucket_name((a, b)): losses[:, a:b].mean().item() for a, b in position_buckets(LENGTH)}
    assert result.loss_by_position == pytest.approx(want, rel=1e-5)
    calls = iter([False, True])
    stopped = evaluate(
        model, forward_step, FixedDataset(), Batch.from_samples, samples=7, world=ALONE,
        interrupted=lambda: next(calls),
        training=TrainingConfig(train_iters=1, global_batch_size=12, micro_batch_size=1),
    )  # fmt: skip
    assert stopped is None
    everything = evaluate(
        model, forward_step, FixedDataset(), Batch.from_samples, samples=99, world=ALONE,
        training=TrainingConfig(train_iters=1, global_batch_size=12),
    )  # fmt: skip
    assert everything.samples == 10


def test_reserving_memory_changes_nothing():
    model = model_of(dropout=0.5)
    step = stepper(model)
    state = torch.get_rng_state()
    before = [p.detach().clone() for p in model.parameters()]
    step.reserve_memory(Batch.from_samples(samples(12)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    other = model_of(dropout=0.5)
    for stepping in (step, stepper(other)):
        torch.manual_seed(1)
        stepping(Batch.from_samples(samples(12)), StepPlan(16, 12, 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_reserving_memory_makes_the_moments_that_stay():
    step = stepper(model_of())
    step.reserve_memory(Batch.from_samples(samples(12)))
    made = {id(step.optimizer.state[p]["exp_avg_sq"]) for p in step.model.parameters()}
    step(Batch.from_samples(samples(12)), StepPlan(16, 12, 1e-2))
    assert {id(step.optimizer.state[p]["exp_avg_sq"]) for p in step.model.parameters()} == made
