"""The small run that tests of the tuner tune."""

from __future__ import annotations

from megatron.arguments import build_parser, parse_config
from megatron.config import Config

FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 64 --global-batch-size 8 "
    "--train-tokens 102400 --lr 1e-3 --lr-warmup-iters 10"
).split()
"""A run of 200 steps at full length."""


def config_of(*flags: str) -> Config:
    return parse_config(build_parser(), [*FLAGS, *flags])[0]
