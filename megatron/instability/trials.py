"""Tuning in practice: trials as runs of pretrain_gpt2.py, their journal, and what they lead to.

DIR/base.yaml            the run as every trial has it, but for its start and T
DIR/trials/startS-TN/    a trial's log; its checkpoints are deleted when it is decided
DIR/journal.json         the outcomes so far; the same command goes on from there
DIR/recommended.yaml     the recipe with the start and T that were chosen
DIR/tuning.png           what was seen
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess  # nosec B404 # lists of arguments, no shell
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron.arguments import SECTIONS, flat, to_yaml, yaml_value
from megatron.config import CheckpointConfig, Config
from megatron.console import format_duration
from megatron.data.datasets import open_data
from megatron.errors import EXIT_FAILURE, EXIT_FINISHED, EXIT_STOPPED, UserError
from megatron.files import file_errors, write_atomic
from megatron.instability.summary import read_run
from megatron.instability.tuning import (
    Choice,
    Criterion,
    Outcome,
    SearchOptions,
    SearchSpace,
    judge,
    paced,
    search,
    search_space,
)
from megatron.instability.tuning_figure import figure_tuning
from megatron.metrics import METRICS_FILE, json_safe, read_lines

JOURNAL_FILE = "journal.json"
POLL_SECONDS = (0.5, 10.0)
"""Shortest and longest wait between two looks at a trial's log; in between, 20 times as long as the last look took."""
GRACE_SECONDS = 60.0
"""A trial that was asked to stop has this long to save and leave before it is killed."""

VARIED = ("seqlen_start", "seqlen_warmup_iters")
"""The settings in which trials differ."""

Report = Callable[[str], None]
Trial = tuple[int, int]
"""Start and T."""


def trial_config(config: Config, space: SearchSpace) -> Config:
    """The run `config` as every trial has it, but for its start and T.

    It ends after the trial's steps, yet its learning rate follows the whole run's schedule. Nothing hides an
    instability: no rollback, and a loss that is not finite is logged.
    """
    decay = config.learning_rate.decay(config.training)
    until: dict[str, Any] = {f"lr_decay_{decay.unit}": decay.value}
    return replace(
        paced(config, space.starts[0], space.first_duration),
        training=replace(
            config.training, train_iters=space.trial_iterations, exit_interval=None, exit_duration_in_mins=None
        ),
        faults=replace(config.faults, on_nonfinite="skip", on_spike="log"),
        learning_rate=replace(config.learning_rate, **until),
        evaluation=replace(config.evaluation, eval_interval=space.eval_interval, eval_interval_tokens=None, test=False),
        checkpoint=CheckpointConfig(save_interval=space.trial_iterations),
        logging=replace(config.logging, tensorboard=False),
    )


@dataclass(frozen=True)
class Tuner:
    """A search of the paper's kind for one run, in a directory of its own."""

    config: Config
    """The run to be tuned."""
    options: SearchOptions
    criterion: Criterion
    directory: Path
    program: tuple[str, ...]
    """How pretrain_gpt2.py is started, before its flags."""
    report: Report

    def run(self) -> int:
        """Search, write what was found and say it; EXIT_FAILURE where there is nothing to recommend."""
        self._check_data()
        space, runner = self._announce()
        with file_errors("create", self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        runner.open()
        choice = search(space, runner)
        recommended, figure = self.directory / "recommended.yaml", self.directory / "tuning.png"
        figure_tuning(runner.outcomes, space, choice, figure)
        self.report(f"\n{choice.words}")
        self.report(f"figure: {figure}")
        if choice.duration is None:
            recommended.unlink(missing_ok=True)  # of an earlier search with other flags
            return EXIT_FAILURE
        write_atomic(recommended, self.recommended(choice))
        self.report(f"recipe: {recommended}")
        return EXIT_FINISHED

    def dry_run(self) -> None:
        """Say which trials there may be and how they are started; write nothing."""
        space, runner = self._announce()
        self.report("(a search writes base.yaml, which these build on, when it begins)")
        for start in space.starts:
            self.report(shlex.join(runner.command(start, space.first_duration)))
        self.report("then, from the start found, the same over T = " + ", ".join(f"{T}" for T in space.durations))

    def recommended(self, choice: Choice) -> str:
        """The run with the chosen warmup, as a recipe: every setting that is not its default."""
        chosen = flat(paced(self.config, choice.start, choice.duration or 0))
        defaults = {f.name: f.default for section in SECTIONS.values() for f in fields(section)}
        settings = {name: chosen[name] for name in VARIED} | {
            name: value for name, value in chosen.items() if value != defaults[name] and name not in ("save", "load")
        }
        lines = [f"{name.replace('_', '-')}: {yaml_value(value)}" for name, value in settings.items()]
        return "\n".join(["# Written by tools/tune_pacing.py. " + choice.words, *lines]) + "\n"

    def _check_data(self) -> None:
        """Raise UserError for what would end every trial, or could not be judged by its validations."""
        _, datasets = open_data(self.config)
        if datasets.validation is None:
            raise UserError(
                f"--split {self.config.data.split}: a trial is judged by its validations; {datasets.notes[0]}"
            )

    def _announce(self) -> tuple[SearchSpace, Runner]:
        """What there is to search, in words, and what runs it."""
        space = search_space(self.config, self.options)
        low, high, step = space.durations[0], space.durations[-1], space.durations.step
        self.report(
            f"pacing                {paced(self.config, space.starts[0], high).seqlen_warmup.seqlen_warmup}\n"
            f"learning rate warmup  {space.lr_warmup_iterations:,} steps\n"
            f"starts                {', '.join(map(str, space.starts))}, with T = {space.first_duration:,}\n"
            f"T                     {low:,} to {high:,} steps, {step:,} apart"
            f"{' (with a longer one the run would end before its full length)' if space.cut_short else ''}\n"
            f"trials                at most {space.most_trials()} of at most {space.trial_iterations:,} steps, "
            f"validated every {space.eval_interval:,}\n"
            f"significant           perplexity above {1 + self.criterion.tolerance:g} times the lowest before, or "
            f"training loss at equal\n"
            f"                      positions above {self.criterion.ratio:g} times for more than "
            f"{self.criterion.ratio_steps} steps of {self.criterion.ratio_tokens:,} tokens or more\n"
        )
        base = trial_config(self.config, space)
        return space, Runner(base, self.criterion, self.directory, self.program, space.most_trials(), self.report)


class Runner:
    """Runs trials, one at a time, and remembers their outcomes in the journal."""

    def __init__(
        self, base: Config, criterion: Criterion, directory: Path, program: Sequence[str], most: int, report: Report
    ) -> None:
        """`base` is what trials share (`trial_config`), `most` the number of them that is announced."""
        self.outcomes: dict[Trial, Outcome] = {}
        """Outcomes of this search, in its order."""
        self._base = base
        self._criterion = criterion
        self._directory = directory
        self._program = program
        self._most = most
        self._report = report
        self._finished: dict[Trial, Outcome] = {}

    def open(self) -> None:
        """Take up the journal, and write base.yaml.

        Raises:
            UserError: where the journal is damaged or was made with other settings.
        """
        journal = self._directory / JOURNAL_FILE
        self._finished = read_journal(journal, self._settings())
        write_journal(journal, self._settings(), self._finished)  # logs of trials cut off are of these settings
        write_atomic(self._directory / "base.yaml", to_yaml(self._base))

    def __call__(self, start: int, duration: int) -> Outcome:
        """The outcome of the trial with this start and T: from the journal, or run now."""
        self._report(f"trial {len(self.outcomes) + 1} of at most {self._most}: start {start}, T = {duration:,}")
        outcome, note = self._finished.get((start, duration)), "from the journal"
        if outcome is None:
            began = time.monotonic()
            outcome = self._run(start, duration)
            self._finished[start, duration] = outcome
            write_journal(self._directory / JOURNAL_FILE, self._settings(), self._finished)
            note = format_duration(time.monotonic() - began)
        self.outcomes[start, duration] = outcome
        self._report(f"    {outcome.describe()} ({note})")
        return outcome

    def command(self, start: int, duration: int) -> list[str]:
        """The command line of a trial. It goes on where it was, should there be a checkpoint of it."""
        home = str(self._home(start, duration))
        return [
            *self._program, "--config", str(self._directory / "base.yaml"), "--seqlen-start", str(start),
            "--seqlen-warmup-iters", str(duration), "--save", home, "--load", home,
        ]  # fmt: skip

    def _home(self, start: int, duration: int) -> Path:
        return self._directory / "trials" / f"start{start}-T{duration}"

    def _settings(self) -> dict[str, Any]:
        """Everything but start and T that an outcome depends on, as JSON has it."""
        settings = flat(self._base) | asdict(self._criterion)
        return dict(json.loads(json.dumps({name: settings[name] for name in settings if name not in VARIED})))

    def _run(self, start: int, duration: int) -> Outcome:
        """Run a trial until it is decided, which its log may be from an earlier search that was cut off."""
        home = self._home(start, duration)
        with file_errors("create", home):
            home.mkdir(parents=True, exist_ok=True)
        outcome = self._judge(home)
        if outcome is None:
            outcome = self._watch(home, self.command(start, duration))
        checkpoints = home / "checkpoints"
        if checkpoints.exists():
            with file_errors("delete", checkpoints):
                shutil.rmtree(checkpoints)
        return outcome

    def _watch(self, home: Path, command: list[str]) -> Outcome:
        output = home / "output.txt"
        with file_errors("write", output), output.open("ab") as stream, _started(command, stream.fileno()) as process:
            while True:
                ended = process.poll() is not None
                looked = time.monotonic()
                if (outcome := self._judge(home)) is not None:
                    return outcome
                if ended:
                    break
                shortest, longest = POLL_SECONDS
                with suppress(subprocess.TimeoutExpired):
                    process.wait(min(max(shortest, 20 * (time.monotonic() - looked)), longest))
        what = f"the trial in {home} ended with status {process.returncode} before it was decided"
        if process.returncode == EXIT_STOPPED:
            raise UserError(f"{what}: it was asked to stop; start the same command again to go on")
        raise UserError(f"{what}: {_last_words(output)}; see {output}")

    def _judge(self, home: Path) -> Outcome | None:
        """The outcome so far, from the log."""
        log = home / METRICS_FILE
        if not log.is_file() or next(read_lines(log), None) is None:
            return None
        run, interval = read_run(home), self._base.evaluation.eval_interval or 0
        if run.step_count and not len(run.validation("iteration")) and run.step("iteration")[-1] > interval + 1:
            raise UserError(
                f"{log}: holds no validation after step {interval:,}: give the validation split a share with --split, "
                f"found {self._base.data.split}"
            )
        return judge(run, self._criterion, self._base.training.train_iters or 0)


@contextmanager
def _started(command: Sequence[str], output: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process in a group of its own; at the end it is asked to stop, which saves, or killed."""
    try:
        process = subprocess.Popen(  # nosec B603 # a list of arguments, no shell
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    except OSError as error:
        raise UserError(f"cannot start {command[0]}: {error.strerror}; see --launcher") from error
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _last_words(output: Path) -> str:
    """The line of a run's output that says why it ended: its last error, or else the last line."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["it printed nothing"])[-1]


def write_journal(path: Path, settings: Mapping[str, Any], finished: Mapping[Trial, Outcome]) -> None:
    """Replace the journal: `settings`, which all its trials share, and what they have shown."""
    trials = [{"start": s, "duration": t, **asdict(outcome)} for (s, t), outcome in finished.items()]
    write_atomic(path, json.dumps(json_safe({"settings": settings, "trials": trials}), indent=1) + "\n")


def read_journal(path: Path, settings: Mapping[str, Any]) -> dict[Trial, Outcome]:
    """The outcomes in a journal that was made with `settings`; none where there is no journal yet.

    Raises:
        UserError: where it is no journal, or was made with other settings, naming them.
    """
    if not path.exists():
        return {}
    with file_errors("read", path):
        data = path.read_bytes()
    try:
        content = json.loads(data)
        before = dict(content["settings"])
        finished = {(int(t["start"]), int(t["duration"])): _outcome(t) for t in content["trials"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path}: not a journal of this tool ({type(error).__name__}: {error}); choose another --output"
        ) from error
    changed = [
        f"{name} {before.get(name)!r}, now {settings.get(name)!r}"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    ]
    if changed and not finished and not any(path.parent.glob(f"trials/*/{METRICS_FILE}")):
        return {}  # no trial has taken a step: there is nothing that the change could falsify
    if changed:
        raise UserError(
            f"{path}: its trials were made with {'; '.join(changed[:3])}"
            f"{f' (and {len(changed) - 3} more)' if len(changed) > 3 else ''}: give what they had, or another --output"
        )
    return finished


def _outcome(entry: Mapping[str, Any]) -> Outcome:
    if entry["sign"] not in (None, "validation", "loss ratio", "non-finite loss"):
        raise ValueError(f"unknown sign {entry['sign']!r}")
    validations = tuple((int(iteration), float(perplexity)) for iteration, perplexity in entry["validations"])
    return Outcome(entry["sign"], int(entry["iteration"]), float(entry["value"]), validations)
