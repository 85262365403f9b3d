"""A checkpoint's weights in one file, for other programs."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from megatron.checkpointing.tensors import storage_errors, write_safetensors
from megatron.checkpointing.weights import cast, find_weights, read_named
from megatron.errors import UserError
from megatron.files import fsync_directory, make_parent


def export_weights(load: Path, output: Path, *, dtype: str | None, force: bool) -> str:
    """Write the whole weights of a checkpoint to the safetensors file `output`, by the model's names for them.

    Args:
        load: a run, a directory of checkpoints (the newest is taken) or one checkpoint, saved in any layout.
        dtype: one of DTYPES, for what is floating point; None: as saved.
        force: replace `output` where it exists.

    Returns:
        What was written, in one line.

    Raises:
        UserError: where the checkpoint is not whole, the weights do not fit `dtype` or `output` cannot be written.
    """
    if output.exists() and not force:
        raise UserError(f"--output {output} exists: give --force to replace it, or choose another name")
    path = find_weights(load).path
    weights = cast(read_named(path), dtype)
    make_parent(output)
    temporary = output.with_name(f".{output.name}.tmp-{secrets.token_hex(4)}")
    with storage_errors("write", output):
        try:
            write_safetensors(temporary, weights, {"format": "pt"})
            os.replace(temporary, output)
            fsync_directory(output.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    parameters = sum(tensor.numel() for tensor in weights.values())
    size = output.stat().st_size
    return f"{output}: {len(weights):,} tensors, {parameters:,} parameters, {size:,} bytes, from {path}"
