"""SLW under Hugging Face's Trainer: lengths against the formula, updates against a plain loop, resumes to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import (
    BatchSizeWarmupConfig,
    Config,
    EvaluationConfig,
    LearningRateConfig,
    ModelConfig,
    SeqlenWarmupConfig,
    TrainingConfig,
)
from megatron.errors import UserError
from megatron.pacing import plan_run, walk

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
pytest.importorskip("accelerate", reason="needs the extra 'hf'")

from megatron.huggingface_trainer import SeqlenWarmupTrainer, truncate  # noqa: E402 # needs the extra

SEQ_LENGTH, SAMPLES, LR = 32, 42, 0.01
"""42 samples: an epoch is 7 steps of 6."""
LINEAR = SeqlenWarmupConfig(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=8)
CONFIG = Config(
    model=ModelConfig(seq_length=SEQ_LENGTH),
    seqlen_warmup=LINEAR,
    training=TrainingConfig(train_tokens=1400, global_batch_size=6),
    learning_rate=LearningRateConfig(lr=LR, lr_warmup_iters=3),
)
LENGTHS = [(8 + 24 * min(t, 8) // 8) // 8 * 8 for t in range(1, 12)]
"""By the paper's formula, to the step that reaches 1,400 tokens."""


def samples(count: int = SAMPLES, length: int = SEQ_LENGTH) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(32, (count, length), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in tokens]


def model(dropout: float = 0.1) -> Any:
    transformers.set_seed(1)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    found = transformers.GPT2LMHeadModel(config)
    found.loss_type = "ForCausalLM"
    return found


class Trainer(SeqlenWarmupTrainer):
    """Keeps what the model was given."""

    def __init__(self, directory: Path, config: Config = CONFIG, accumulation: int = 1, **changes: Any) -> None:
        own = {name: changes.pop(name) for name in ("schedule_lr", "optimizers", "data_collator") if name in changes}
        data, network = changes.pop("train_dataset", None) or samples(), model(changes.pop("dropout", 0.1))
        settings = {
            "per_device_train_batch_size": 6 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 100,
            "learning_rate": LR,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "dataloader_pin_memory": False,
        }
        arguments = transformers.TrainingArguments(str(directory), **(settings | changes))
        super().__init__(network, arguments, train_dataset=data, eval_dataset=samples(5), config=config, **own)
        self.seen: list[tuple[bool, dict[str, torch.Tensor]]] = []
        network.register_forward_pre_hook(
            lambda module, _, inputs: self.seen.append((module.training, inputs)), with_kwargs=True
        )

    def shapes(self, *, training: bool) -> list[set[tuple[int, ...]]]:
        """Of each forward pass, the shapes of its tensors."""
        return [
            {tuple(inputs[key].shape) for key in ("input_ids", "labels", "attention_mask")}
            for was_training, inputs in self.seen
            if was_training == training
        ]

    def logged(self, *names: str) -> list[tuple[Any, ...]]:
        """These columns of the training log."""
        return [tuple(entry[name] for name in names) for entry in self.state.log_history if "loss" in entry]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_lengths_are_those_of_the_plan(accumulation: int, workers: int, tmp_path: Path):
    extra = {"dataloader_prefetch_factor": 4} if workers else {}
    trainer = Trainer(
        tmp_path, accumulation=accumulation, dataloader_num_workers=workers,
        eval_strategy="steps", eval_steps=4, per_device_eval_batch_size=5, **extra,
    )  # fmt: skip
    trainer.train()
    assert [step.seqlen for _, step in walk(CONFIG)] == LENGTHS  # the planner agrees with the formula above
    rows = 6 // accumulation
    assert trainer.shapes(training=True) == [{(rows, s)} for s in LENGTHS for _ in range(accumulation)]
    assert trainer.shapes(training=False) == [{(5, SEQ_LENGTH)}] * 3  # steps 4, 8 and the last
    tokens = [6 * sum(LENGTHS[:t]) for t in range(1, 12)]
    assert trainer.logged("seqlen", "consumed_tokens", "consumed_samples") == [
        (s, total, 6 * t) for t, (s, total) in enumerate(zip(LENGTHS, tokens, strict=True), start=1)
    ]
    heads = {s: {tuple(sample["input_ids"][:s].tolist()) for sample in samples()} for s in set(LENGTHS)}
    assert all(tuple(row.tolist()) in heads[len(row)] for training, seen in trainer.seen if training
               for row in seen["input_ids"])  # fmt: skip


@pytest.mark.parametrize("accumulation", [1, 3])
def test_updates_are_those_of_a_plain_loop(accumulation: int, tmp_path: Path):
    """Plain gradient descent, its loss the mean over the predictions of the whole step, at the planned rates."""
    data = [sample | {"labels": torch.where(sample["labels"] == 3, -100, sample["labels"])} for sample in samples()]
    trainer = Trainer(
        tmp_path, accumulation=accumulation, schedule_lr=True, optim="sgd", max_grad_norm=0.0, train_dataset=data,
        dropout=0.0,
    )  # fmt: skip
    reference = model(dropout=0.0)
    trainer.train()
    passes = [inputs for _, inputs in trainer.seen]
    for t, (_, step) in enumerate(walk(CONFIG)):
        batch = passes[t * accumulation : (t + 1) * accumulation]
        tokens, labels = (torch.cat([part[key] for part in batch]) for key in ("input_ids", "labels"))
        logits = reference(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(reference.parameters(), gradients, strict=True):
                parameter.sub_(step.lr * gradient)
        assert trainer.logged("loss")[t][0] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule_lr", [False, True])
def test_a_resume_equals_an_uninterrupted_run(schedule_lr: bool, tmp_path: Path):
    """At step 5 of the warmup, in an epoch whose last step has fewer samples, and at a step of another epoch."""
    settings: dict[str, Any] = {
        "accumulation": 3, "schedule_lr": schedule_lr, "train_dataset": samples(37), "dataloader_num_workers": 2,
        "save_strategy": "steps", "save_steps": 5,
    }  # fmt: skip
    straight = Trainer(tmp_path / "straight", **settings)
    straight.train()
    lengths = [found for (found,) in straight.logged("seqlen")]
    assert lengths == [(8 + 24 * min(t, 8) // 8) // 8 * 8 for t in range(1, len(lengths) + 1)]
    assert straight.progress.consumed_tokens == sum(seen["input_ids"].numel() for on, seen in straight.seen if on)
    assert straight.progress.consumed_samples % 6 != 0  # some steps were smaller
    for step in (5, 10):
        resumed = Trainer(tmp_path / "resumed", **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"straight/checkpoint-{step}"))
        columns = ("loss", "grad_norm", "learning_rate", "seqlen", "consumed_tokens", "consumed_samples")
        assert resumed.logged(*columns) == straight.logged(*columns)
        assert resumed.shapes(training=True) == straight.shapes(training=True)[-len(resumed.seen) :]
        assert resumed.progress == straight.progress
        for name, parameter in straight.model.named_parameters():
            assert torch.equal(resumed.model.get_parameter(name), parameter), name


def test_learning_rates_are_those_of_the_plan(tmp_path: Path):
    trainer = Trainer(tmp_path, schedule_lr=True, weight_decay=0.1)
    trainer.train()
    assert [lr for (lr,) in trainer.logged("learning_rate")] == pytest.approx([s.lr for _, s in walk(CONFIG)])
    trainer.train()  # once more, from the start
    assert [lr for (lr,) in trainer.logged("learning_rate")] == pytest.approx([s.lr for _, s in walk(CONFIG)])


def test_without_schedule_lr_the_rate_is_trainers_own(tmp_path: Path):
    trainer = Trainer(tmp_path, lr_scheduler_type="linear", max_steps=11)
    trainer.train()
    assert [lr for (lr,) in trainer.logged("learning_rate")] == pytest.approx([LR * (11 - t) / 11 for t in range(11)])


def test_the_run_ends_by_tokens_is_saved_there_and_stays_ended(tmp_path: Path):
    settings = {"save_strategy": "steps", "save_steps": 100, "eval_strategy": "steps", "eval_steps": 100}
    trainer = Trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == plan_run(CONFIG).progress.iteration == 11
    assert trainer.progress == plan_run(CONFIG).progress
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [11]
    again = Trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.seen == [] and again.progress == trainer.progress


def test_it_adds_to_other_trainers(tmp_path: Path):
    class Other(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.asked = True
            return super().compute_loss(*args, **kwargs)

    class Both(Trainer, Other):
        pass

    trainer = Both(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.asked and trainer.shapes(training=True) == [{(6, 8)}]


def test_a_checkpoint_without_warmup_is_refused(tmp_path: Path):
    plain = Trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    plain.train()
    state = tmp_path / "checkpoint-2/trainer_state.json"
    state.write_text(state.read_text().replace('"iteration": 2', '"iteration": 1'))
    with pytest.raises(UserError, match="checkpoint is at step 2, of which 1 were made with sequence length warmup"):
        Trainer(tmp_path).train(resume_from_checkpoint=True)


def test_truncate_cuts_what_has_a_value_for_each_token():
    tokens = torch.arange(24).view(2, 12)
    batch = {"input_ids": tokens, "position_ids": tokens + 1, "labels": torch.ones(2), "names": ["a", "b"]}
    cut = truncate(batch, 8, 16)
    assert torch.equal(cut["input_ids"], tokens[:, :8]) and torch.equal(cut["position_ids"], tokens[:, :8] + 1)
    assert cut["labels"] is batch["labels"] and cut["names"] == ["a", "b"]
    assert torch.equal(batch["input_ids"], torch.arange(24).view(2, 12))
    assert torch.equal(truncate(batch, 16, 16)["input_ids"], tokens)  # padded to less than the step's length


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"input_ids": torch.zeros(2, 20)}, "samples of 20 tokens, seq_length of the configuration is 16"),
        ({"cu_seq_lens_q": torch.zeros(3)}, "cu_seq_lens_q"),
        ({"attention_mask": torch.ones(2, 1, 12, 12)}, r"'attention_mask' of shape \[2, 1, 12, 12\]"),
        ({"scores": torch.ones(2, 12)}, r"'scores' of shape \[2, 12\].* drop it in the collator"),
        ({"labels": torch.ones(2, 9)}, r"'labels' of shape \[2, 9\] beside samples of 12 tokens"),
    ],
)
def test_truncate_refuses_what_it_cannot_cut(extra: dict[str, torch.Tensor], message: str):
    with pytest.raises(UserError, match=message):
        truncate({"input_ids": torch.zeros(2, 12)} | extra, 8, 16)


ADAPTIVE = SeqlenWarmupConfig(seqlen_warmup="adaptive")
SGD = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=LR)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"seqlen_warmup": ADAPTIVE, "evaluation": EvaluationConfig(eval_interval=2)}, {}, "seqlen_warmup adaptive"),
        ({"seqlen_warmup": replace(LINEAR, seqlen_realisation="reshape")}, {}, "seqlen_realisation reshape"),
        (
            {"batch_size_warmup": BatchSizeWarmupConfig("linear", 2, batch_size_warmup_iters=4)},
            {},
            "batch_size_warmup linear",
        ),
        ({}, {"auto_find_batch_size": True}, "auto_find_batch_size"),
        (
            {},
            {"per_device_train_batch_size": 4},
            r"is 6, the training arguments make it 4 \(per_device.* 4.* 1, 1 ranks",
        ),
        ({}, {"learning_rate": 0.02, "schedule_lr": True}, "is 0.01, learning_rate of the training arguments 0.02"),
        (
            {},
            {"schedule_lr": True, "optimizers": (SGD, torch.optim.lr_scheduler.ConstantLR(SGD))},
            "exclude each other",
        ),
    ],
)
def test_what_trainer_cannot_do_is_refused(
    config: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(UserError, match=message):
        Trainer(tmp_path, replace(CONFIG, **config), **settings)


RANKS = """
import os, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from test_huggingface_trainer import Trainer
trainer = Trainer(Path(sys.argv[1]), per_device_train_batch_size=3, ddp_backend="gloo")
trainer.train()
assert trainer.progress.consumed_tokens == 1440 and trainer.progress.consumed_samples == 66, trainer.progress
assert [shape for shapes in trainer.shapes(training=True) for shape in shapes][:2] == [(3, 8), (3, 8)]
torch.distributed.barrier()
os._exit(0)  # at its usual end a rank of Trainer's own dies of SIGABRT now and then, after all is done
"""


@pytest.mark.slow
def test_tokens_of_all_ranks_are_counted(tmp_path: Path):
    """Two ranks of 3 samples are the run of one rank of 6."""
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(program), str(tmp_path / "run"), str(tests)],
        env={**os.environ, "PYTHONPATH": str(tests.parent), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
