"""Models of ours in lm-eval, EleutherAI's evaluation harness (extra `eval`): its tasks, its metrics, our model.

    python -m megatron.evaluation.harness --model megatron_slw --model_args load=runs/slw --tasks hellaswag,piqa

is the harness's own command line, with the model class registered. No code from a hub is run (trust_remote_code).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config import TokenizerConfig
from megatron.errors import UserError, run
from megatron.evaluation.generation import Sampling, generate
from megatron.evaluation.loading import Loaded, load_model
from megatron.evaluation.scoring import MICRO_BATCH_TOKENS, Piece, batches, score

try:
    from lm_eval import simple_evaluate, utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
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

TokenRequest = tuple[object, list[int], list[int]]
"""What it stems from, the tokens of the context, and those of the continuation."""


@register_model(NAME)
class MegatronSLW(TemplateLM):
    """One of our models, as the harness asks for it; all on one device."""

    def __init__(self, loaded: Loaded, micro_batch_tokens: int = MICRO_BATCH_TOKENS) -> None:
        """`micro_batch_tokens` are those of a forward pass; for generation, of the prompts with what may follow."""
        super().__init__()
        self._model = loaded.model
        self._text = loaded.require_tokenizer()
        self._seq_length = loaded.config.seq_length
        self._micro_batch_tokens = micro_batch_tokens

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
        if given.get("device") == "cuda:0":  # what the harness says where the user says nothing, on any machine
            given["device"] = "auto"
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

        Of a context that is too long the last tokens count.
        """
        pieces = []
        for request, context, continuation in requests:
            if not 0 < len(continuation) <= self._seq_length:
                raise UserError(
                    f"a continuation of {len(continuation):,} tokens cannot be scored by a model of "
                    f"{self._seq_length:,}: {str(request)[:80]!r}"
                )
            tokens = np.array([*context, *continuation][-(self._seq_length + 1) :], dtype=np.int32)
            pieces.append(Piece(tokens, len(continuation)))
        if not pieces:
            return []
        with _progress("scoring", sum(len(piece.tokens) - 1 for piece in pieces), disable_tqdm) as advance:
            scores = score(self._model, pieces, micro_batch_tokens=self._micro_batch_tokens, advance=advance.update)
        return [(-loss, greedy) for loss, greedy in zip(scores.losses.tolist(), scores.greedy.tolist(), strict=True)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes, greedily, after each context up to one of its stop sequences.

        Raises:
            UserError: for a task that asks for sampling, or for more tokens than the model's full length.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        written = [""] * len(requests)
        with _progress("generating", len(requests), disable_tqdm) as advance:
            for settings, members in groups.items():
                contexts = [requests[index].args[0] for index in members]
                for places, texts in self._generate_group(contexts, json.loads(settings)):
                    for place, text in zip(places, texts, strict=True):
                        written[members[place]] = text
                    advance.update(len(places))
        return written

    def _generate_group(
        self, contexts: Sequence[str], settings: dict[str, Any]
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Batches of the contexts' numbers and what was written after each; `settings` hold for all of them."""
        wanted = dict(normalize_gen_kwargs(settings))
        until, longest = handle_stop_sequences(wanted["until"], eos=None), wanted["max_gen_toks"]
        if wanted["do_sample"]:
            raise UserError(f"a task asks for sampling ({settings}); here its texts are greedy: give do_sample=False")
        if not 0 < longest < self._seq_length:
            raise UserError(
                f"a task asks for texts of {longest:,} tokens after its prompt; the model's full length is "
                f"{self._seq_length:,}: give a smaller --gen_kwargs max_gen_toks"
            )
        room = self._seq_length - longest
        prompts = [self.tok_encode(context)[-room:] or [self.eot_token_id] for context in contexts]

        def stop(tokens: list[int]) -> bool:
            text = self._text.decode(tokens)
            return any(term in text for term in until if term)

        for places in batches([len(prompt) + longest for prompt in prompts], self._micro_batch_tokens):
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


def _progress(what: str, total: int, silent: bool) -> tqdm[Any]:
    """A line on stderr with the time left; only on a terminal."""
    return tqdm(total=total, desc=what, unit_scale=True, disable=True if silent else None)


def run_harness(
    loaded: Loaded, tasks: Sequence[str], limit: int | None = None, include_path: Path | None = None
) -> dict[str, Any]:
    """Evaluate a model on tasks of the harness, with their own numbers of shots.

    Args:
        tasks: names that the harness, or a task file in `include_path`, knows; groups too; PAPER for PAPER_TASKS.
        limit: examples of each task, for a trial (None: all).
        include_path: a directory of task files (YAML) of one's own.

    Returns:
        As JSON values: "results", task -> metric -> value; "versions" of the tasks; "n-shot"; "n-samples"; and
        "average", the mean of `headline` over the `tasks`, None where one of them has none.

    Raises:
        UserError: for an unknown task, or one whose data cannot be read.
    """
    tasks = [name for task in tasks for name in (PAPER_TASKS if task == PAPER else [task])]
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=1)
            raise UserError(
                f"--task {task}: lm-eval knows no such task"
                + (f"; did you mean {near[0]}?" if near else "; lm-eval ls tasks lists them")
            )
    try:
        outcome = simple_evaluate(
            model=MegatronSLW(loaded), tasks=tasks, limit=limit, task_manager=manager, log_samples=False
        )
    except OSError as error:  # of the data: no file, no network, not in the hub's cache
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--task {','.join(tasks)}: the data cannot be read ({reason}); run it once where the hub can be "
            "reached, or copy its cache (HF_HOME)"
        ) from error
    kept = {key: outcome[key] for key in ("results", "versions", "n-shot", "n-samples")}
    headlines = [headline(outcome["results"][task]) for task in tasks]
    known = [value for value in headlines if value is not None]
    return kept | {"average": sum(known) / len(known) if len(known) == len(headlines) else None}


def headline(metrics: Mapping[str, Any]) -> float | None:
    """The accuracy among a task's metrics, or the share of exact matches; None where it has neither."""
    for name in HEADLINES:
        for key, value in metrics.items():
            if key.split(",")[0] == name:
                return float(value)
    return None


if __name__ == "__main__":
    run(cli_evaluate)
