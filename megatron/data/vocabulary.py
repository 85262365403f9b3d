"""The size of a run's vocabulary, before anything is loaded. No torch."""

from __future__ import annotations

from megatron.config import Config
from megatron.data.blending import parse_data_path
from megatron.data.indexed_dataset import Sidecar, paths_of
from megatron.tokenizer.build import build_tokenizer


def vocabulary_size(config: Config) -> int | None:
    """What --vocab-size, the tokenizer's files or what preprocessing noted of the data say; None where none does.

    Raises UserError for a tokenizer that cannot be read.
    """
    flags = config.tokenizer
    if flags.vocab_size is not None:
        return flags.vocab_size
    if flags.vocab_file or flags.merge_file or flags.tokenizer_file:
        files = (flags.vocab_file, flags.merge_file, flags.tokenizer_file)
        return build_tokenizer(flags.tokenizer_type, *files).vocab_size
    for _, prefix in parse_data_path(config.data.data_path) if config.data.data_path else ():
        sidecar = Sidecar.read(paths_of(prefix)[2])
        if sidecar is not None and sidecar.vocab_size is not None:
            return sidecar.vocab_size
    return None
