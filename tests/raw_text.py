"""Raw text files to preprocess, and what the datasets made of them hold."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import zstandard

from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.preprocessing import PreprocessConfig, preprocess
from megatron.tokenizer.build import TokenizerFiles

TEXTS = ["Hello world.", " two\nlines\n", "<|endoftext|> is text", "\u4f60\u597d \U0001f600 \x00", "x"]


def jsonl(texts, key="text") -> bytes:
    return b"".join(json.dumps({key: text}).encode() + b"\n" for text in texts)


def run(files: TokenizerFiles, tmp_path: Path, *inputs, **changes):
    changes = {"log_interval": 0, "overwrite": True} | changes
    return preprocess(PreprocessConfig([str(path) for path in inputs], str(tmp_path / "out/d"), files, **changes))


def decoded(files: TokenizerFiles, prefix: str | Path) -> list[str]:
    dataset, tokenizer = IndexedDataset(prefix), files.build()
    return [tokenizer.decode(dataset.read_document(i).tolist()) for i in range(dataset.document_count)]


def pack(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path
