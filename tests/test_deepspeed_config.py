"""A DeepSpeed configuration file in the place of a recipe: what it sets, what it schedules, and what is refused."""

from __future__ import annotations

import copy
import json
from bisect import bisect_right
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest

from megatron.arguments import build_parser, parse_config, to_yaml
from megatron.config import Config
from megatron.deepspeed_config import read_deepspeed_config
from megatron.errors import UserError
from megatron.pacing.seqlen_warmup import SeqlenSchedule
from megatron.progress import Progress

TUTORIAL = Path(__file__).parents[1] / "recipes/deepspeed-tutorial.json"
STEPS = 20_000


def parse(*argv: object) -> Config:
    return parse_config(build_parser(), ["--train-tokens", "157286400000", *map(str, argv)])[0]


def curriculum(kind: str, start: int, end: int, **schedule: object) -> dict[str, Any]:
    """A `curriculum_learning` block as the tutorial describes it."""
    return {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": start,
        "max_difficulty": end,
        "schedule_type": kind,
        "schedule_config": schedule,
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ds.json"


def write(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


# What it sets


def test_the_tutorial_is_the_flags_that_it_stands_for(capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "--global-batch-size 4096 --log-interval 1 --lr 1.5e-4 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1 --fp16 "
        "--loss-scale-window 1000 --hysteresis 2 --min-loss-scale 1 --seqlen-warmup linear --seqlen-start 8 "
        "--seqlen-warmup-iters 15000 --seqlen-multiple 8"
    )
    expected = parse(*flags.split())
    assert capsys.readouterr().err == ""
    for flag in ("--deepspeed-config", "--deepspeed_config"):
        assert parse(flag, TUTORIAL) == expected
        assert capsys.readouterr().err == (
            f"note: --deepspeed-config {TUTORIAL}: gradient_accumulation_steps 1 is not read: it follows from both "
            f"batches and the ranks\nnote: --deepspeed-config {TUTORIAL}: ignored: optimizer.params.max_grad_norm\n"
        )


def test_every_key_with_a_counterpart(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All values other than the defaults."""
    document = {
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": 0.25,
        "steps_per_print": 7,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-3, "betas": [0.8, 0.99], "eps": 1e-6, "weight_decay": 0.2, "torch_adam": True},
        },
        "fp16": {
            "enabled": True,
            "loss_scale": 128,
            "initial_scale_power": 16,
            "loss_scale_window": 500,
            "hysteresis": 4,
            "min_loss_scale": 2,
        },
        "bf16": {"enabled": False},
        "zero_optimization": {
            "stage": 1, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "pin_memory": True}
        },
        "wall_clock_breakdown": True,
        "amp": {"enabled": False},
        "curriculum_learning": curriculum("fixed_root", 32, 1024, **{
            "total_curriculum_step": 99, "difficulty_step": 16, "root_degree": 3, "strange\nname": 1,
        }),
        "data_efficiency": {"enabled": False, "seed": 1},
        "a.b": 1,
    }  # fmt: skip
    flags = (
        "--global-batch-size 48 --micro-batch-size 6 --clip-grad 0.25 --log-interval 7 --lr 1e-3 --adam-beta1 0.8 "
        "--adam-beta2 0.99 --adam-eps 1e-6 --weight-decay 0.2 --fp16 --loss-scale 128 --initial-loss-scale 65536 "
        "--loss-scale-window 500 --hysteresis 4 --min-loss-scale 2 --zero-stage 2 --cpu-optimizer --seqlen-warmup root "
        "--seqlen-start 32 --seqlen-warmup-iters 99 --seqlen-multiple 16 --seqlen-root-degree 3"
    )
    assert parse("--deepspeed-config", write(path, document)) == parse(*flags.split())
    assert capsys.readouterr().err.splitlines() == [
        f"note: --deepspeed-config {path}: zero_optimization.stage 1 is read as 2, which shares out gradients too",
        f"note: --deepspeed-config {path}: ignored: optimizer.params.torch_adam, "
        "zero_optimization.overlap_comm, zero_optimization.offload_optimizer.pin_memory, wall_clock_breakdown, amp, "
        'curriculum_learning.schedule_config."strange\\nname", data_efficiency.seed, "a.b"',
    ]


@pytest.mark.parametrize(
    ("batch", "micro", "steps", "note"),
    [
        (48, 6, 4, "gradient_accumulation_steps 4 is not read: it follows from both batches and the ranks (2 in Deep"),
        (
            None,
            6,
            4,
            "without train_batch_size, --global-batch-size decides (DeepSpeed takes 6 x 4 x its data parallel",
        ),
        (None, 6, None, "without train_batch_size, --global-batch-size decides (DeepSpeed takes 6 x 1 x its data para"),
        (48, 6, None, ""),
    ],
)
def test_the_batch_is_explained(
    path: Path, batch: int | None, micro: int, steps: int | None, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    write(path, {key: value for key, value in zip(keys, (batch, micro, steps), strict=True) if value})
    training = parse("--deepspeed-config", path, *([] if batch else ["--global-batch-size", "12"])).training
    assert (training.global_batch_size, training.micro_batch_size) == (batch or 12, micro)
    said = capsys.readouterr().err
    assert said.count("\n") == bool(note) and note in said


@pytest.mark.parametrize(("metric", "realisation"), [("seqlen_truncate", "truncate"), ("seqlen_reshape", "reshape")])
def test_the_curriculum_of_data_efficiency(path: Path, metric: str, realisation: str) -> None:
    write(path, data_efficiency(metric))
    flags = (
        "--seqlen-warmup root --seqlen-start 80 --seqlen-warmup-iters 110000 --seqlen-root-degree 2 --seq-length 2048 "
        f"--seqlen-realisation {realisation}"
    )
    assert parse("--deepspeed-config", path, "--seq-length", "2048") == parse(*flags.split())
    assert read_deepspeed_config(path).notes == [
        f"--deepspeed-config {path}: ignored: data_efficiency.data_sampling.curriculum_learning.data_cluster_path, "
        f"data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.{metric}.clustering_type"
    ]


def data_efficiency(metric: str, **others: object) -> dict[str, Any]:
    """The block of that name, as the later scripts for GPT have it."""
    block = curriculum("fixed_root", 80, 2048, total_curriculum_step=110_000, difficulty_step=8, root_degree=2)
    del block["enabled"], block["curriculum_type"]
    metrics = {metric: {**block, "difficulty_type": "value", "clustering_type": "single_cluster"}, **others}
    learning = {"enabled": True, "data_cluster_path": "x", "curriculum_metrics": metrics}
    return {"data_efficiency": {"enabled": True, "data_sampling": {"enabled": True, "curriculum_learning": learning}}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (data_efficiency("vocabularyrarity"), 'expected seqlen_truncate or seqlen_reshape alone, found ["vocabularyr'),
        (data_efficiency("seqlen_truncate", voc={}), 'reshape alone, found ["seqlen_truncate", "voc"]'),
        ({"data_efficiency": {"enabled": True, "data_routing": {"enabled": True}}}, "no random layer-token drop here"),
        ({"train_batch_size": 48, "train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 5},
         "train_batch_size: expected a multiple of train_micro_batch_size_per_gpu 6 and gradient_accumulation_steps 5 "
         "together, 30, found 48"),
        ({"train_batch_size": 48, "gradient_accumulation_steps": 5}, "of gradient_accumulation_steps 5 together, 5, f"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled: expected false where bf16.enabled is"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: changes what is trained, and is not read: give --lr-warmup"),
        ({"amp": {"enabled": True}}, "amp: changes what is trained, and is not read: enable bf16 or fp16"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode: expected true, found false"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "expected none or cpu, found "),
    ],
)  # fmt: skip
def test_what_would_be_another_run_is_refused(path: Path, document: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse("--deepspeed-config", write(path, document), "--seq-length", "2048")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_curriculum_at_a_time(path: Path) -> None:
    block = curriculum("fixed_linear", 8, 2048, total_curriculum_step=9, difficulty_step=8)
    with pytest.raises(UserError, match="data_efficiency: expected it switched off beside curriculum_learning"):
        parse("--deepspeed-config", write(path, {"curriculum_learning": block, **data_efficiency("seqlen_truncate")}))


def test_the_older_name_of_bf16(path: Path) -> None:
    assert parse("--deepspeed-config", write(path, {"bfloat16": {"enabled": True}})).training.bf16


def test_recipes_then_the_file_then_flags(path: Path) -> None:
    recipe = path.with_name("r.yaml")
    recipe.write_text(
        "lr: 9e-4\nmin-lr: 1e-5\nglobal-batch-size: 3\nseqlen-warmup: discrete\nseqlen-stages: 128:5,1024\n"
    )
    config = parse("--clip-grad", "0.5", "--deepspeed-config", TUTORIAL, "--config", recipe, "--no-fp16")
    assert (config.learning_rate.lr, config.learning_rate.min_lr) == (1.5e-4, 1e-5)
    assert (config.training.global_batch_size, config.training.fp16, config.optimizer.clip_grad) == (4096, False, 0.5)
    assert config.seqlen_warmup == parse("--deepspeed-config", TUTORIAL).seqlen_warmup


def test_what_is_disabled_is_off_whatever_a_recipe_says(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = path.with_name("r.yaml")
    recipe.write_text("fp16: true\nloss-scale: 8\nseqlen-warmup: linear\nseqlen-warmup-iters: 9\n")
    write(path, {"fp16": {"enabled": False, "loss_scale": 8}, "curriculum_learning": {"enabled": False, "x": {}}})
    assert parse("--config", recipe, "--deepspeed-config", path) == parse()
    assert capsys.readouterr().err == (
        f"note: --deepspeed-config {path}: ignored: fp16.loss_scale, curriculum_learning.x\n"
    )


def test_the_resolved_config_needs_no_file(path: Path) -> None:
    config = parse("--deepspeed-config", TUTORIAL, "--fp16")
    path.write_text(to_yaml(config))
    assert parse("--config", path) == config


# What it schedules


def lengths_of_growth(block: dict[str, Any]) -> list[int]:
    """Lengths of steps 1 to STEPS of fixed_linear and fixed_root, by the tutorial's formula turned around.

    Length L, a multiple of difficulty_step, is used from the first step t on with
    (t / total)^(1 / degree) * (max - min) + min >= L, which is t >= total * ((L - min) / (max - min))^degree.
    """
    schedule, start, end = block["schedule_config"], block["min_difficulty"], block["max_difficulty"]
    total, degree = schedule["total_curriculum_step"], schedule.get("root_degree", 1)
    lengths = list(range(start, end + 1, schedule["difficulty_step"]))
    begins = [ceil(total * Fraction(length - start, max(end - start, 1)) ** degree) for length in lengths]
    return [lengths[bisect_right(begins, step) - 1] for step in range(1, STEPS + 1)]


def lengths_of_stages(block: dict[str, Any]) -> list[int]:
    """Lengths of steps 1 to STEPS of fixed_discrete: max_step is the last step of each difficulty but the last."""
    lengths: list[int] = []
    for length, last in zip(
        block["schedule_config"]["difficulty"], [*block["schedule_config"]["max_step"], STEPS], strict=True
    ):
        lengths += [length] * (last - len(lengths))
    return lengths[:STEPS]


GROWTHS = [  # start, end, total_curriculum_step, difficulty_step, root_degree (None: fixed_linear)
    (8, 1024, 15_000, 8, None), (8, 1024, 15_000, 8, 1), (8, 1024, 15_000, 8, 2), (64, 1024, 14_999, 8, None),
    (64, 2048, 19_997, 16, None), (64, 2048, 19_997, 16, 3), (1, 1024, 10_007, 1, None), (1, 1000, 10_007, 1, 5),
    (3, 999, 7_777, 3, 2), (1024, 1024, 5_000, 8, None), (512, 512, 1, 1, 4), (8, 1024, 1, 8, None),
    (8, 1024, 2, 8, 2), (8, 16, 3, 8, None), (8, 16, 19_999, 8, 5), (16, 1024, 127, 16, None),
    (72, 2048, 11_500, 8, None), (72, 2048, 11_500, 8, 2), (8, 1024, 60_000, 8, None), (8, 1024, 45_000, 8, 3),
    (24, 120, 97, 24, 2), (7, 1022, 12_345, 7, 5), (128, 1024, 20_000, 128, None), (8, 8192, 20_001, 8, 2),
    (1, 2, 9_999, 1, 16), (10, 1000, 990, 10, None), (10, 1000, 981, 10, 2),
]  # fmt: skip


@pytest.mark.parametrize(("start", "end", "total", "multiple", "degree"), GROWTHS)
def test_growing_schedules(path: Path, start: int, end: int, total: int, multiple: int, degree: int | None) -> None:
    schedule = {"total_curriculum_step": total, "difficulty_step": multiple}
    if degree is None:
        block = curriculum("fixed_linear", start, end, **schedule)
    else:
        block = curriculum("fixed_root", start, end, **schedule, root_degree=degree)
    assert scheduled(path, block) == lengths_of_growth(block)


@pytest.mark.parametrize(
    ("lengths", "ends"),
    [([1, 2, 3], [5, 10]), ([128, 1024], [19_999]), ([128, 1024], [20_000]), ([1024], []), ([64, 32, 96], [1, 2]),
     ([12, 1020], [777]), ([8, 24, 8, 1023], [10, 11, 12_345])],
)  # fmt: skip
def test_discrete_schedules(path: Path, lengths: list[int], ends: list[int]) -> None:
    block = curriculum("fixed_discrete", lengths[0], lengths[-1], difficulty=lengths, max_step=ends)
    assert scheduled(path, block) == lengths_of_stages(block)


@pytest.mark.parametrize(("lengths", "multiple"), [([128, 1024], 8), ([12, 1020], 4), ([1, 3], 1)])
def test_stages_keep_the_multiple_that_they_have_up_to_8(path: Path, lengths: list[int], multiple: int) -> None:
    start, end = lengths
    write(path, {"curriculum_learning": curriculum("fixed_discrete", start, end, difficulty=lengths, max_step=[9])})
    flags = f"--seqlen-warmup discrete --seqlen-stages {start}:9,{end} --seqlen-multiple {multiple} --seq-length {end}"
    assert parse("--deepspeed-config", path, "--seq-length", end) == parse(*flags.split())


def scheduled(path: Path, block: dict[str, Any]) -> list[int]:
    """The lengths that a run with this curriculum gives its steps 1 to STEPS."""
    write(path, {"curriculum_learning": block})
    config = parse("--deepspeed-config", path, "--seq-length", block["max_difficulty"])
    schedule = SeqlenSchedule(config.seqlen_warmup, config.model.seq_length)
    return [schedule.seqlen(Progress(iteration=step - 1)) for step in range(1, STEPS + 1)]


# What is refused


def test_the_curriculum_must_lead_to_the_full_length(path: Path) -> None:
    block = curriculum("fixed_linear", 8, 2048, total_curriculum_step=9, difficulty_step=8)
    write(path, {"curriculum_learning": block})
    for given in ([], ["--seq-length", "1024"]):
        with pytest.raises(UserError) as caught:
            parse("--deepspeed-config", path, *given)
        assert str(caught.value) == (
            f"--deepspeed-config {path}: curriculum_learning.max_difficulty 2048 must equal --seq-length 1024: "
            "give --seq-length 2048, or correct the file"
        )
    assert parse("--deepspeed-config", path, "--seq-length", "2048").model.seq_length == 2048


MISSING = object()
LINEAR, DISCRETE = (
    curriculum("fixed_linear", 8, 1024, total_curriculum_step=100, difficulty_step=8),
    curriculum("fixed_discrete", 8, 1024, difficulty=[8, 16, 1024], max_step=[5, 10]),
)
WHOLE, TEXT, STAGES = "expected a positive whole number, found ", "expected ", "schedule_config.difficulty: expected "


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train_batch_size", "auto", f'train_batch_size: {WHOLE}"auto"'),
        ("train_batch_size", 1.5, f"train_batch_size: {WHOLE}1.5"),
        ("train_batch_size", True, f"train_batch_size: {WHOLE}true"),
        ("train_batch_size", 0, f"train_batch_size: {WHOLE}0"),
        ("train_batch_size", None, f"train_batch_size: {WHOLE}null"),
        ("gradient_clipping", -1, "gradient_clipping: expected a number, not negative, found -1"),
        ("gradient_clipping", 10**400, f"gradient_clipping: expected a number, not negative, found 1{'0' * 39}..."),
        ("gradient_clipping", False, "gradient_clipping: expected a number, not negative, found false"),
        ("steps_per_print", [[1], 2, 3, {}, "x"], f"steps_per_print: {WHOLE}[..., 2, 3, ..., ...]"),
        ("optimizer", "Adam", 'optimizer: expected an object, found "Adam"'),
        ("optimizer.type", MISSING, "optimizer.type: missing; expected a text"),
        ("optimizer.type", "Lamb", 'optimizer.type: expected Adam or AdamW, found "Lamb"'),
        ("optimizer.params.lr", "fast", 'optimizer.params.lr: expected a number, not negative, found "fast"'),
        ("optimizer.params.betas", [0.9], "optimizer.params.betas: expected two numbers, not negative, found [0.9]"),
        ("optimizer.params.betas", [0.9, "a\nb"], r'found [0.9, "a\nb"]'),
        ("fp16", True, "fp16: expected an object, found true"),
        ("fp16.enabled", MISSING, "fp16.enabled: missing; expected true or false"),
        ("fp16.enabled", "auto", 'fp16.enabled: expected true or false, found "auto"'),
        ("fp16.initial_scale_power", 128, "fp16.initial_scale_power: expected a whole number from 0 to 127, found 128"),
        ("bf16.enabled", 1, "bf16.enabled: expected true or false, found 1"),
        ("zero_optimization.stage", 4, "zero_optimization.stage: expected 0 or 1 or 2 or 3, found 4"),
        ("zero_optimization.stage", True, "zero_optimization.stage: expected 0 or 1 or 2 or 3, found true"),
        ("zero_optimization.stage", MISSING, "zero_optimization.stage: missing"),
        ("curriculum_learning", [], "curriculum_learning: expected an object, found []"),
        ("curriculum_learning.enabled", MISSING, "curriculum_learning.enabled: missing"),
        ("curriculum_learning.curriculum_type", "vocab", 'curriculum_type: expected seqlen, found "vocab"'),
        ("curriculum_learning.curriculum_type", MISSING, "curriculum_type: missing"),
        ("curriculum_learning.schedule_type", "custom", "expected fixed_linear or fixed_root or fixed_discrete, found"),
        ("curriculum_learning.schedule_type", "fixed_root", "schedule_config.root_degree: missing"),
        ("curriculum_learning.min_difficulty", MISSING, "curriculum_learning.min_difficulty: missing"),
        ("curriculum_learning.max_difficulty", "1K", f'max_difficulty: {WHOLE}"1K"'),
        ("curriculum_learning.schedule_config", MISSING, "schedule_config.total_curriculum_step: missing"),
        ("curriculum_learning.schedule_config", 3, "curriculum_learning.schedule_config: expected an object, found 3"),
        ("curriculum_learning.schedule_config.difficulty_step", 0, f"schedule_config.difficulty_step: {WHOLE}0"),
        ("curriculum_learning.min_difficulty", 12, "curriculum_learning: min_difficulty 12 must be a multiple of "
         "schedule_config.difficulty_step 8"),
        ("curriculum_learning.min_difficulty", 2048, "min_difficulty 2048 must not exceed max_difficulty 1024"),
        ("curriculum_learning.max_difficulty", 1020, "max_difficulty 1020 must be a multiple of"),
    ],
)  # fmt: skip
def test_bad_keys_are_named(path: Path, key: str, value: object, message: str) -> None:
    document = {
        "optimizer": {"type": "Adam", "params": {}},
        "fp16": {"enabled": True},
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 2},
        "curriculum_learning": LINEAR,
    }
    refused(path, document, key, value, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schedule_config.difficulty", 8, "schedule_config.difficulty: expected a list of positive whole numbers, fo"),
        ("schedule_config.difficulty", [8, 1.5, 1024], "a list of positive whole numbers, found [8, 1.5, 1024]"),
        ("schedule_config.difficulty", [8, 1024], f"{STAGES}one value more than in max_step, which has 2, found 2"),
        ("schedule_config.difficulty", [16, 24, 1024], f"{STAGES}the first to be min_difficulty 8 and the last "
         "max_difficulty 1024, found 16 and 1024"),
        ("schedule_config.difficulty", [8, 16, 512], "found 8 and 512"),
        ("schedule_config.difficulty", [8, 1024, 1024], f"{STAGES}only the last to be max_difficulty 1024"),
        ("schedule_config.difficulty", [], f"{STAGES}one value more"),
        ("schedule_config.max_step", MISSING, "schedule_config.max_step: missing"),
        ("schedule_config.max_step", [10, 5], "schedule_config 8:10,16:5,1024: the ends of the stages must rise"),
    ],
)  # fmt: skip
def test_bad_stages_are_named(path: Path, key: str, value: object, message: str) -> None:
    refused(path, {"curriculum_learning": DISCRETE}, f"curriculum_learning.{key}", value, message)


def refused(path: Path, document: dict[str, Any], key: str, value: object, message: str) -> None:
    """Check that `document` is read, and with `value` at `key` refused with a line that holds `message`."""
    parse("--deepspeed-config", write(path, document))
    document = block = copy.deepcopy(document)
    *blocks, name = key.split(".")
    for part in blocks:
        block = block[part]
    block[name] = value
    if value is MISSING:
        del block[name]
    with pytest.raises(UserError) as caught:
        parse("--deepspeed-config", write(path, document))
    said = str(caught.value)
    assert said.startswith(f"--deepspeed-config {path}: ") and message in said and "\n" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON: Expecting value: line 1 column 1"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"[1]", "expected an object {...}, found [1]"),
        (b'{"x": NaN}', "not valid JSON: NaN is no number of JSON"),
        (b'{"x": -Infinity}', "-Infinity is no number"),
        (b'{"gradient_clipping": 1e999}', "gradient_clipping: expected a number, not negative, found Infinity"),
        (b'{"fp16": {"x": 1, "x": 1}}', "x: is given twice; keep one"),
        (b'{"a\\nb": 1, "a\\nb": 1}', r'"a\nb": is given twice'),
        (b'{"x": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe{}", "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_json(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        parse("--deepspeed-config", path)
    said = str(caught.value)
    assert said.startswith(f"--deepspeed-config {path}: ") and message in said and "\n" not in said


def test_a_byte_order_mark_is_no_fault(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"steps_per_print": 3}')
    assert parse("--deepspeed-config", path).logging.log_interval == 3


def test_a_missing_file_and_one_in_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--deepspeed-config .*none\.json: no such file"):
        parse("--deepspeed-config", tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        parse("--deepspeed-config", tmp_path)
    with pytest.raises(UserError, match=r"argument --deepspeed-config.*: expected one argument"):
        parse("--deepspeed-config")
    recipe = tmp_path / "r.yaml"
    for name in ("deepspeed-config", "deepspeed_config"):
        recipe.write_text(f"{name}: {TUTORIAL}\n")
        with pytest.raises(UserError, match=f"r.yaml: {name}: a recipe cannot name one"):
            parse("--config", recipe)
