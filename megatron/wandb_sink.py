"""The numbers of metrics.jsonl for Weights & Biases (--wandb-project): an onlooker that no run depends on."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron.config import LoggingConfig
from megatron.errors import UserError
from megatron.files import write_atomic

ID_FILE = "wandb-id"
"""In the run's directory: W&B's name of the run, so that a resume goes on with it."""
INIT_SECONDS = 20.0
"""How long the start of a run waits for W&B's answer; INIT_VARIABLE in the environment says otherwise."""
INIT_VARIABLE = "WANDB_INIT_TIMEOUT"
FINISH_SECONDS = 60.0
"""How long the end of a run waits for what is still to be sent."""


def open_wandb(
    config: LoggingConfig, home: Path | None, settings: Mapping[str, Any], report: Callable[[str], None]
) -> WandB | None:
    """The W&B run that `config` asks for, on rank 0 only; None without --wandb-project.

    Args:
        home: the run's directory, where W&B's files and the id go; None: the current one, and a new run each time.
        settings: of the whole run, for W&B to show.
        report: takes one line, of where the run can be seen or of a fault.

    Raises:
        UserError: where the package is missing. Nothing else that fails is raised, now or later.
    """
    if config.wandb_project is None:
        return None
    try:  # `import wandb` alone would also find the directory of that name that W&B writes to
        from wandb import Settings, init, setup  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"--wandb-project needs the wandb package, which cannot be imported ({error}): "
            "pip install 'megatron-slw[wandb]', or drop --wandb-project"
        ) from error

    def start(**arguments: Any) -> Any:
        # Silent from the beginning: on a terminal W&B would ask for a login, and wait. The progress line is ours: W&B
        # neither writes there nor reads along.
        setup(settings=Settings(silent=True))
        quiet = Settings(silent=True, console="off", finish_timeout=FINISH_SECONDS)
        if INIT_VARIABLE not in os.environ:
            quiet.init_timeout = INIT_SECONDS
        return init(**arguments, settings=quiet)

    return WandB(config, home, settings, report, start)


class WandB:
    """Scalars by iteration; tokens are logged beside them, for W&B to take as the x-axis.

    W&B keeps what it has: after a resume or a rollback the steps that come again are drawn a second time. Its own step
    counter is not used, as it would drop them.
    """

    def __init__(
        self,
        config: LoggingConfig,
        home: Path | None,
        settings: Mapping[str, Any],
        report: Callable[[str], None],
        init: Callable[..., Any],
    ) -> None:
        """Start or go on with the run by `init`, which takes what wandb.init does; the rest is as in `open_wandb`."""
        self._report = report
        self._run: Any = None

        def start() -> None:
            self._run = init(
                project=config.wandb_project,
                entity=config.wandb_entity,
                name=config.wandb_name or (home and home.resolve().name),
                mode=config.wandb_mode,
                id=_run_id(home),
                resume="allow",
                dir=home,
                config=dict(settings),
            )
            self._run.define_metric("*", step_metric="iteration")
            sync = f"offline; to send it: wandb sync {Path(self._run.dir).parent}" if self._run.offline else None
            report(f"W&B: {sync or self._run.url}")

        self._attempt("start", start)

    def log(self, entry: Mapping[str, Any], scalars: Mapping[str, float | None]) -> None:
        """Send the scalars that are not None, with the entry's iteration and tokens."""
        if self._run is not None:
            position = {name: entry.get(name) for name in ("iteration", "consumed_tokens")}
            values = {name: float(x) for name, x in scalars.items() if x is not None}
            self._attempt("log", lambda: self._run.log(position | values))

    def hide_beyond(self, iteration: int, tokens: int) -> None:
        """Nothing: W&B keeps what it has."""

    def close(self, *, failed: bool = False) -> None:
        """Send what is left, for at most `FINISH_SECONDS`; `failed` runs are shown as such."""
        if self._run is not None:
            self._attempt("finish", lambda: self._run.finish(exit_code=int(failed)))
            self._run = None

    def _attempt(self, what: str, call: Callable[[], None]) -> None:
        """Call W&B; whatever is wrong there is said once, and then the run goes on without it."""
        try:
            call()
        except Exception as error:
            self._run = None
            words = " ".join(str(error).split()) or type(error).__name__
            self._report(f"warning: W&B cannot {what} ({words}); the run goes on without it")


def _run_id(home: Path | None) -> str:
    """The id in the run's directory, a new one where there is none."""
    path = None if home is None else home / ID_FILE
    if path is not None and path.exists() and (found := path.read_text(encoding="utf-8").strip()):
        return found
    made = secrets.token_hex(4)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, made + "\n")
    return made
