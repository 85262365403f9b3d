"""Decay groups, clipping, loss scaling and moment statistics against slow obvious references."""

import math

import pytest
import torch

from megatron.config import ModelConfig, OptimizerConfig, TrainingConfig
from megatron.distributed.world import ALONE
from megatron.model.gpt2 import GPT2Model
from megatron.model.initialisation import initialise
from megatron.optimizer import adamw
from megatron.optimizer import moment_statistics as moments
from megatron.optimizer.adamw import (
    build_optimizer,
    decay_groups,
    gradients,
    scale_and_clip,
    set_learning_rate,
    squared_norm,
)
from megatron.optimizer.loss_scale import LossScaler


@pytest.fixture
def model() -> GPT2Model:
    model = GPT2Model(ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=8), 100)
    initialise(model, 0)
    return model


@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_only_matrices_decay(model, decay_embeddings):
    config = OptimizerConfig(weight_decay=0.1, decay_embeddings=decay_embeddings)
    groups = decay_groups(model, config)
    decayed = {id(p) for p in groups[0]["params"]}
    for name, p in model.named_parameters():
        expected = p.ndim == 2 and (decay_embeddings or "embeddings" not in name)
        assert (id(p) in decayed) == expected, name
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_one_step_is_adamw_by_hand(model):
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.1, adam_beta2=0.95))
    weight, bias = model.blocks[0].mlp.up.weight, model.blocks[0].mlp.up.bias
    before, bias_before = weight.detach().clone(), bias.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    update = 0.5 / (0.5 + 1e-8)
    torch.testing.assert_close(weight, before * (1 - 0.01 * 0.1) - 0.01 * update)
    torch.testing.assert_close(bias, bias_before - 0.01 * update)


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 1.0), (0.0, 1.0), (1e6, 1.0), (1.0, 1024.0), (0.0, 8.0)])
def test_scale_and_clip(max_norm, scale):
    true = [torch.randn(5, 3), torch.randn(7)]
    grads = [g * scale for g in true]
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in true))
    found = squared_norm(grads).sqrt() / scale
    assert found.item() == pytest.approx(norm, rel=1e-6)
    scale_and_clip(grads, found, loss_scale=scale, max_norm=max_norm)
    factor = min(1.0, max_norm / norm) if max_norm else 1.0
    for got, want in zip(grads, true, strict=True):
        torch.testing.assert_close(got, want * factor, rtol=1e-4, atol=1e-6)


def test_a_nan_anywhere_shows_in_the_norm():
    assert math.isnan(squared_norm([torch.ones(3), torch.tensor([1.0, math.nan])]))
    assert math.isinf(squared_norm([torch.ones(3), torch.tensor([1.0, math.inf])]))


def test_moment_statistics_equal_the_definition_and_chunking_changes_nothing(model, monkeypatch):
    optimizer = build_optimizer(model, OptimizerConfig())
    assert moments.moment_statistics(optimizer, ALONE) is None
    for step in range(3):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    states = list(optimizer.state.values())
    variance = sum(float(s["exp_avg_sq"].double().sqrt().sum()) for s in states)
    largest = max(float(s["exp_avg_sq"].sqrt().max()) for s in states)
    momentum = sum(float(s["exp_avg"].double().abs().sum()) for s in states)
    for elements in (1, 500, 1 << 26):
        monkeypatch.setattr(adamw, "CPU_PIECE", elements)
        got = moments.moment_statistics(optimizer, ALONE)
        assert got.adam_variance_norm == pytest.approx(variance, rel=1e-5)
        assert got.adam_variance_max == pytest.approx(largest, rel=1e-6)
        assert got.adam_momentum_norm == pytest.approx(momentum, rel=1e-5)


@pytest.mark.parametrize("way", [adamw.power_sum, adamw.sum_of_sums, adamw.sum_of_norms])
@pytest.mark.parametrize("order", [0.5, 1, 2])
def test_both_ways_to_sum_powers_equal_the_definition(way, order, monkeypatch):
    """The way of GPUs, too, which works on any device."""
    monkeypatch.setattr(adamw, "CPU_PIECE", 100)
    tensors = [torch.rand(7, 30), torch.rand(3), torch.rand(5, 4).t()]
    expected = sum(float((t.double() ** order).sum()) for t in tensors)
    assert float(way(tensors, order)) == pytest.approx(expected, rel=1e-6)
    if order != 0.5:
        assert float(way([-t for t in tensors], order)) == pytest.approx(expected, rel=1e-6)


def test_norms_of_an_embedding_of_millions_are_exact():
    """PyTorch's own norms on a CPU add in fp32 one after the other: the l2 norm of this one is nearly 2% off."""
    large, small = torch.full((50304, 768), 0.1), torch.full((3,), -0.1)
    elements = large.numel() + 3
    assert float(squared_norm([large, small])) == pytest.approx(elements * 0.01, rel=1e-6)
    assert float(adamw.power_sum([large, small], 1)) == pytest.approx(elements * 0.1, rel=1e-6)
    parameter = torch.nn.Parameter(large)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"exp_avg_sq": large.square(), "exp_avg": -large}
    got = moments.moment_statistics(optimizer, ALONE)
    assert got.adam_variance_norm == pytest.approx(elements * 0.1, rel=1e-6)
    assert got.adam_momentum_norm == pytest.approx(elements * 0.1, rel=1e-6)
    assert got.adam_variance_max == pytest.approx(0.1, rel=1e-6)


def test_gradients_skips_parameters_without_one():
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    a.grad = torch.ones(2)
    assert len(gradients([a, b])) == 1


def scaler(**settings) -> LossScaler:
    return LossScaler(TrainingConfig(**{"train_iters": 1, "fp16": True, "initial_loss_scale": 64.0} | settings))


def test_loss_scale_follows_window_hysteresis_and_minimum():
    s = scaler(loss_scale_window=2, hysteresis=2, min_loss_scale=16.0)
    seen = []
    for overflow in (True, True, True, True, False, False, True, True, False, False):
        s.update(overflow)
        seen.append(s.scale)
    #      tolerated, halves, again (no tolerance left), minimum; two good steps double and restore the hysteresis
    assert seen == [64, 32, 16, 16, 16, 32, 32, 16, 16, 32]


def test_loss_scale_state_round_trip():
    a, b = scaler(), scaler()
    for overflow in (True, False, False):
        a.update(overflow)
    b.load_state_dict(a.state_dict())
    assert b.state_dict() == a.state_dict()
    assert b.scale == a.scale


def test_a_loss_scale_of_zero_is_dynamic_as_in_deepspeed():
    assert scaler(loss_scale=0.0).dynamic
    assert scaler(loss_scale=0.0).scale == 64.0


def test_fixed_scale_and_no_fp16():
    fixed = scaler(loss_scale=128.0)
    fixed.update(True)
    assert fixed.scale == 128.0
    assert not fixed.dynamic
    assert scaler(fp16=False).scale == 1.0
