"""Made-up and damaged input for parsers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.errors import UserError

EXAMPLES = pytest.mark.parametrize(
    "examples", [100, pytest.param(10_000, marks=[pytest.mark.faults, pytest.mark.timeout(3600)])]
)
NUMBERS = [0, 1, 2, 3, 4, 5, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def law(examples: int, **strategies: st.SearchStrategy) -> Callable[[Callable[..., None]], None]:
    """Check the decorated function over so many examples, now."""

    def check(function: Callable[..., None]) -> None:
        settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(
            given(**strategies)(function)
        )()

    return check


@st.composite
def damaged(draw: st.DrawFn, content: bytes, puts: st.SearchStrategy[bytes] | None = None) -> bytes:
    """`content` with up to four changes: bytes replaced, put in, taken out, or the rest cut off."""
    data = bytearray(content)
    put = st.binary(max_size=6) if puts is None else st.one_of(st.binary(max_size=6), puts)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(put)
        taken = draw(st.sampled_from([0, 1, len(new), len(new), len(new), 8, len(data)]))
        data[at : at + taken] = new
    return bytes(data)


def outcome(function: Callable[..., object], *arguments: object) -> object:
    """What `function` returns, or the UserError that it raises, in one line."""
    try:
        return function(*arguments)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return error
