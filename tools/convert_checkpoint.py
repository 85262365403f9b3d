"""Write a checkpoint's weights in a format that other programs read, or make a checkpoint of what others wrote.

    python tools/convert_checkpoint.py --load runs/slw --to safetensors --output slw.safetensors --dtype bf16
    python tools/convert_checkpoint.py --load runs/slw --to hf --save exported
    python tools/convert_checkpoint.py --from hf --load gpt2 --save runs/gpt2
    python tools/convert_checkpoint.py --from megatron --load checkpoints --save runs/old --vocab-size 50257

On how many ranks and in which layout the checkpoint was saved does not matter. A run goes on from what --from made with
`pretrain_gpt2.py --load DIR --finetune --save ...`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron.checkpointing.export import export_weights
from megatron.checkpointing.huggingface import read_huggingface
from megatron.checkpointing.huggingface_export import export_huggingface
from megatron.checkpointing.manifest import MANIFEST
from megatron.checkpointing.megatron_v1 import read_megatron
from megatron.checkpointing.weights import DTYPES, describe, read_run, require_free, save_weights
from megatron.errors import UserError, run
from megatron.flags import Parser, output_directory, output_file, positive, some_path
from megatron.tokenizer.build import add_tokenizer_flags, tokenizer_config

READERS = {"hf": read_huggingface, "megatron": read_megatron}


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--load",
        type=some_path,
        required=True,
        metavar="DIR",
        help="with --to a run or its checkpoints, of which the newest is taken, or one checkpoint; with --from a "
        "Hugging Face directory (nothing is downloaded), or what Megatron-LM saved to",
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--to",
        choices=("safetensors", "hf"),
        help="safetensors: the model's weights in one file, by their names here; hf: a directory for transformers",
    )
    way.add_argument(
        "--from",
        dest="source",
        choices=tuple(READERS),
        help="hf: a GPT-2 of transformers; megatron: a GPT-2 of Megatron-LM 1.1.5 or 2.x",
    )
    parser.add_argument("--output", type=output_file, metavar="FILE", help="the file to write (--to safetensors)")
    parser.add_argument("--save", type=output_directory, metavar="DIR", help="the directory to make (--to hf, --from)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="type of the weights, with --to (default: as saved)")
    parser.add_argument("--force", action="store_true", help="replace FILE where it exists")
    group = add_tokenizer_flags(parser)
    group.add_argument("--vocab-size", type=positive, metavar="N", help="tokens of the vocabulary, without a tokenizer")
    return parser.parse_args()


def main() -> None:
    """Convert, and say what was written."""
    given = parse_arguments()
    needed, other = ("output", "save") if given.to == "safetensors" else ("save", "output")
    way = f"--from {given.source}" if given.source else f"--to {given.to}"
    if getattr(given, needed) is None:
        raise UserError(f"{way} needs --{needed} {'FILE' if needed == 'output' else 'DIR'}, to write to")
    if getattr(given, other) is not None:
        raise UserError(f"{way} writes to --{needed}, not to --{other}: drop that")
    tokenizer = tokenizer_config(given)
    if given.to == "safetensors":
        if named := [f.name for f in dataclasses.fields(tokenizer) if getattr(given, f.name) is not None]:
            raise UserError(
                f"--{named[0].replace('_', '-')} is for --to hf and --from, not --to safetensors, which writes weights "
                "alone: drop it"
            )
        if (given.output.parent / MANIFEST).exists():
            raise UserError(f"--output {given.output} would be among a checkpoint's own files: name another directory")
        print(export_weights(given.load, given.output, dtype=given.dtype, force=given.force))
        return
    if given.force or (given.source and given.dtype):
        raise UserError(f"--{'force' if given.force else 'dtype'} has no effect here: drop it")
    require_free(given.save)
    if given.to == "hf":
        print(export_huggingface(read_run(given.load, tokenizer), given.save, dtype=given.dtype))
        return
    weights = READERS[given.source](given.load, tokenizer)
    print(f"{save_weights(weights, given.save)}: {describe(weights)}")


if __name__ == "__main__":
    run(main)
