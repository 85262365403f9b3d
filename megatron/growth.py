"""Pacings of sequence length warmup that grow from --seqlen-start to --seq-length over T.

A new one is added here alone: its name, its curve, and its case in `grown_seqlen` (docs/pacing.md shows one).
"""

from __future__ import annotations

from typing import Literal, assert_never, get_args

from megatron.errors import UserError

Growth = Literal["linear", "root"]
"""Their names, as --seqlen-warmup takes them."""


def grown_seqlen(
    pacing: Growth, position: int, duration: int, start: int, end: int, multiple: int = 1, root_degree: int = 2
) -> int:
    """Sequence length in tokens: floor(start + (end - start) * curve(position / duration)), then down to a multiple.

    From `position` = `duration` on it is `end`. Arithmetic is on integers, so that no length depends on how a float
    was rounded. A curve that needs a float takes floor(x + 1e-9), which puts the whole numbers on the right side.

    Args:
        position: the 1-based optimizer step t, or the tokens trained on before it.
        duration: T, in the unit of `position`.
        start, end: first and full length in tokens, both multiples of `multiple`.
        root_degree: d of root pacing.

    Raises:
        UserError: for a pacing that is none of these.
    """
    if pacing not in get_args(Growth):
        raise UserError(f"pacing {pacing!r}: expected one of {', '.join(get_args(Growth))}")
    if position >= duration:
        return end
    match pacing:
        case "linear":
            grown = linear(position, duration, end - start)
        case "root":
            grown = root(position, duration, end - start, root_degree)
        case _:
            assert_never(pacing)
    length = start + grown
    return length - length % multiple


def linear(position: int, duration: int, span: int) -> int:
    """floor(span * position / duration): step-wise linear, Section 4 of the paper; DeepSpeed's fixed_linear."""
    return span * position // duration


def root(position: int, duration: int, span: int, degree: int) -> int:
    """floor(span * (position / duration)^(1 / degree)): DeepSpeed's fixed_root.

    The 2022 text of the paper writes the exponent as the degree itself; the code that ran, and the DeepSpeed tutorial,
    take the root.
    """
    power = span**degree * position // duration
    grown = round(power ** (1 / degree))  # off by one at most where a float is exact enough, else put right below
    while grown**degree > power:
        grown -= 1
    while (grown + 1) ** degree <= power:
        grown += 1
    return grown
