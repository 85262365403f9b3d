"""Recipes and the small languages of flags, made up and damaged: refused in one line, or read exactly.

Each law holds over some examples here, and over 10,000 with `pytest -m faults`.
"""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st
from made_up import EXAMPLES, damaged, law, outcome
from slow_readers import exact_count

from megatron.arguments import FIELDS, build_parser, flat, parse_config
from megatron.config import SeqlenWarmupConfig
from megatron.counts import parse_count
from megatron.data.blending import parse_data_path
from megatron.data.splits import parse_split, split_documents
from megatron.errors import UserError

RECIPE = """\
# a comment
num-layers: 2
hidden_size: 64
num-attention-heads: 4
seq-length: 128
train-tokens: 1.5M
lr: 6e-4
min-lr: 1e-5
lr-warmup-iters: 3K
lr-decay-style: cosine
weight-decay: 0.01
bf16: true
no-decay-embeddings: false
data-path: [0.3, data/a, 0.7, "data b"]
split: 949,50,1
save: 'runs/x'
seed: 7
eval-iters: 1_0
clip-grad: 1.0
micro-batch-size:
"""


def expected_setting(name: str, text: str) -> object:
    """What a line `name: text` of a recipe sets."""
    hint = str(FIELDS[name])
    if "bool" in hint:
        return text.lower() in ("true", "yes", "on")
    if "int" in hint:
        return exact_count(text)
    return float(text) if "float" in hint else text


@EXAMPLES
def test_recipes(examples: int, tmp_path: Path) -> None:
    path, parser = tmp_path / "r.yaml", build_parser()
    words = [
        "null",
        "true",
        "1e9",
        "1e-400",
        "9" * 400,
        "9" * 5000,
        "1e999",
        "-1",
        "0",
        ": ",
        "- ",
        "\n",
        "[",
        "{a: b}",
        "&a ",
        "*a",
    ]
    words += [
        "!!python/object/apply:os.abort []",
        "<<: ",
        "? ",
        "config: r.yaml\n",
        "seq-length: 64\n",
        "\u0661",
        "\x00",
        "'",
        '"',
    ]

    def read() -> dict[str, object]:
        config, _ = parse_config(parser, ["--config", str(path)])
        return flat(config)

    path.write_text(RECIPE)
    assert read()["data_path"] == ("0.3", "data/a", "0.7", "data b")

    @law(examples, content=damaged(RECIPE.encode(), st.sampled_from([word.encode() for word in words])))
    def _(content: bytes) -> None:
        path.write_bytes(content)
        found = outcome(read)
        if isinstance(found, UserError):
            return
        given_lines = yaml.load(content.decode(), Loader=yaml.BaseLoader) or {}
        for key, value in given_lines.items():
            name = key.replace("-", "_")
            if name not in FIELDS or value in ("", "~") or str(value).lower() == "null":
                continue
            if isinstance(value, list):
                assert found[name] == tuple(value)
            elif "tuple" not in str(FIELDS[name]) and name != "model_size":
                assert found[name] == expected_setting(name, value), key


COUNT_TEXT = st.text(st.sampled_from("0123456789_.,eE+-KMBGT \n\u0661"), max_size=12) | st.from_regex(
    r"\A[0-9]{1,4}(\.[0-9]{1,3})?(e[0-9]{1,2})?[KMBGT]?\Z"
)


@EXAMPLES
def test_counts(examples: int) -> None:
    @law(examples, text=COUNT_TEXT | st.integers(0, 2**80).map(str))
    def _(text: str) -> None:
        try:
            found = parse_count(text)
        except ValueError:
            found = None
        if found is not None:
            assert found == exact_count(text)
        elif text.isascii() and text.isalnum() and text[:1].isdigit():
            assert exact_count(text) is None


@EXAMPLES
def test_data_path(examples: int) -> None:
    weights = st.sampled_from(["0.3", "1", "1e-3", "1e308", "0", "-1", "nan", "inf", "x", "", "\u0663", "9" * 400])

    @law(examples, words=st.lists(weights | st.text(max_size=4), max_size=7))
    def _(words: list[str]) -> None:
        found = outcome(parse_data_path, words)
        if isinstance(found, UserError):
            assert "--data-path" in str(found)
        elif len(words) == 1:
            assert found == [(1.0, words[0])]
        else:
            assert [prefix for _, prefix in found] == words[1::2] and len(set(words[1::2])) == len(words) // 2
            assert [weight for weight, _ in found] == [float(word) for word in words[::2]]
            assert 0 < sum(weight for weight, _ in found) < math.inf and len(words) % 2 == 0


@EXAMPLES
def test_split(examples: int) -> None:
    shares = st.sampled_from(["949", "50", "1", "0", "0.5", "1e-320", "1e308", "-1", "nan", "inf", "", " 1 ", "x"])
    numbers = st.lists(shares | st.floats(0, 1e6).map(repr), max_size=4)

    @law(examples, parts=numbers, separator=st.sampled_from(",,,/;"), count=st.integers(0, 10**7))
    def _(parts: list[str], separator: str, count: int) -> None:
        text = separator.join(parts)
        found = outcome(parse_split, text)
        if isinstance(found, UserError):
            assert "--split" in str(found)
            return
        given_shares = [Decimal(part.strip()) for part in parts]
        exact = [float(share / sum(given_shares)) for share in given_shares]
        assert found == pytest.approx([*exact, 0.0, 0.0][:3], abs=1e-12)
        ranges = split_documents(text, count)
        assert [number for part in ranges for number in (part.start, part.stop)] == sorted(
            number for part in ranges for number in (part.start, part.stop)
        )
        assert ranges[0].start == 0 and ranges[2].stop == count


@EXAMPLES
def test_seqlen_stages(examples: int) -> None:
    lengths, steps = st.sampled_from([8, 16, 24, 64, 128, 12, 0, 2**70]), st.integers(0, 6)
    texts = st.lists(st.tuples(lengths, steps), max_size=4).map(
        lambda stages: ",".join([*(f"{length}:{step}" for length, step in stages), "128"])
    )
    noise = st.text(st.sampled_from("0123456789:, -+e\u0661\u00b2"), max_size=12) | st.just("9" * 5000)

    @law(examples, text=texts | noise)
    def _(text: str) -> None:
        warmup = SeqlenWarmupConfig(seqlen_warmup="discrete", seqlen_stages=text)
        found = outcome(lambda: warmup.check(128)) or outcome(warmup.stages)
        if isinstance(found, UserError):
            assert "--seqlen-stages" in str(found)
            valid = [tuple(map(int, part.split(":"))) for part in text.split(",")] if text.endswith(",128") else []
            rising = [stage[-1] for stage in valid[:-1]]
            assert (
                not valid or rising != sorted({*rising} - {0}) or any(s[0] % 8 or not 8 <= s[0] <= 128 for s in valid)
            )
            return
        sizes, last_steps = found
        assert ",".join([*map("{}:{}".format, sizes, last_steps), str(sizes[-1])]) == _plain_digits(text)
        assert sizes[-1] == 128 and all(8 <= size <= 128 and size % 8 == 0 for size in sizes)
        assert last_steps == sorted(set(last_steps)) and all(step > 0 for step in last_steps)


def _plain_digits(text: str) -> str:
    """`text` without blanks around the numbers, each written out in plain digits."""
    return ",".join(":".join(str(parse_count(number)) for number in part.split(":")) for part in text.split(","))


@pytest.mark.parametrize("key", ["save", "data-path", "lr", "config"])
def test_a_tag_in_a_recipe_is_only_text(tmp_path: Path, key: str) -> None:
    sung, path = tmp_path / "sung", tmp_path / "r.yaml"
    path.write_text(f"train-iters: 1\n{key}: !!python/object/apply:builtins.open ['{sung}', 'w']\n")
    found = outcome(lambda: parse_config(build_parser(), ["--config", str(path)])[0].data.data_path)
    assert found == (str(sung), "w") if key == "data-path" else isinstance(found, UserError)
    assert not sung.exists()
    yaml.load(path.read_text(), Loader=yaml.UnsafeLoader)
    assert sung.exists(), "the canary must sing where tags are obeyed"
