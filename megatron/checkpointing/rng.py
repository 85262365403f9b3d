"""The state of every random number generator that training may draw from, as plain JSON values.

These are one process's own. A checkpoint's `state` is the same on every rank, so of many ranks the trainer gathers
theirs, saves all of them, and each restores its own.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.errors import UserError


def capture_rng() -> dict[str, Any]:
    """The states of python, numpy (legacy global), torch's CPU and, where CUDA is in use, its current device."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, _to_text(np.asarray(keys, dtype="<u4").tobytes()), position, has_gauss, cached],
        "torch": _tensor_to_text(torch.get_rng_state()),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _tensor_to_text(torch.cuda.get_rng_state())
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Continue where `capture_rng` stood. A CUDA state is left aside on a machine without CUDA.

    Raises UserError where `state` is not what `capture_rng` gave; the generators may then be restored in part.
    """
    try:
        version, words, gauss = state["python"]
        kind, keys, position, has_gauss, cached = state["numpy"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state((kind, np.frombuffer(_to_bytes(keys), dtype="<u4"), position, has_gauss, cached))
        torch.set_rng_state(_to_tensor(state["torch"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_to_tensor(state["cuda"]))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the saved state of the random number generators is not usable ({type(error).__name__}: {error}); "
            "--no-load-rng resumes without it, but not bit for bit"
        ) from error


def _to_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _to_bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _tensor_to_text(state: Tensor) -> str:
    return _to_text(state.cpu().numpy().tobytes())


def _to_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(_to_bytes(text)), dtype=torch.uint8)
