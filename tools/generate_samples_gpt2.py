"""Write text with a trained model: plain on a terminal, else one JSON object a sample.

    python tools/generate_samples_gpt2.py --load runs/slw --prompt "The river" --num-samples 4 --top-p 0.9
    python tools/generate_samples_gpt2.py --load runs/slw --sample-input-file prompts.txt --greedy --out-seq-length 64

Without a prompt it writes from nothing: after the token that ends a document.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from the source tree, installed or not

from megatron import old_flags
from megatron.checkpointing.weights import DTYPES, require_apart
from megatron.errors import run
from megatron.evaluation.generation import (
    STANDARD_INPUT,
    Sampling,
    output_stream,
    prompt_of,
    read_prompts,
    readable,
    write_samples,
)
from megatron.evaluation.loading import load_model
from megatron.flags import Parser, count, finite_number, output_file, positive, some_path, some_text
from megatron.tokenizer.build import add_tokenizer_flags, tokenizer_config


def parse_arguments() -> argparse.Namespace:
    """The flags."""
    parser = Parser(description=__doc__)
    parser.advice = old_flags.tool_advice(old_flags.GENERATION)
    parser.add_argument(
        "--load",
        type=some_path,
        required=True,
        metavar="DIR",
        help="a run or its checkpoints, of which the newest is taken; one checkpoint; a Hugging Face GPT-2 directory",
    )
    what = parser.add_argument_group("What to write")
    prompts = what.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", type=some_text, action="append", metavar="TEXT", help="go on from it; repeatable")
    prompts.add_argument(
        "--sample-input-file",
        type=some_path,
        metavar="FILE",
        help="a prompt a line; - is standard input: lines typed at a terminal are answered one by one, those of a pipe "
        "or a file --batch-size samples at a time (with --batch-size 1 each is answered before the next is read)",
    )
    what.add_argument(
        "--sample-output-file",
        "--genfile",
        type=output_file,
        metavar="FILE",
        help="where to write; what is there stays until all samples are, which grow in FILE.part (default: standard "
        "output)",
    )
    what.add_argument("--num-samples", type=positive, default=1, metavar="N", help="samples of each prompt")
    what.add_argument(
        "--out-seq-length",
        type=positive,
        default=1024,
        metavar="N",
        help="longest text, in tokens after the prompt; the model's --seq-length ends it too",
    )
    how = parser.add_argument_group("How to choose the next token")
    how.add_argument("--greedy", action="store_true", help="always the likeliest one")
    how.add_argument("--temperature", type=finite_number, default=1.0, metavar="T", help="divide logits by this")
    how.add_argument(
        "--top-k", "--top_k", type=count, default=0, metavar="K", help="among the K likeliest; 0: among all"
    )
    how.add_argument(
        "--top-p",
        "--top_p",
        type=finite_number,
        default=0.0,
        metavar="P",
        help="among the likeliest that hold P of the probability, of the K if both are given; 0: among all",
    )
    how.add_argument("--seed", type=count, default=1234, metavar="N", help="seed of the draws")
    machine = parser.add_argument_group("Machine")
    machine.add_argument("--batch-size", type=positive, default=8, metavar="N", help="samples at a time")
    machine.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU if there is one"
    )
    machine.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="precision of weights and results")
    machine.add_argument("--recompute", action="store_true", help="does nothing: keys and values are always kept")
    add_tokenizer_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Load, and write sample after sample."""
    arguments = parse_arguments()
    if arguments.recompute:
        print("--recompute does nothing here: keys and values are always kept, the text is the same", file=sys.stderr)
    source, output = arguments.sample_input_file, arguments.sample_output_file
    require_apart("--sample-output-file", output, {"--sample-input-file": None if source == STANDARD_INPUT else source})
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.greedy)
    loaded = load_model(
        arguments.load, tokenizer=tokenizer_config(arguments), device=arguments.device, dtype=arguments.dtype
    )
    tokenizer, prompts = loaded.require_tokenizer(), None
    if source is not None:
        prompts = read_prompts(source, tokenizer, loaded.config.seq_length)
    if arguments.prompt:
        prompts = (prompt_of(text, tokenizer, loaded.config.seq_length, "--prompt") for text in arguments.prompt)
    samples = write_samples(
        loaded.model,
        tokenizer,
        # A file is read to its end first, so that a fault in it costs nothing; standard input may never end.
        prompts if prompts is None or source == STANDARD_INPUT else list(prompts),
        num_samples=arguments.num_samples,
        out_seq_length=arguments.out_seq_length,
        batch_size=arguments.batch_size,
        sampling=sampling,
        seed=arguments.seed,
        one_by_one=source == STANDARD_INPUT and os.isatty(0),
    )
    plain = output is None and os.isatty(1)
    with output_stream(output) as stream:
        for number, sample in enumerate(samples):
            text = readable(sample) if plain else json.dumps(sample, ensure_ascii=False)
            print("---\n" * (plain and number > 0) + text, file=stream, flush=True)


if __name__ == "__main__":
    run(main)
