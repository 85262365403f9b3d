"""GPT pre-training with sequence length warmup."""

import os
import sys
from types import TracebackType

__version__ = "0.1.0"


def _end_quietly(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Say of Ctrl-C what `errors.run` says of it, which is only reached when torch has been imported."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


_started = getattr(sys.modules.get("__main__"), "__file__", None)
if _started and os.path.realpath(_started).startswith(os.path.dirname(os.path.dirname(__file__)) + os.sep):
    sys.excepthook = _end_quietly  # a program of this repository was started; what others do with Ctrl-C is theirs
