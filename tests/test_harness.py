"""Our models in lm-eval against lm-eval's own class for Hugging Face models, on the same weights and tokenizer."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from zeroshot_models import learn, made_up_texts, save_hugging_face, small_gpt2

from megatron.distributed.world import World
from megatron.errors import UserError
from megatron.evaluation.loading import Loaded, load_model
from megatron.layout import Layout
from megatron.tokenizer.gpt2_bpe import GPT2BPETokenizer
from megatron.tokenizer.training import TrainedTokenizer

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # before anything imports the hub's client

ROOT = Path(__file__).resolve().parents[1]
POSITIONS = 288  # TriviaQA leaves the default of 256 tokens to write
OWN = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}} Answer:"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "own_writing": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{question}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
"""Tasks in the harness's format, each kind of request once."""
THEIRS = {"hellaswag": "hellaswag/hellaswag.yaml", "lambada_openai": "lambada/lambada_openai.yaml",
          "triviaqa": "triviaqa/default.yaml"}  # fmt: skip
"""Whole definitions of the harness's, of which only the data is replaced."""


def documents(count: int = 10) -> list[dict[str, Any]]:
    """What all tasks read: questions and endings of random words; texts that repeat a few words, so that they can be
    guessed and perplexities are of a usual size. One text is longer than the model's context."""
    texts = [text.strip(".\n") for text in made_up_texts(5 * count)]
    rows = []
    for number in range(count):
        question, *endings = texts[5 * number : 5 * number + 5]
        words = ("cold morning river stone" if number % 2 else "grey lantern whistle").split()
        text = " ".join(words[(number + place) % len(words)] for place in range(240 if number == 3 else 10 + number))
        rows.append({
            "text": text, "question": question, "label": number % 4, "endings": endings, "ctx_a": question,
            "ctx_b": text, "activity_label": "Walking", "answer": {"aliases": endings},
        })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    """The module under test, where the extra is installed."""
    pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
    from megatron.evaluation import harness

    return harness


@pytest.fixture(scope="module")
def tasks(harness: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of task files, with their data."""
    import lm_eval

    directory = tmp_path_factory.mktemp("tasks")
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents()))
    for name, body in OWN.items():
        write_task(directory, name, body, data)
    for name, file in THEIRS.items():
        body = f"include: {Path(lm_eval.__file__).parent / 'tasks' / file}\n"
        write_task(directory, f"local_{name}", body, data)
    return directory


def write_task(directory: Path, name: str, body: str, data: Path) -> Path:
    """A task file in the harness's format, on the documents in `data`."""
    file = directory / f"{name}.yaml"
    file.write_text(
        f"task: {name}\ndataset_path: json\ndataset_name: null\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        f"test_split: test\nvalidation_split: null\ntraining_split: null\n{body}"
    )
    return file


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: TrainedTokenizer) -> Path:
    """A Hugging Face directory of a model that knows the documents' words: perplexities are of a usual size."""
    files = tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file
    model = small_gpt2(tiny_tokenizer.vocab_size, POSITIONS)
    tokenizer = GPT2BPETokenizer(*files)
    texts = [text for row in documents() for text in (row["question"], row["text"])]
    stream = [token for text in texts for token in (tokenizer.eod, *tokenizer.encode(text))]
    learn(model, [stream[end - POSITIONS : end] for end in range(POSITIONS, len(stream), 200)], POSITIONS - 1, steps=60)
    return save_hugging_face(model, tmp_path_factory.mktemp("model"), *files)


@pytest.fixture
def only_local_tasks(harness: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the harness's own thousands of task files, which take seconds to list."""
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Loaded:
    return load_model(directory, device="cpu")


NAMES = [*OWN, *(f"local_{name}" for name in THEIRS)]


def evaluate(model: str, arguments: dict[str, Any], tasks: Path) -> dict[str, Any]:
    """All that the harness says of a model, answers included."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(
        model=model, model_args=arguments, tasks=NAMES, task_manager=manager, batch_size=4, bootstrap_iters=10
    )


def test_every_answer_and_metric_equals_the_harness_own_class(harness: ModuleType, directory: Path, tasks: Path):
    theirs = evaluate("hf", {"pretrained": str(directory), "device": "cpu", "dtype": "float32"}, tasks)
    ours = evaluate(harness.NAME, {"load": str(directory), "device": "cpu", "micro_batch_tokens": 700}, tasks)
    answers = []
    for name in NAMES:
        assert len(ours["samples"][name]) == len(theirs["samples"][name]) == 10
        for left, right in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            for answer, expected in zip(flat(left["resps"]), flat(right["resps"]), strict=True):
                assert answer == (pytest.approx(expected, rel=1e-5) if type(expected) is float else expected)
                answers.append(answer)
        assert printed(ours["results"][name]) == printed(theirs["results"][name])
    assert {True, False} <= set(answers), "some are what the model would write, some not"
    assert len({answer for answer in answers if isinstance(answer, str)}) > 6


def printed(metrics: dict[str, Any]) -> dict[str, str]:
    """As the harness prints them."""
    numbers = {name: f"{value:.4f}" for name, value in metrics.items() if isinstance(value, float)}
    assert numbers
    return numbers


def flat(answers: Any) -> list[Any]:
    """The leaves of nested lists and tuples."""
    if not isinstance(answers, list | tuple):
        return [answers]
    return [leaf for answer in answers for leaf in flat(answer)]


@pytest.mark.usefixtures("only_local_tasks")
def test_results_of_tasks_and_their_average(
    harness: ModuleType, loaded: Loaded, tasks: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(harness, "PAPER_TASKS", ["local_triviaqa", "local_lambada_openai"])
    outcome = harness.run_harness(loaded, ["own_choice", "paper"], limit=4, include_path=tasks)
    results = outcome["results"]
    accuracies = [
        results["own_choice"]["acc,none"],
        results["local_triviaqa"]["exact_match,remove_whitespace"],
        results["local_lambada_openai"]["acc,none"],
    ]
    assert outcome["average"] == pytest.approx(sum(accuracies) / 3)
    assert outcome["n-samples"]["own_choice"] == {"original": 10, "effective": 4}
    json.dumps(outcome)
    without = harness.run_harness(loaded, ["own_choice", "own_rolling"], limit=2, include_path=tasks)
    assert without["average"] is None, "a perplexity is no accuracy"


@pytest.mark.slow
def test_the_papers_tasks_are_the_harness_tasks(harness: ModuleType, loaded: Loaded):
    from lm_eval.tasks import TaskManager

    assert len(harness.PAPER_TASKS) == 11
    assert set(harness.PAPER_TASKS) <= set(TaskManager().all_tasks)
    with pytest.raises(UserError, match=r"--task piqa \(.*\): the data cannot be read \(.*copy its cache"):
        harness.run_harness(loaded, ["piqa"])


@pytest.mark.usefixtures("only_local_tasks")
def test_an_unknown_task_is_named(harness: ModuleType, loaded: Loaded, tasks: Path):
    with pytest.raises(UserError, match=r"--task own_choise: lm-eval knows no such task .*; did you mean own_choice\?"):
        harness.run_harness(loaded, ["own_choise"], include_path=tasks)


@pytest.mark.usefixtures("only_local_tasks")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("do_sample: true, temperature: 0.7", "a task asks for sampling"),
        ("max_gen_toks: 288", "a task asks for texts of 288 tokens after its prompt; the model's full length is 288"),
    ],
)
def test_texts_that_cannot_be_written_are_refused(
    harness: ModuleType, loaded: Loaded, tasks: Path, tmp_path: Path, settings: str, message: str
):
    body = OWN["own_writing"].replace("max_gen_toks: 12, do_sample: false", settings)
    write_task(tmp_path, "own_writing", body, tasks / "data.jsonl")
    with pytest.raises(UserError, match=message):
        harness.run_harness(loaded, ["own_writing"], limit=2, include_path=tmp_path)


ROW, ROLLING = '{"text": "cold river", "question": "a b"}\n', OWN["own_rolling"]


@pytest.mark.usefixtures("only_local_tasks")
@pytest.mark.parametrize(
    ("data", "body", "message"),
    [
        (ROW + '{"text": \n', ROLLING, r"cannot load it: DatasetGenerationError: .*, from .*JSON parse error.* in row"),
        (
            None,
            ROLLING,
            r"the data cannot be read \(FileNotFoundError: .*data.jsonl.*\); run it once where the hub can be",
        ),
        ("", ROLLING, r"cannot load it: StopIteration; mend that file or its data"),
        ("\n", ROLLING, r"""cannot load it: ValueError: Instruction "test" corresponds to no data!"""),
        (ROW, ROLLING.replace("{{text}}", "{{text"), r"cannot load it: TemplateSyntaxError: unexpected end of "),
        (ROW, ROLLING.replace("{{text}}", "{{txt}}"), r"cannot load it: UndefinedError: 'txt' is undefined"),
        (ROW, ROLLING.replace("_rolling", "s"), r"cannot load it: ValueError: Got invalid output_type 'log"),
        (ROW.replace("cold river", ""), ROLLING, r"--task own: lm-eval failed: ZeroDivisionError: .*division by zero"),
    ],
)
def test_what_fails_in_the_harness_is_one_line(
    harness: ModuleType, loaded: Loaded, tmp_path: Path, data: str | None, body: str, message: str
):
    if data is not None:
        (tmp_path / "data.jsonl").write_text(data)
    file = write_task(tmp_path, "own", body, tmp_path / "data.jsonl")
    with pytest.raises(UserError, match=message) as caught:
        harness.run_harness(loaded, ["own"], include_path=tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(("--task own: ", f"--task own ({file}): "))
    assert caught.value.__cause__ is not None, "the harness's own error stays behind it"


@pytest.mark.usefixtures("only_local_tasks")
def test_a_fault_of_our_own_keeps_its_traceback(
    harness: ModuleType, loaded: Loaded, tasks: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a programming error")

    monkeypatch.setattr(harness, "score", broken)
    with pytest.raises(ValueError, match="a programming error"):
        harness.run_harness(loaded, ["own_choice"], limit=1, include_path=tasks)


@pytest.mark.parametrize(
    ("limit", "include_path", "message"),
    [
        (0, None, r"--limit 0: expected at least 1 example of each task"),
        (None, Path(__file__), r"--include-path .*test_harness.py: is no directory; name the one"),
        (None, Path("nowhere"), r"--include-path nowhere: is no directory; name the one"),
    ],
)
def test_arguments_that_make_no_sense_are_named(
    harness: ModuleType, loaded: Loaded, limit: int | None, include_path: Path | None, message: str
):
    with pytest.raises(UserError, match=message):
        harness.run_harness(loaded, ["own"], limit=limit, include_path=include_path)


@pytest.mark.usefixtures("only_local_tasks")
def test_a_tag_stands_for_its_tasks(harness: ModuleType, loaded: Loaded, tasks: Path, tmp_path: Path):
    for name in ("one", "other"):
        write_task(tmp_path, name, "tag: both\n" + OWN["own_choice"], tasks / "data.jsonl")
    outcome = harness.run_harness(loaded, ["both"], limit=3, include_path=tmp_path)
    assert set(outcome["results"]) == {"one", "other"}
    assert outcome["average"] == pytest.approx(outcome["results"]["one"]["acc,none"])


@pytest.mark.usefixtures("only_local_tasks")
def test_what_lost_its_first_tokens_is_counted(harness: ModuleType, loaded: Loaded, tasks: Path):
    """The fourth document is longer than the context; a rolling likelihood has windows, and loses nothing."""
    for name, cut in (("own_writing", 1), ("own_rolling", 0), ("local_lambada_openai", 1)):
        outcome = harness.run_harness(loaded, [name], include_path=tasks)
        assert (outcome["seq_length"], outcome["truncated"]) == (POSITIONS, cut), name


def test_each_rank_takes_its_share(harness: ModuleType, loaded: Loaded, monkeypatch: pytest.MonkeyPatch):
    settings = {"until": ["e"], "max_gen_toks": 4, "do_sample": False}
    prompts = [
        harness.Instance(request_type="generate_until", doc={}, arguments=(row["question"], settings), idx=0)
        for row in documents()
    ]
    continuations = [(None, [7], [number, number + 1]) for number in range(9)]
    alone = harness.MegatronSLW(loaded, 60)
    texts, scores = alone.generate_until(prompts), alone._loglikelihood_tokens(continuations)
    written: list[list[tuple[int, str]]] = []
    losses: list[torch.Tensor] = []
    monkeypatch.setattr(World, "gather", lambda self, share: (written.append(share), [share])[1])
    monkeypatch.setattr(World, "sum", lambda self, values: (losses.append(values[0].clone()), values)[1])
    for rank in range(3):
        one = harness.MegatronSLW(loaded, 8, World(rank=rank, layout=Layout(shard=3)))
        one.generate_until(prompts)
        one._loglikelihood_tokens(continuations)
    assert all(written) and sorted(chain.from_iterable(written)) == list(enumerate(texts))
    assert (-sum(losses)).tolist() == pytest.approx([likelihood for likelihood, _ in scores])
    assert sum((share > 0).int() for share in losses).tolist() == [1] * 9


@pytest.mark.slow
def test_two_ranks_find_what_one_does(harness: ModuleType, directory: Path, tasks: Path, tmp_path: Path):
    """Each kind of request, through the tool; a rank that took another's requests twice would change the numbers."""
    found = []
    for ranks in (1, 2):
        launcher, output = [], tmp_path / f"{ranks}.json"
        if ranks > 1:
            launcher = [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--local-addr",
                "127.0.0.1",
                "--nproc-per-node",
                "2",
            ]
        command = [sys.executable, *launcher, "tools/evaluate_zeroshot.py", "--task",
                   ",".join(OWN), "--load", str(directory), "--include-path", str(tasks), "--output", str(output),
                   "--micro-batch-tokens", "700", "--device", "cpu"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("own_choice: ") == done.stdout.count("written to ") == 1
        found.append(json.loads(output.read_text()))
    assert [result["ranks"] for result in found] == [1, 2]
    for name in ("results", "n-samples", "average", "truncated"):
        assert found[0][name] == found[1][name], name


@pytest.mark.parametrize("continuation", ["", " river" * 300])
def test_a_continuation_that_cannot_be_scored_is_refused(harness: ModuleType, loaded: Loaded, continuation: str):
    model = harness.MegatronSLW(loaded)
    with pytest.raises(UserError, match=r"a continuation of [0-9,]+ tokens cannot be scored by a model of 288"):
        model._loglikelihood_tokens([(("a", continuation), [1], model.tok_encode(continuation))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("device=cpu", "--model_args: expected load=DIR"),
        ("load=x,pretrained=y", "--model_args pretrained: expected one of load, device, dtype, micro_batch_tokens"),
        ("load=x,micro_batch_tokens=0", "--model_args micro_batch_tokens=0: expected a whole number"),
        ("load=x,micro_batch_tokens=many", "--model_args micro_batch_tokens=many: expected a whole number"),
        ("load=nowhere", "nowhere: no whole checkpoint"),
    ],
)
def test_model_arguments_that_make_no_sense_are_named(harness: ModuleType, arguments: str, message: str):
    with pytest.raises(UserError, match=message):
        harness.MegatronSLW.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})


@pytest.mark.parametrize(("arguments", "device"), [("load=x", "cuda:0"), ("load=x,device=cuda:0", None)])
def test_a_gpu_that_is_not_there_is_refused(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: str, device: str | None
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda: no CUDA device is available; use --device cpu"):
        harness.MegatronSLW.create_from_arg_string(arguments, {"batch_size": 1, "device": device})


@pytest.mark.slow
def test_the_harness_command_line_knows_the_model(harness: ModuleType, directory: Path, tasks: Path):
    command = [sys.executable, "-m", "megatron.evaluation.harness", "--model", harness.NAME, "--tasks", "own_choice",
               "--model_args", f"load={directory}", "--include_path", str(tasks), "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "|own_choice|" in done.stdout


def test_without_the_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "megatron.evaluation.harness", raising=False)
    with pytest.raises(
        UserError, match=r"lm-eval cannot be imported .*; install it: pip install 'megatron-slw\[eval\]'"
    ):
        importlib.import_module("megatron.evaluation.harness")
