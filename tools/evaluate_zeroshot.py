"""Evaluate a trained model zero-shot, as the paper does: WikiText-103's perplexity and LAMBADA's accuracy.

    python tools/evaluate_zeroshot.py --task WIKITEXT103 --load runs/slw --valid-data wiki.test.tokens
    python tools/evaluate_zeroshot.py --task LAMBADA --strict-lambada --load runs/slw --valid-data lambada_test.jsonl
    python tools/evaluate_zeroshot.py --task hellaswag,piqa --load runs/slw

The last takes tasks of lm-eval (extra `eval`), which brings their data, and gives their average.
On how many ranks and in which layout the model was saved does not matter. Under torchrun each rank takes its share of
the text, or of lm-eval's requests. A run keeps its results in zeroshot.json, beside its log, where tools/table2.py
finds them. docs/evaluation.md says what each number means.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import sys
from pathlib import Path

# Run from a source tree, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron import old_flags
from megatron.checkpointing.weights import DTYPES, Vocabulary, require_apart
from megatron.config import Config, ModelConfig, TrainingConfig
from megatron.distributed.launch import connect, read_environment
from megatron.errors import CommandLineError, note, run
from megatron.evaluation.loading import load_model, require_tokenizer
from megatron.evaluation.scoring import MICRO_BATCH_TOKENS
from megatron.evaluation.zeroshot import Task, ZeroShotConfig, evaluate, evaluate_harness, prepare
from megatron.flags import Parser, output_file, positive, some_path
from megatron.instability.zeroshot_results import (
    LAMBADA,
    STRIDE,
    WIKITEXT,
    describe,
    differences,
    kept_results,
    read_results,
    write_result,
)
from megatron.tokenizer.build import add_tokenizer_flags, tokenizer_config

LM_EVAL = "tasks of lm-eval"
OWNERS = {
    "overlapping_eval": (WIKITEXT,),
    "strict_lambada": (LAMBADA,),
    "truncate_context": (LAMBADA,),
    "seq_length": (WIKITEXT, LAMBADA),
    "limit": (LM_EVAL,),
    "include_path": (LM_EVAL,),
}
"""Flag -> the tasks that it is for."""


def parse_arguments() -> argparse.Namespace:
    """The flags, with Megatron's names."""
    parser = Parser(description=__doc__)
    parser.advice = old_flags.tool_advice(old_flags.EVALUATION)
    parser.add_argument("--task", required=True, help=f"{WIKITEXT}, {LAMBADA}, or tasks of lm-eval with commas between")
    parser.add_argument(
        "--load",
        type=some_path,
        required=True,
        metavar="DIR",
        help="a run or its checkpoints, of which the newest is taken, or one checkpoint, or a Hugging Face GPT-2",
    )
    parser.add_argument("--valid-data", type=some_path, metavar="FILE", help="wiki.test.tokens, or lambada_test.jsonl")
    parser.add_argument(
        "--overlapping-eval",
        type=positive,
        metavar="N",
        help="WikiText: windows move on by N tokens and score the last N; the sequence length: they do not overlap "
        f"[{STRIDE}]",
    )
    parser.add_argument(
        "--strict-lambada",
        action="store_const",
        const=True,
        help="LAMBADA: predict the whole last word, not the last token of the text alone",
    )
    parser.add_argument(
        "--truncate-context",
        action="store_const",
        const=True,
        help="LAMBADA: keep the last tokens of a text that is longer than the model reads, instead of refusing it",
    )
    parser.add_argument(
        "--seq-length",
        type=positive,
        metavar="N",
        help="WikiText, LAMBADA: tokens read at a time (default: the model's)",
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=positive,
        default=MICRO_BATCH_TOKENS,
        metavar="N",
        help="tokens of a forward pass",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="precision of weights and arithmetic")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: the GPU if there is one",
    )
    parser.add_argument("--output", type=output_file, metavar="JSON", help="write the result here too")
    group = parser.add_argument_group("lm-eval")
    group.add_argument("--limit", type=positive, metavar="N", help="examples of each task, for a trial (default: all)")
    group.add_argument("--include-path", type=some_path, metavar="DIR", help="task files of your own")
    add_tokenizer_flags(parser)
    return parser.parse_args()


def check(given: argparse.Namespace) -> None:
    """Raise CommandLineError, before a model is loaded, for flags that do not go together."""
    names = given.task.split(",")
    near = difflib.get_close_matches(names[0].upper(), (WIKITEXT, LAMBADA), n=1, cutoff=0.8)
    meant = f"; did you mean {near[0]}?" if near else ""
    if len(names) > 1 and (ours := [name for name in names if name in (WIKITEXT, LAMBADA)]):
        raise CommandLineError(f"--task {given.task}: {ours[0]} is evaluated by itself: give one at a time")
    if given.task.upper() == WIKITEXT != given.task:
        raise CommandLineError(f"--task {given.task}: there is none{meant}")
    if (kept := kept_results(given.load)) is not None:
        read_results(kept)  # a broken one is better found before the evaluation than after it
        if given.output is not None and given.output.resolve() == kept.resolve():
            raise CommandLineError(
                f"--output {given.output} is where the run keeps the results of all tasks, this one's too: drop it, or "
                "name another file"
            )
    require_apart("--output", given.output, {"--valid-data": given.valid_data})
    if given.task in (WIKITEXT, LAMBADA):
        if given.valid_data is None:
            raise CommandLineError(f"--task {given.task} needs --valid-data FILE, the text to evaluate on")
    elif given.valid_data is not None:
        raise CommandLineError(
            f"--task {given.task} is for lm-eval ({WIKITEXT} and {LAMBADA} are not), which brings its own data: drop "
            f"--valid-data, or correct --task{meant}"
        )
    for name, tasks in OWNERS.items():
        kind = given.task if given.task in (WIKITEXT, LAMBADA) else LM_EVAL
        if getattr(given, name) is not None and kind not in tasks:
            flag = "--" + name.replace("_", "-")
            raise CommandLineError(f"{flag} is for {' and '.join(tasks)}, not {given.task}: drop it, or correct --task")


def main() -> None:
    """Evaluate, print the result, and write it."""
    given = parse_arguments()
    check(given)
    tokenizer = tokenizer_config(given)
    # One sequence a rank: they share nothing but the work.
    training = TrainingConfig(train_iters=1, global_batch_size=read_environment().size, device=given.device)
    with connect(Config(training=training)) as (world, _):
        load = functools.partial(
            load_model, given.load, tokenizer=tokenizer, device=world.device.type, dtype=given.dtype
        )
        if given.task in (WIKITEXT, LAMBADA):
            names = [field.name for field in dataclasses.fields(ZeroShotConfig)]
            settings = ZeroShotConfig(**{name: value for name in names if (value := getattr(given, name)) is not None})
            tasks: list[Task] = []

            def before(model: ModelConfig, vocabulary: Vocabulary) -> None:
                tasks.append(prepare(settings, model, require_tokenizer(vocabulary.tokenizer, given.load)))

            loaded = world.everywhere(lambda: load(before=before))
            result = evaluate(loaded, settings, world, tasks[0])
        else:
            loaded = world.everywhere(load)
            result = evaluate_harness(
                loaded,
                given.task,
                limit=given.limit,
                include_path=given.include_path,
                micro_batch_tokens=given.micro_batch_tokens,
                world=world,
            )
        if world.is_main:
            print(describe(result))
            if given.task in (WIKITEXT, LAMBADA) and (otherwise := differences(result["task"], result)):
                note(f"not as the paper measured: {otherwise}")
            for path in write_result(result, load=given.load, output=given.output):
                print(f"written to {path}")


if __name__ == "__main__":
    run(main)
