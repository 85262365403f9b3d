"""What people write with Hugging Face's tokenizers: JSON lines to a row of token ids, each document ended.

    python benchmarks/plain_preprocessing.py IN.jsonl[.gz] OUT.bin VOCAB.json MERGES.txt

The other contestant of bench_preprocessing.py; it says how long it took without its imports and its tokenizer's.
"""

from __future__ import annotations

import gzip
import json
import sys
import time
from itertools import islice

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

DOCUMENTS = 256
"""Of a batch."""


def main(source: str, target: str, vocab_file: str, merge_file: str) -> None:
    tokenizer = Tokenizer(BPE.from_file(vocab_file, merge_file))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    eod = tokenizer.token_to_id("<|endoftext|>")
    started = time.perf_counter()
    size = 0
    packed = source.endswith(".gz")
    with gzip.open(source, "rb") if packed else open(source, "rb") as lines, open(target, "wb") as out:
        while batch := list(islice(lines, DOCUMENTS)):
            size += sum(map(len, batch))
            for encoded in tokenizer.encode_batch_fast([json.loads(line)["text"] for line in batch]):
                np.array([*encoded.ids, eod], dtype=np.uint16).tofile(out)
    seconds = time.perf_counter() - started
    print(f"{size / 1e6:.1f} MB in {seconds:.3f} s ({size / 1e6 / seconds:.2f} MB/s)")


if __name__ == "__main__":
    main(*sys.argv[1:])
