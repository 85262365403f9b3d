"""GPT pre-training with sequence length warmup."""

import os
import sys
from types import TracebackType

__version__ = "0.1.0"


def _end_quietly(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Say of Ctrl-C what `errors.run` says of it, which is only reached when torch has been imported; and of a package
    that is missing where it may be."""
    missing = isinstance(value, ModuleNotFoundError) and value.name
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    elif missing and not missing.startswith("megatron") and not os.environ.get("MEGATRON_DEBUG"):
        where = "`source .venv/bin/activate`, which scripts/quickstart.sh makes, or install what pyproject.toml lists"
        print(f"error: the Python package {missing} is not installed for {sys.executable}: {where}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


_started = os.path.realpath(getattr(sys.modules.get("__main__"), "__file__", None) or "")
_tree = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if _started == f"{_tree}/pretrain_gpt2.py" or os.path.dirname(_started) in (f"{_tree}/tools", f"{_tree}/benchmarks"):
    sys.excepthook = _end_quietly  # a program of this repository was started; what others do with Ctrl-C is theirs
