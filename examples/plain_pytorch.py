"""Sequence length warmup in a plain PyTorch loop: python examples/plain_pytorch.py [TEXT]

The model is a tiny one of bytes; without TEXT it reads this repository's documentation. The warmup is what uses `step`.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from megatron.config import Config, LearningRateConfig, ModelConfig, SeqlenWarmupConfig, TrainingConfig
from megatron.pacing import Progress, Schedules

CONFIG = Config(
    model=ModelConfig(seq_length=128),
    seqlen_warmup=SeqlenWarmupConfig(seqlen_warmup="linear", seqlen_start=8, seqlen_warmup_iters=40),
    training=TrainingConfig(train_tokens=120_000, global_batch_size=16),
    learning_rate=LearningRateConfig(lr=3e-3, lr_warmup_iters=10),  # then a cosine over train_tokens
)
SEQ_LENGTH = CONFIG.model.seq_length


class ByteModel(nn.Module):
    """A causal Transformer over bytes: [batch, s] int64, s <= SEQ_LENGTH, -> logits [batch, s, 256]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(256, width), nn.Embedding(SEQ_LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        seqlen = tokens.shape[1]
        hidden = self.words(tokens) + self.positions.weight[:seqlen]
        return self.head(self.blocks(hidden, nn.Transformer.generate_square_subsequent_mask(seqlen), is_causal=True))


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    files = [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(root.glob("docs/*.md"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    if len(text) < 32 * SEQ_LENGTH + 1:
        sys.exit(f"error: {files[0]}: expected {32 * SEQ_LENGTH + 1:,} bytes or more, found {len(text):,}")
    windows = text.unfold(0, SEQ_LENGTH + 1, SEQ_LENGTH)  # a token more than the length: inputs, and what follows each
    training, validation = windows[16:], windows[:16]

    torch.manual_seed(1234)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters())
    schedules, progress = Schedules(CONFIG), Progress()
    while not schedules.finished(progress):
        step = schedules.plan(progress)
        samples = training[torch.randint(len(training), (step.global_batch_size,))]
        samples = samples[:, : step.seqlen + 1]  # the head of each is trained on, the tail is dropped
        loss = cross_entropy(model(samples[:, :-1]).flatten(0, 1), samples[:, 1:].flatten())
        for group in optimizer.param_groups:
            group["lr"] = step.lr
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedules.advance(progress, step)  # counts the tokens trained on, by which the learning rate decays
        if progress.iteration % 10 == 0 or schedules.finished(progress):
            print(f"step {progress.iteration:4} tokens {progress.consumed_tokens:7,} seqlen {step.seqlen:4} "
                  f"lr {step.lr:.2e} loss {loss.item():.3f}")  # fmt: skip

    with torch.no_grad():
        loss = cross_entropy(model(validation[:, :-1]).flatten(0, 1), validation[:, 1:].flatten())
    print(f"validation loss at the full length of {SEQ_LENGTH}: {loss.item():.3f}")


if __name__ == "__main__":
    main()
