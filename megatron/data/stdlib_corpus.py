"""Real text that every machine with Python has: the standard library's sources, and the docstrings of its C modules."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from megatron.files import make_parent, write_atomic

LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "_vendor",
    "_distutils",
}
"""Folders without text of the library itself: its tests, installed packages, and grammars or copies of others' code."""


def stdlib_documents() -> Iterator[dict[str, str]]:
    """One document a source file, in the order of their names, then one a module written in C."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT.intersection(parts) or parts[0].startswith("config-"):
            continue
        try:
            with tokenize.open(path) as file:  # honours the encoding that a source declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield {"text": text, "source": "/".join(parts)}
    for name in sorted(sys.stdlib_module_names):
        if text := _compiled_docstrings(name):
            yield {"text": text, "source": f"docstrings of {name}"}


def _compiled_docstrings(name: str) -> str:
    """The docstrings of a module that has no Python source, '' for any other module."""
    if name in ("antigravity", "this", "__main__") or name.startswith("_test"):
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except Exception:  # a module of another platform, or one whose library is missing: there is nothing to read
        return ""
    if getattr(module, "__file__", None) and str(module.__file__).endswith(".py"):
        return ""
    return "\n\n".join(_docstrings(module))


def _docstrings(module: ModuleType) -> Iterator[str]:
    """The module's own docstring, then those of its public names and their methods, each under its name."""
    if module.__doc__:
        yield inspect.cleandoc(module.__doc__)
    seen: set[str] = set()
    for name, value in sorted(vars(module).items()):
        home = str(getattr(value, "__module__", None) or module.__name__)
        if home.partition(".")[0] not in sys.stdlib_module_names:  # sys.excepthook and the like may be anybody's
            continue
        members = [(name, value)]
        if inspect.isclass(value):
            members += [(f"{name}.{n}", v) for n, v in sorted(vars(value).items())]
        for label, member in members:
            text = getattr(member, "__doc__", None)
            if isinstance(text, str) and callable(member) and len(text) > 40 and text not in seen:
                seen.add(text)
                yield f"{label}\n{inspect.cleandoc(text)}"


def write_stdlib_corpus(path: Path) -> tuple[int, int]:
    """Write the corpus to `path` as JSON lines, atomically; returns its documents and the bytes of their text.

    They stand in the order of a hash of their names, so that a split by position is a fair one.
    """
    documents = sorted(stdlib_documents(), key=lambda d: hashlib.sha256(d["source"].encode()).digest())
    make_parent(path)
    write_atomic(path, "".join(json.dumps(document) + "\n" for document in documents))
    return len(documents), sum(len(document["text"].encode()) for document in documents)
