"""From the frozen dataclasses of config.py to flags, and from a command line with recipes to a Config.

A recipe is a command line written in YAML: `lr: 6e-4` is `--lr 6e-4`. Recipes come first, then a DeepSpeed
configuration file, then the user's flags, and the last one wins.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron import old_flags
from megatron.config import MODEL_SIZES, Config, Count, ModelConfig
from megatron.deepspeed_config import read_deepspeed_config
from megatron.errors import CommandLineError, UserError, note
from megatron.flags import Parser, finite_number, some_text, whole_number, with_default

SECTIONS: dict[str, type] = typing.get_type_hints(Config)
"""Section name -> dataclass, in the order of --help."""

FIELDS: dict[str, Any] = {
    n: hint for section in SECTIONS.values() for n, hint in typing.get_type_hints(section).items()
}
"""Setting -> its type."""
PRESET_FLAGS = ("num_layers", "hidden_size", "num_attention_heads")
METAVARS = {
    **dict.fromkeys(("vocab_file", "merge_file", "tokenizer_file"), "FILE"),
    **dict.fromkeys(("save", "load", "data_cache_path", "tensorboard_dir"), "DIR"),
    "data_path": "PREFIX",
    "override": "SETTING",
}
"""Setting -> what --help calls its value, where that says more than TEXT."""
DEEPSPEED_FLAGS = ("--deepspeed-config", *old_flags.aliases("deepspeed_config"))


@cache
def field_docs(section: type) -> dict[str, str]:
    """The text under each field of a dataclass, from its source."""
    tree = ast.parse(inspect.getsource(section)).body[0]
    if not isinstance(tree, ast.ClassDef):
        return {}
    docs = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[node.target.id] = " ".join(str(after.value.value).split())
    return docs


class _Preset(argparse.Action):
    """--model-size: sets the shape there and then, so that what is given after it wins."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, values)
        for name, value in zip(PRESET_FLAGS, MODEL_SIZES[values], strict=True):
            setattr(namespace, name, value)


class _Unset(argparse.Action):
    """--unset FLAG: forget what a recipe or an earlier flag has set."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if hasattr(namespace, values):
            delattr(namespace, values)


def _preset(text: str) -> str:
    if text not in MODEL_SIZES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(MODEL_SIZES)}, found {text!r}")
    return text


def _setting(text: str) -> str:
    name = text.removeprefix("--").replace("-", "_")
    if name not in FIELDS:
        raise argparse.ArgumentTypeError(f"there is no setting {text}")
    return name


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _add_field(group: argparse._ArgumentGroup, name: str, hint: Any, default: object, doc: str) -> None:
    """One field of a dataclass as one flag. Defaults are suppressed: only what was given is in the namespace."""
    flags = [_flag(name), *old_flags.aliases(name)]
    text = with_default(doc.replace("%", "%%"), default)
    shown: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if name == "model_size":
        group.add_argument(*flags, action=_Preset, type=_preset, metavar="{" + ",".join(MODEL_SIZES) + "}", **shown)
    elif hint is bool:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, **shown)
    elif typing.get_origin(hint) is Literal:
        group.add_argument(*flags, choices=typing.get_args(hint), **shown)
    elif typing.get_origin(hint) is tuple:
        group.add_argument(*flags, nargs="*", type=some_text, metavar=METAVARS[name], **shown)
    elif hint is Count or hint is int:
        group.add_argument(*flags, type=whole_number, metavar="N", **shown)
    elif hint is float:
        group.add_argument(*flags, type=finite_number, metavar="X", **shown)
    else:
        group.add_argument(*flags, type=some_text, metavar=METAVARS.get(name, "TEXT"), **shown)


def build_parser(description: str | None = None, own: Callable[[Parser], object] | None = None) -> Parser:
    """The parser of every flag in config.py, grouped by section, and of --config.

    `own` adds the flags of a tool, which come first in --help.
    """
    parser = Parser(
        usage="%(prog)s [--config RECIPE ...] [flags]",
        description=description,
        epilog="Counts may be written 3000, 300K, 30B or 157e9. Of two equal flags the last wins.\n"
        "In [brackets] is what holds where a flag is not given.",
    )
    parser.advice = old_flags.advice
    if own is not None:
        own(parser)
    files = parser.add_argument_group("Where flags come from")
    files.add_argument(
        "--config", action="append", metavar="RECIPE", default=[], type=some_text,
        help="a recipe: flags written in YAML, read before the other flags; may be repeated, the last wins",
    )  # fmt: skip
    files.add_argument(
        *DEEPSPEED_FLAGS, metavar="JSON", default=argparse.SUPPRESS, type=some_text,
        help="a DeepSpeed configuration file: its curriculum_learning block, and what else of it has a counterpart, "
        "read after the recipes and before the other flags; keys that are ignored are named",
    )  # fmt: skip
    files.add_argument(
        "--unset", action=_Unset, type=_setting, metavar="FLAG", default=argparse.SUPPRESS,
        help="forget what a recipe or an earlier flag has set, as `flag: null` does in a recipe; may be repeated",
    )  # fmt: skip
    for section in SECTIONS.values():
        hints = typing.get_type_hints(section)
        docs = field_docs(section)
        group = parser.add_argument_group((section.__doc__ or section.__name__).strip())
        for f in dataclasses.fields(section):
            _add_field(group, f.name, hints[f.name], f.default, docs[f.name])
    old_flags.add_ignored(parser)
    return parser


class _RecipeLoader(yaml.BaseLoader):
    """BaseLoader keeps every scalar as its text (6e-4 stays 6e-4) and lets no tag run code; this one also refuses
    a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value).replace("-", "_")
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_recipe(
    path: Path, within: tuple[Path, ...] = (), unread: Callable[[str], bool] = lambda name: False
) -> list[tuple[Path, list[str]]]:
    """The command lines that a recipe stands for, those of the recipes that it builds on first, each with its file.

    A recipe names others under `config`, relative to itself; `within` are the recipes that led here. Settings that are
    `unread` are passed over.

    Raises:
        UserError: naming the file, when it is missing, no YAML, not a flat list of flags, or builds on itself.
    """
    if path.resolve() in within:
        raise UserError(f"--config {path}: the recipe builds on itself")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_RecipeLoader)  # nosec B506 # a BaseLoader: texts, lists, mappings, no objects
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines of `flag: value`, found a {type(content).__name__}")
    within = (*within, path.resolve())
    lines: list[tuple[Path, list[str]]] = []
    own: list[str] = []
    for key, value in content.items():
        if unread(str(key).replace("-", "_")):
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) for v in values):
            raise UserError(f"--config {path}: {key}: expected a value or a list of values, found something nested")
        if _flag(str(key)) in DEEPSPEED_FLAGS:
            raise UserError(f"--config {path}: {key}: a recipe cannot name one; give it on the command line")
        if key == "config":
            lines += [line for name in values for line in read_recipe(path.parent / name, within, unread)]
        else:
            own += _recipe_entry(path, str(key), value)
    return [*lines, (path, own)]


def _recipe_entry(path: Path, key: str, value: str | list[str]) -> list[str]:
    """One line of a recipe as arguments."""
    name, flag = key.replace("-", "_"), _flag(key)
    if isinstance(value, list):
        if typing.get_origin(FIELDS.get(name)) is not tuple:
            raise UserError(f"--config {path}: {key}: expected one value, found a list")
        return [flag, *value]
    word = value.lower()
    if word in ("", "null", "~"):
        return [f"--unset={flag}"]
    positive = name.removeprefix("no_")
    if FIELDS.get(name) is bool or FIELDS.get(positive) is bool:
        switch = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(word)
        if switch is None:
            raise UserError(f"--config {path}: {key}: expected true or false, found {value!r}")
        on = switch == (FIELDS.get(name) is bool)
        target = name if FIELDS.get(name) is bool else positive
        return [_flag(target) if on else _flag("no_" + target)]
    if word in ("true", "false") and name not in FIELDS:  # an old flag without a value
        return [flag] if word == "true" else []
    return [f"{flag}={value}"]


def parse_config(parser: Parser, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    """Parse recipes, a DeepSpeed file and flags into a frozen Config; the namespace holds flags that a tool added.

    Raises:
        CommandLineError: naming the flag, and the recipe where it stands in one.
    """
    try:
        return _parse(parser, argv)
    except UserError as error:
        raise CommandLineError(str(error)) from None


def read_config(path: Path, *sections: str) -> Config:
    """The Config of a recipe, or of the config.yaml of a run.

    Where `sections` are named, they alone are read, and the others keep their defaults: what the file says there may be
    for another state of this program, with a pacing that is not known here.

    Raises:
        UserError: naming `path`.
    """
    read = {f.name for name in sections or SECTIONS for f in dataclasses.fields(SECTIONS[name])}
    parser, given = build_parser(), argparse.Namespace()
    _take_recipe(
        parser,
        given,
        path,
        lambda name: bool(sections) and name not in read and (name in FIELDS or name.startswith("seqlen_")),
    )
    try:
        return config_from(vars(given), sections or SECTIONS)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def _take_recipe(
    parser: Parser, given: argparse.Namespace, recipe: Path, unread: Callable[[str], bool] = lambda name: False
) -> None:
    """Add what `recipe` says to `given`."""
    for path, words in read_recipe(recipe, unread=unread):
        try:
            parser.parse_args(words, given)
        except UserError as error:
            raise UserError(f"--config {path}: {error}") from None


def _parse(parser: Parser, argv: Sequence[str]) -> tuple[Config, argparse.Namespace]:
    first = Parser(add_help=False)
    first.add_argument("--config", action="append", default=[], type=some_text)
    first.add_argument(*DEEPSPEED_FLAGS, type=some_text)
    files = first.parse_known_args(list(argv))[0]
    given = argparse.Namespace()
    for recipe in files.config:
        _take_recipe(parser, given, Path(recipe))
    if files.deepspeed_config is None:
        namespace = parser.parse_args(argv, given)
    else:
        deepspeed = read_deepspeed_config(Path(files.deepspeed_config))
        vars(given).update(deepspeed.settings)
        for text in deepspeed.notes:
            note(text)
        namespace = parser.parse_args(argv, given)
        deepspeed.check_seq_length(getattr(namespace, "seq_length", ModelConfig.seq_length))
    return config_from(vars(namespace)), namespace


def config_from(given: dict[str, Any], read: Iterable[str] = SECTIONS) -> Config:
    """A Config from the settings given, by field name, of the sections to `read`; everything else keeps its default.

    Raises:
        UserError: naming the first fault of each section, or else the first across them.
    """
    if given.get("zero_stage") == 1:
        note("--zero-stage 1 is read as 2, which shares out gradients too")
        given = given | {"zero_stage": 2}
    sections, faults = {}, []
    for name in read:
        section = SECTIONS[name]
        names = [f.name for f in dataclasses.fields(section)]
        values = {n: tuple(given[n]) if isinstance(given[n], list) else given[n] for n in names if n in given}
        try:
            sections[name] = section(**values)
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(faults))
    return Config(**sections)


def to_yaml(config: Config) -> str:
    """The resolved config as a recipe: every setting, by section, ready for --config."""
    lines = ["# The resolved configuration of a run; it can be run again with --config."]
    for name, section in SECTIONS.items():
        lines.append(f"\n# {(section.__doc__ or name).strip()}")
        for f in dataclasses.fields(section):
            value = getattr(getattr(config, name), f.name)
            text = yaml_value(value)
            lines.append(
                f"{f.name.replace('_', '-')}: {text}" if text is not None else f"# {f.name.replace('_', '-')}:"
            )
    return "\n".join(lines) + "\n"


def yaml_value(value: object) -> str | None:
    """A setting as YAML text that reads back to the same value; None where the setting is not given."""
    if value is None or value == ():
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_quoted(str(v)) for v in value) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    return _quoted(str(value))


def _quoted(text: str) -> str:
    """A YAML scalar: plain where that is safe, else double-quoted."""
    if re.fullmatch(r"[A-Za-z0-9_./+-]+(:[A-Za-z0-9_./+-]+)*", text) and text.lower() not in ("true", "false", "null"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def flat(config: Config) -> dict[str, Any]:
    """Every setting of a config by its field name."""
    return {
        f.name: getattr(getattr(config, name), f.name)
        for name, section in SECTIONS.items()
        for f in dataclasses.fields(section)
    }
