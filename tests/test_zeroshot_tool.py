"""The zero-shot tool: what it writes and where, ranks, and one line for whatever is wrong with its inputs."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from zeroshot_models import made_up_texts, save_hugging_face, small_gpt2, write_lambada

from megatron.checkpointing.huggingface import read_huggingface
from megatron.checkpointing.weights import save_weights
from megatron.config import TokenizerConfig
from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.evaluation.lambada import Example, piece_of
from megatron.evaluation.loading import Loaded, load_model
from megatron.evaluation.scoring import Piece, score
from megatron.evaluation.zeroshot import ZeroShotConfig, evaluate
from megatron.instability.zeroshot_results import LAMBADA, STRICT_LAMBADA, WIKITEXT, differences, write_result
from megatron.layout import Layout
from megatron.tokenizer.training import TrainedTokenizer

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
POSITIONS = 32


@pytest.fixture(scope="module")
def model_directory(tiny_tokenizer: TrainedTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that reads 32 tokens, as Hugging Face has it."""
    model = small_gpt2(tiny_tokenizer.vocab_size, POSITIONS)
    directory = tmp_path_factory.mktemp("model")
    return save_hugging_face(model, directory, tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file)


@pytest.fixture(scope="module")
def loaded(model_directory: Path) -> Loaded:
    return load_model(model_directory, device="cpu")


def tool(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(ROOT / "tools" / "evaluate_zeroshot.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=240)


def wiki(path: Path) -> Path:
    path.write_text(" . ".join(made_up_texts(8)))
    return path


def test_a_run_keeps_its_results(model_directory: Path, loaded: Loaded, tmp_path: Path) -> None:
    home, output = tmp_path / "run", tmp_path / "result.json"
    saved = save_weights(read_huggingface(model_directory), home)
    tokenizer = ["--vocab-file", model_directory / "vocab.json", "--merge-file", model_directory / "merges.txt"]
    kept = home / "zeroshot.json"
    kept.write_text(json.dumps({"LAMBADA": {"accuracy": 0.5}, "WIKITEXT103": {"adjusted_perplexity": 1.0}}))
    data = wiki(tmp_path / "wiki.tokens")
    result = tool("--task", WIKITEXT, "--load", home, "--valid-data", data, "--output", output, *tokenizer)
    assert (result.returncode, result.stdout.splitlines()[1:]) == (0, [f"written to {output}", f"written to {kept}"])
    assert "ETA" in result.stderr
    written = json.loads(output.read_text())
    expected = evaluate(loaded, ZeroShotConfig(WIKITEXT, data))
    for name in (
        "task",
        "original_tokens",
        "tokens",
        "windows",
        "seq_length",
        "overlapping_eval",
        "valid_data",
        "dtype",
    ):
        assert written[name] == expected[name], name
    assert written["adjusted_perplexity"] == pytest.approx(expected["adjusted_perplexity"], rel=1e-6)
    assert written["seconds"] > 0
    otherwise = f"on {written['original_tokens']} words, not the test text's 245,566, context 32"
    assert differences(WIKITEXT, written, steps=0) == otherwise
    assert result.stderr.endswith(f"note: not as the paper measured: {otherwise}\n")
    assert Path(written["model"]).name == saved.name
    assert json.loads(kept.read_text()) == {"LAMBADA": {"accuracy": 0.5}, "WIKITEXT103": written}
    assert result.stdout.startswith(
        f"WIKITEXT103: adjusted perplexity {written['adjusted_perplexity']:,.4f} (per token"
    )


def test_the_flags_of_lambada_reach_it(loaded: Loaded, tmp_path: Path) -> None:
    data, output = write_lambada(tmp_path / "lambada.jsonl", [LONG, "the river"]), tmp_path / "result.json"
    flags = ("--strict-lambada", "--truncate-context", "--seq-length", 16, "--micro-batch-tokens", 64)
    result = tool("--task", LAMBADA, "--load", loaded.source, "--valid-data", data, "--output", output, *flags)
    assert result.returncode == 0, result.stderr
    config = ZeroShotConfig(
        LAMBADA, data, strict_lambada=True, truncate_context=True, seq_length=16, micro_batch_tokens=64
    )
    written, expected = json.loads(output.read_text()), evaluate(loaded, config)
    assert written.pop("perplexity") == pytest.approx(expected.pop("perplexity"), rel=1e-5)
    assert written.pop("seconds") > 0 and expected.pop("seconds") > 0
    assert written == expected


def test_strict_lambada_is_kept_apart(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    data = write_lambada(tmp_path / "lambada.jsonl", ["told the river", "again and again"])
    for strict in (True, False):
        result = evaluate(loaded, ZeroShotConfig(LAMBADA, data, strict_lambada=strict))
        assert write_result(result, load=tmp_path, output=None) == [tmp_path / "zeroshot.json"]
        assert differences(result["task"], result, steps=1) == "on 2 of 5,153 examples, context 32"
    assert set(json.loads((tmp_path / "zeroshot.json").read_text())) == {LAMBADA, STRICT_LAMBADA}


def test_elsewhere_than_in_a_run_nothing_is_left(tmp_path: Path) -> None:
    assert write_result({"task": WIKITEXT}, load=tmp_path, output=None) == []
    assert list(tmp_path.iterdir()) == []


def test_broken_results_are_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    kept = tmp_path / "zeroshot.json"
    for content in ("{", "[1]", '{"LAMBADA": 3}'):
        kept.write_text(content)
        with pytest.raises(
            UserError, match=r"zeroshot.json: expected an object with a result a task, found b'.*delete"
        ):
            write_result({"task": WIKITEXT}, load=tmp_path, output=None)
        assert kept.read_text() == content


def test_each_rank_takes_its_share(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pieces = [Piece(rng.integers(0, 400, n, dtype=np.int32), 2) for n in rng.integers(3, POSITIONS, 11)]
    shares: list[torch.Tensor] = []
    monkeypatch.setattr(World, "sum", lambda self, values: (shares.append(values.clone()), values)[1])
    whole = score(loaded.model, pieces, micro_batch_tokens=50)
    for rank in range(3):
        score(loaded.model, pieces, micro_batch_tokens=50, world=World(rank=rank, layout=Layout(shard=3)))
    taken = torch.stack(shares[1:])[:, 0] > 0
    assert (taken.sum(0) == 1).all(), "no piece is counted twice"
    assert taken.any(1).all(), "every rank has something to do"
    np.testing.assert_array_equal(sum(shares[1:])[0].numpy(), whole.losses)


@pytest.mark.slow
def test_two_ranks_find_what_one_does(model_directory: Path, tmp_path: Path) -> None:
    data, found = wiki(tmp_path / "wiki.tokens"), []
    for ranks in (1, 2):
        output = tmp_path / f"{ranks}.json"
        launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node")
        flags = ("--task", WIKITEXT, "--load", model_directory, "--valid-data", data, "--output", output)
        result = tool(*flags, "--overlapping-eval", 4, launcher=(*launcher, str(ranks)) if ranks > 1 else ())
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("adjusted perplexity") == 1
        found.append(json.loads(output.read_text()))
    assert [entry["ranks"] for entry in found] == [1, 2]
    assert found[0]["adjusted_perplexity"] == found[1]["adjusted_perplexity"]


# What is longer than the model reads.


def test_a_long_text_keeps_its_last_tokens_when_asked(loaded: Loaded, tmp_path: Path) -> None:
    tokenizer = loaded.require_tokenizer()
    text = " ".join(["river"] * 40)
    example = Example("file:1", text)
    piece, cut = piece_of(example, tokenizer, POSITIONS, strict=True, truncate=True)
    label = tokenizer.encode(" river")
    assert cut and piece.targets == len(label)
    assert piece.tokens.tolist() == (tokenizer.encode(" ".join(["river"] * 39)) + label)[-POSITIONS - 1 :]
    exact = piece_of(example, tokenizer, len(tokenizer.encode(text)) - 1, strict=False, truncate=False)
    assert exact[0].tokens.tolist() == tokenizer.encode(text) and not exact[1]
    data = write_lambada(tmp_path / "lambada.jsonl", [text, "the river"])
    result = evaluate(loaded, ZeroShotConfig(LAMBADA, data, strict_lambada=True, truncate_context=True))
    assert (result["truncated"], result["examples"]) == (1, 2)


LONG = "river " * 40


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", {}, ": is empty; expected a lambada_test.jsonl"),
        (b"\n \n", {}, ": is empty; expected a lambada_test.jsonl"),
        (
            b'{"text": "a b"}\n\n{"text": \n',
            {},
            ":3: is not valid JSON (Expecting value: line 1 column 10 (char 9)); repair",
        ),
        (b'{"text": "a b"}\n\xff\n', {}, ":2: is not valid JSON ('utf-8' codec can't decode byte 0xff"),
        (b'{"txt": "a b"}\n', {}, """:1: expected {"text": "..."}, found '{"txt": "a b"}'"""),
        (b"[1]\n", {}, """:1: expected {"text": "..."}, found '[1]'"""),
        (b'{"text": 3}\n', {}, """:1: expected {"text": "..."}, found '{"text": 3}'"""),
        (b'{"text": "river"}\n', {}, ":1: expected a text of at least two words, found 'river'"),
        (b'{"text": "river"}\n', {"strict_lambada": True}, ":1: expected a text of at least two words, found 'river'"),
        (b'{"text": " "}\n', {"strict_lambada": True}, ":1: expected a text of at least two words, found ' '"),
        (b'{"text": ""}\n', {}, ":1: expected a text of at least two words, found ''"),
        (b'{"text": "a \\ud800"}\n', {}, ":1: the text holds the lone surrogate U+D800"),
        (
            json.dumps({"text": LONG}).encode(),
            {"strict_lambada": True},
            " tokens, but the model reads 32 and predicts one more; give --truncate-context",
        ),
        (
            json.dumps({"text": "a " + LONG.replace(" ", "")}).encode(),
            {"strict_lambada": True, "truncate_context": True},
            " tokens, but the model reads 32",
        ),
        (b'{"text": "a b"}\n', {"seq_length": 33}, "--seq-length 33 must be from 1 to the model's 32 positions"),
        (b'{"text": "a b"}\n', {"micro_batch_tokens": 0}, "--micro-batch-tokens 0 must be at least 1"),
    ],
)
def test_bad_lambada(loaded: Loaded, tmp_path: Path, content: bytes, flags: dict, message: str) -> None:
    path = tmp_path / "lambada.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        evaluate(loaded, ZeroShotConfig(LAMBADA, path, **flags))
    assert (f"--valid-data {path}{message}" if message.startswith(":") else message) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (b"", {}, ": is empty; expected a wiki.test.tokens"),
        (b" \n \n", {}, ": is empty; expected a wiki.test.tokens"),
        (b" river \n", {}, ": expected at least two words, found 'river'"),
        (b"a\nb \xe9 c\n", {}, ":2: is not UTF-8 text; expected a wiki.test.tokens"),
        (b"a b c", {"overlapping_eval": 33}, "--overlapping-eval 33 must be from 1 to the sequence length 32"),
        (b"a b c", {"overlapping_eval": 17, "seq_length": 16}, "--overlapping-eval 17 must be from 1 to the sequence"),
        (b"a b c", {"overlapping_eval": 0}, "--overlapping-eval 0 must be from 1 to the sequence length 32"),
        (None, {}, ": cannot be read (No such file"),
    ],
)
def test_bad_wikitext(loaded: Loaded, tmp_path: Path, content: bytes | None, flags: dict, message: str) -> None:
    path = tmp_path / "wiki.tokens"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        evaluate(loaded, ZeroShotConfig(WIKITEXT, path, **flags))
    assert (f"--valid-data {path}{message}" if message.startswith(":") else message) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_that_is_too_long_is_found_before_the_weights_are_read(
    model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a run's nor Hugging Face's are, nor are their digests looked at: here they are damaged."""
    run, bare = tmp_path / "run", tmp_path / "bare"
    save_weights(read_huggingface(model_directory), run)
    shutil.copytree(model_directory, bare)
    for weights in [*run.rglob("*.safetensors"), *bare.glob("*.safetensors")]:
        weights.write_bytes(bytes(weights.stat().st_size))
    long, short = write_lambada(tmp_path / "long", [LONG]), write_lambada(tmp_path / "short", ["a river"])
    for model in (run, bare):
        for data, message in ((long, r"long:1: has \d+ tokens, but the model reads 32"), (short, ".safetensors")):
            words = ["--task", LAMBADA, "--load", str(model), "--valid-data", str(data)]
            words += ["--vocab-file", str(model_directory / "vocab.json")]
            words += ["--merge-file", str(model_directory / "merges.txt"), "--device", "cpu"]
            monkeypatch.setattr(sys, "argv", ["evaluate_zeroshot.py", *words])
            with pytest.raises(UserError, match=message):
                runpy.run_path(str(ROOT / "tools" / "evaluate_zeroshot.py"))["main"]()


def test_no_vocabulary_and_one_of_another_size(model_directory: Path, tmp_path: Path, loaded: Loaded) -> None:
    bare, data = tmp_path / "bare", wiki(tmp_path / "wiki.tokens")
    shutil.copytree(model_directory, bare, ignore=shutil.ignore_patterns("vocab.json", "merges.txt"))
    with pytest.raises(UserError, match="names no files of its tokenizer: give --vocab-file and --merge-file"):
        evaluate(load_model(bare, device="cpu"), ZeroShotConfig(WIKITEXT, data))
    vocab = json.loads((model_directory / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"<|more|>": len(vocab)}))
    files = TokenizerConfig(vocab_file=str(tmp_path / "vocab.json"), merge_file=str(model_directory / "merges.txt"))
    with pytest.raises(UserError, match=r"--vocab-file .*vocab.json: expected the 400 tokens of .*, found 401"):
        load_model(model_directory, tokenizer=files, device="cpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", WIKITEXT, "--output", f"{__file__}/out.json"], "test_zeroshot_tool.py' is no directory"),
        (["--task", "LAMBADA"], "--task LAMBADA needs --valid-data FILE, the text to evaluate on"),
        (
            ["--task", WIKITEXT, "--valid-data", "x", "--limit", "3"],
            "--limit is for tasks of lm-eval, not WIKITEXT103: drop it",
        ),
        (
            ["--task", LAMBADA, "--valid-data", "x", "--include-path", "d"],
            "--include-path is for tasks of lm-eval, not LAMBADA: drop it",
        ),
        (
            ["--task", WIKITEXT, "--valid-data", "x", "--strict-lambada"],
            "--strict-lambada is for LAMBADA, not WIKITEXT103: drop it",
        ),
        (
            ["--task", WIKITEXT, "--valid-data", "x", "--truncate-context"],
            "--truncate-context is for LAMBADA, not WIKITEXT103: drop it",
        ),
        (
            ["--task", LAMBADA, "--valid-data", "x", "--overlapping-eval", "32"],
            "--overlapping-eval is for WIKITEXT103, not LAMBADA: drop it",
        ),
        (
            ["--task", "piqa", "--seq-length", "8"],
            "--seq-length is for WIKITEXT103 and LAMBADA, not piqa: drop it, or correct --task",
        ),
        (["--task", "piqa", "--strict-lambada"], "--strict-lambada is for LAMBADA, not piqa: drop it"),
        (
            ["--task", "WIKITEXT", "--valid-data", "x"],
            "WIKITEXT103 and LAMBADA are not), which brings its own data: drop",
        ),
    ],
)
def test_flags_that_do_not_go_together(monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str) -> None:
    script = runpy.run_path(str(ROOT / "tools" / "evaluate_zeroshot.py"))
    monkeypatch.setattr(sys, "argv", ["evaluate_zeroshot.py", "--load", "run", *flags])
    with pytest.raises(UserError, match=re.escape(message)):
        script["check"](script["parse_arguments"]())


def test_lm_eval_through_the_tool(model_directory: Path, loaded: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    from megatron.evaluation.harness import run_harness

    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "{text.strip()}"}}\n' for text in made_up_texts(3)))
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    flags = ("--task", "own", "--load", model_directory, "--include-path", tmp_path, "--output", tmp_path / "out.json")
    result = tool(*flags, "--limit", 2)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    expected = run_harness(loaded, ["own"], limit=2, include_path=tmp_path)
    assert (written["task"], written["results"]) == ("own", expected["results"])
    assert (written["limit"], written["n-samples"]["own"]["effective"]) == (2, 2)
    assert result.stdout.startswith(f"own: bits_per_byte {expected['results']['own']['bits_per_byte,none']:.4f}")


def test_a_result_is_not_lost_for_what_the_run_kept_before(tmp_path: Path) -> None:
    run, output = tmp_path / "run", tmp_path / "result.json"
    (run / "checkpoints").mkdir(parents=True)
    (run / "zeroshot.json").write_text("{")
    result = {"task": WIKITEXT, "adjusted_perplexity": 3.0}
    with pytest.raises(UserError, match=r"zeroshot\.json: expected an object with a result a task"):
        write_result(result, load=run, output=output)
    assert json.loads(output.read_text()) == result


@pytest.mark.parametrize("broken", [True, False])
def test_what_would_lose_the_result_is_found_before_the_evaluation(tmp_path: Path, broken: bool) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    if broken:
        (run / "zeroshot.json").write_text("{")
    tool = [sys.executable, str(Path(__file__).parents[1] / "tools/evaluate_zeroshot.py"), "--task", WIKITEXT]
    arguments = ["--load", str(run), "--valid-data", "none", "--output", str(tmp_path)]
    told = subprocess.run([*tool, *arguments[: 4 if broken else 6]], capture_output=True, text=True, check=False)
    expected = "zeroshot.json: expected an object" if broken else f"found the directory '{tmp_path}': name a file"
    assert told.returncode != 0 and expected in told.stderr and told.stderr.count("\n") == 1
