"""Models of ours in lm-eval, EleutherAI's evaluation harness (extra `eval`): its tasks, its metrics, our model.

    python -m megatron.evaluation.harness --model megatron_slw --model_args load=runs/slw --tasks hellaswag,piqa

is the harness's own command line, with the model class registered. No code from a hub is run (trust_remote_code).
"""

from __future__ import annotations

import difflib
import json
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config import TokenizerConfig
from megatron.distributed.world import ALONE, World
from megatron.errors import UserError, run
from megatron.evaluation.generation import Sampling, generate
from megatron.evaluation.loading import Loaded, load_model
from megatron.evaluation.scoring import MICRO_BATCH_TOKENS, Piece, batches, score

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.api.task import Task
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from tqdm import tqdm
except ImportError as error:
    raise UserError(f"lm-eval cannot be imported ({error}); install it: pip install 'megatron-slw[eval]'") from None

NAME = "megatron_slw"
PAPER_TASKS = (
    "hellaswag lambada_openai triviaqa webqs winogrande piqa arc_challenge arc_easy anli_r1 anli_r2 anli_r3"
).split()
"""Of the paper's average."""
PAPER = "paper"
"""Stands for all of them."""
HEADLINES = ("acc", "exact_match")
"""The metric of a task that goes into the average: the first of these that it has."""

PACKAGE = Path(__file__).resolve().parents[1]

TokenRequest = tuple[object, list[int], list[int]]
"""What it stems from, the tokens of the context, and those of the continuation."""


@register_model(NAME)
class MegatronSLW(TemplateLM):
    """One of our models, as the harness asks for it.

    Of many ranks each holds the whole model and takes its share of the forward passes, and all have all answers: the
    harness runs on each of them as if it were alone.
    """

    def __init__(self, loaded: Loaded, micro_batch_tokens: int = MICRO_BATCH_TOKENS, world: World = ALONE) -> None:
        """`micro_batch_tokens` are those of a forward pass; for generation, of the prompts with what may follow."""
        super().__init__()
        self.cut = 0
        """Requests so far whose context lost its first tokens, since the model does not read so many."""
        self._model = loaded.model
        self._text = loaded.require_tokenizer()
        self._seq_length = loaded.config.seq_length
        self._micro_batch_tokens = micro_batch_tokens
        self._world = world

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> MegatronSLW:
        """From the text of --model_args; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> MegatronSLW:
        """From --model_args: load (as of the other tools), device, dtype, micro_batch_tokens, and the tokenizer's flags
        with underscores. The harness's batch_size is passed over: forward passes are filled by tokens.

        Raises:
            UserError: naming what is missing or unknown, and for all that `load_model` refuses.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None} | arg_dict
        for name in ("batch_size", "max_batch_size"):
            given.pop(name, None)
        words = ("tokenizer_type", "vocab_file", "merge_file", "tokenizer_file")
        if given.get("device") == "cuda:0":  # the harness's own default: refused, as any GPU, where there is none
            given["device"] = "cuda"
        files = TokenizerConfig(**{name: given.pop(name) for name in words if name in given})
        budget = given.pop("micro_batch_tokens", MICRO_BATCH_TOKENS)
        known = ("load", "device", "dtype")
        for name in given:
            if name not in known:
                expected = ", ".join((*known, "micro_batch_tokens", *words))
                raise UserError(f"--model_args {name}: expected one of {expected}")
        if "load" not in given:
            raise UserError("--model_args: expected load=DIR, a run, a checkpoint or a Hugging Face GPT-2 directory")
        if not isinstance(budget, int) or budget < 1:
            raise UserError(f"--model_args micro_batch_tokens={budget}: expected a whole number of at least 1")
        return cls(load_model(Path(str(given.pop("load"))), tokenizer=files, **given), budget)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document; it stands before a text without a context."""
        return self._text.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """The tokens of a text; there are no special ones to add."""
        return self._text.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text as a whole, in windows of the full length that share no target."""
        windows: list[TokenRequest] = []
        counts = []
        for request in requests:
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self._seq_length,
                context_len=1,
            )
            own = [(None, *utils.make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        sums = [likelihood for likelihood, _ in self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)]
        return [sum(sums[first:end]) for first, end in pairwise(accumulate(counts, initial=0))]

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-likelihood, and whether greedy decoding would write it.

        Of a context that is too long the last tokens count; one without tokens, as of blanks, which the harness moves
        to the continuation, is the end of text.
        """
        pieces = []
        for request, given, continuation in requests:
            if not 0 < len(continuation) <= self._seq_length:
                raise self._world.fault(
                    f"a continuation of {len(continuation):,} tokens cannot be scored by a model of "
                    f"{self._seq_length:,}: {str(request)[:80]!r}"
                )
            tokens = [*(given or [self.eot_token_id]), *continuation]
            self.cut += len(tokens) > self._seq_length + 1
            pieces.append(Piece(np.array(tokens[-(self._seq_length + 1) :], dtype=np.int32), len(continuation)))
        if not pieces:
            return []
        total = sum(len(piece.tokens) - 1 for piece in pieces)
        with self._progress("scoring", total, disable_tqdm) as advance:
            scores = score(
                self._model,
                pieces,
                micro_batch_tokens=self._micro_batch_tokens,
                world=self._world,
                advance=advance.update,
            )
        return [(-loss, greedy) for loss, greedy in zip(scores.losses.tolist(), scores.greedy.tolist(), strict=True)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes, greedily, after each context up to one of its stop sequences.

        Raises:
            UserError: for a task that asks for sampling, or for more tokens than the model's full length.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        share: list[tuple[int, str]] = []
        with self._progress("generating", len(requests), disable_tqdm) as advance:
            for settings, members in groups.items():
                contexts = [requests[index].args[0] for index in members]
                for places, texts in self._generate_group(contexts, json.loads(settings)):
                    share += [(members[place], text) for place, text in zip(places, texts, strict=True)]
                    advance.update(len(places))
        written = [""] * len(requests)
        for index, text in chain.from_iterable(self._world.gather(share)):
            written[index] = text
        return written

    def _generate_group(
        self, contexts: Sequence[str], settings: dict[str, Any]
    ) -> Iterator[tuple[list[int], list[str]]]:
        """This rank's batches of the contexts' numbers and what was written after each, all under `settings`."""
        wanted = dict(normalize_gen_kwargs(settings))
        until, longest = handle_stop_sequences(wanted["until"], eos=None), wanted["max_gen_toks"]
        if wanted["do_sample"]:
            raise self._world.fault(
                f"a task asks for sampling ({settings}); here its texts are greedy: give do_sample=False"
            )
        if not 0 < longest < self._seq_length:
            raise self._world.fault(
                f"a task asks for texts of {longest:,} tokens after its prompt; the model's full length is "
                f"{self._seq_length:,}: give a smaller --gen_kwargs max_gen_toks"
            )
        room = self._seq_length - longest
        whole = [self.tok_encode(context) for context in contexts]
        self.cut += sum(len(prompt) > room for prompt in whole)
        prompts = [prompt[-room:] or [self.eot_token_id] for prompt in whole]

        def stop(tokens: list[int]) -> bool:
            text = self._text.decode(tokens)
            return any(term in text for term in until if term)

        passes = list(batches([len(prompt) + longest for prompt in prompts], self._micro_batch_tokens))
        for places in passes[self._world.rank :: self._world.size]:
            continuations = generate(
                self._model,
                [prompts[place] for place in places],
                max_new_tokens=longest,
                eod=self.eot_token_id,
                sampling=Sampling(greedy=True),
                stop=stop,
            )
            texts = [self._text.decode(one.tokens) for one in continuations]
            yield places, [postprocess_generated_text(text, until, None) for text in texts]

    def _progress(self, what: str, total: int, silent: bool) -> tqdm[Any]:
        """A line on stderr with the time left, of this rank's share; only on a terminal."""
        silent = silent or not self._world.is_main
        return tqdm(total=-(-total // self._world.size), desc=what, unit_scale=True, disable=silent or None)


def run_harness(
    loaded: Loaded,
    tasks: Sequence[str],
    limit: int | None = None,
    include_path: Path | None = None,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    world: World = ALONE,
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness, with their own numbers of shots.

    Args:
        tasks: names that the harness, or a task file in `include_path`, knows; groups and tags too; PAPER for
            PAPER_TASKS.
        limit: examples of each task, for a trial (None: all).
        include_path: a directory of task files (YAML) of one's own.
        micro_batch_tokens: of a forward pass.
        world: ranks that share the forward passes; all of them get the result.

    Returns:
        As JSON values: "results", task -> metric -> value; "versions" of the tasks; "n-shot"; "n-samples"; "average",
        the mean of `headline` over the `tasks`, None where one of them has none; "seq_length", and "truncated", the
        requests whose context was longer than that.

    Raises:
        UserError: for an argument that makes no sense, an unknown task, and for what fails in the harness itself, as a
            broken task file or its data.
    """
    if limit is not None and limit < 1:
        raise world.fault(f"--limit {limit}: expected at least 1 example of each task")
    if micro_batch_tokens < 1:
        raise world.fault(f"--micro-batch-tokens {micro_batch_tokens} must be at least 1")
    if include_path is not None and not include_path.is_dir():
        raise world.fault(f"--include-path {include_path}: is no directory; name the one that holds your task files")
    names = dict.fromkeys(name for task in tasks for name in (PAPER_TASKS if task == PAPER else [task]))
    manager, items = world.everywhere(lambda: _load_tasks(list(names), include_path))
    model = MegatronSLW(loaded, micro_batch_tokens, world)
    try:
        outcome = simple_evaluate(model=model, tasks=items, limit=limit, task_manager=manager, log_samples=False)
    except Exception as error:
        if _passed_through_us(error):
            raise
        raise world.fault(
            f"--task {','.join(names)}: lm-eval failed: {_said(error)}; mend the task's file or its data, or leave "
            "the task out"
        ) from error
    # The harness gives nothing to other ranks than the first of a node.
    outcome = world.gather(outcome and {key: outcome[key] for key in ("results", "versions", "n-shot", "n-samples")})[0]
    called = [item.name if isinstance(item, Group) else item.task_name for item in items]
    headlines = [headline(outcome["results"][name]) for name in called]
    known = [value for value in headlines if value is not None]
    return dict(outcome) | {
        "average": sum(known) / len(known) if len(known) == len(headlines) else None,
        "seq_length": loaded.config.seq_length,
        "truncated": model.cut,
    }


def _load_tasks(names: Sequence[str], include_path: Path | None) -> tuple[TaskManager, list[Task | Group]]:
    """What the names stand for, with its data: a task, a group, or the tasks of a tag. Raises UserError."""
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    items: list[Task | Group] = []
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            passed_over = f" (files in {include_path} that are no YAML are passed over)" if include_path else ""
            raise UserError(
                f"--task {name}: lm-eval knows no such task{passed_over}"
                + (f"; did you mean {near[0]}?" if near else "; lm-eval ls tasks lists them")
            )
        file = manager.task_index[name].yaml_path
        where = f"--task {name} ({file})" if file else f"--task {name}"
        try:
            loaded = manager.load(name)
        except OSError as error:  # of the data: no file, no network, not in the hub's cache
            raise UserError(
                f"{where}: the data cannot be read ({_said(error)}); run it once where the hub can be reached, or copy "
                "its cache (HF_HOME)"
            ) from error
        except Exception as error:  # nothing of ours is called: the fault is the file's, its data's or lm-eval's
            raise UserError(f"{where}: lm-eval cannot load it: {_said(error)}; mend that file or its data") from error
        items += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
    return manager, items


def _passed_through_us(error: Exception) -> bool:
    """Whether the harness was calling our model when this was raised, so that it is no fault of a task.

    The outermost frame is the one that caught it.
    """
    frames = list(traceback.walk_tb(error.__traceback__))[1:]
    return any(PACKAGE in Path(frame.f_code.co_filename).resolve().parents for frame, _ in frames)


def _said(error: BaseException) -> str:
    """Class and text of an exception, in one line, and of what it stems from."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
    return f"{line}, from {_said(error.__cause__)}" if error.__cause__ else line


def headline(metrics: Mapping[str, Any]) -> float | None:
    """The accuracy among a task's metrics, or the share of exact matches; None where it has neither."""
    for name in HEADLINES:
        for key, value in metrics.items():
            if key.split(",")[0] == name:
                return float(value)
    return None


if __name__ == "__main__":
    run(cli_evaluate)
