"""Which documents are for training, validation and test: Megatron's `949,50,1` rule."""

from __future__ import annotations

import math

from megatron.errors import UserError

NAMES = ("train", "validation", "test")


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of training, validation and test in `split`, normalised to the sum 1.

    The shares are separated by commas or slashes; those left out are 0. Raises UserError that names --split.
    """
    example = "expected up to three shares such as 949,50,1"
    parts = split.split("," if "," in split else "/")
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        raise UserError(f"--split {split!r}: {example}, found something that is not a number") from None
    if len(shares) > 3:
        raise UserError(f"--split {split!r}: {example}, found {len(shares)}")
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise UserError(f"--split {split!r}: shares must be finite and not negative")
    total = sum(shares)
    if not 0 < total < math.inf:
        raise UserError(f"--split {split!r}: the shares must have a positive, finite sum, found {total:g}")
    train, validation, test = (share / total for share in shares + [0.0] * (3 - len(shares)))
    return train, validation, test


def split_documents(split: str, num_documents: int) -> tuple[range, range, range]:
    """Documents for training, validation and test: three neighbouring ranges that cover them all.

    Rounds as `get_train_valid_test_split_` of Megatron-LM: every share is rounded by itself (halves to even),
    and what the roundings add or miss is taken from or given to the first split. Where that would make a
    border negative, which Megatron does not guard against, the border is 0. Raises UserError that names --split.
    """
    ends = [0]
    for share in parse_split(split):
        ends.append(ends[-1] + round(share * float(num_documents)))
    excess = ends[-1] - num_documents
    ends = [0] + [max(0, end - excess) for end in ends[1:]]
    return range(ends[0], ends[1]), range(ends[1], ends[2]), range(ends[2], ends[3])
