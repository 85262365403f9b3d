"""A GPT-2 of Hugging Face's that has learnt some texts by heart, and the slow obvious way to evaluate it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Encode = Callable[[str], list[int]]

WORDS = "river stone under the a of lantern whistle morning cold grey sailors walked told him never again home".split()


def made_up_texts(count: int, seed: int = 3) -> list[str]:
    """Passages of 5 to 20 words; the last word of some stands in them before, and some end with white space."""
    random = np.random.default_rng(seed)
    texts = [" ".join(random.choice(WORDS, random.integers(5, 20))) for _ in range(count)]
    return [text + (".\n" if number % 4 == 0 else "") for number, text in enumerate(texts)]


def write_lambada(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def small_gpt2(vocab_size: int, positions: int, hidden: int = 32) -> Any:
    """A random GPT2LMHeadModel; its embeddings are large, so that its predictions differ."""
    import transformers

    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=positions, n_embd=hidden, n_layer=2, n_head=2, initializer_range=0.15,
        bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def learn(model: Any, ids: Sequence[list[int]], targets: int, steps: int) -> None:
    """Train until the last `targets` tokens of each text are known by heart; other texts are none the better for it."""
    width = max(map(len, ids))
    inputs = torch.tensor([[*text, *[0] * (width - len(text))] for text in ids])
    rows = torch.tensor([[len(text) - 1 - back for back in range(targets, 0, -1)] for text in ids])
    labels = inputs.gather(1, rows + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        hidden = model.transformer(inputs).last_hidden_state
        chosen = hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))
        F.cross_entropy(model.lm_head(chosen).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def save_hugging_face(model: Any, directory: Path, vocab_file: Path, merge_file: Path) -> Path:
    """The directory that Hugging Face has of a model and its tokenizer."""
    model.save_pretrained(directory)
    shutil.copy(vocab_file, directory / "vocab.json")
    shutil.copy(merge_file, directory / "merges.txt")
    return directory


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def obvious_wikitext(model: Any, text: str, words: int, encode: Encode, seq_length: int, stride: int) -> float:
    """Adjusted perplexity by Megatron's data set, padding and all: one window at a time, every logit."""
    ids = encode(text)
    windows = max(math.ceil(max(len(ids) - 1 - stride, 0) / stride) + 1, 1)
    total = 0.0
    for number in range(windows):
        piece = ids[number * stride : number * stride + seq_length + 1]
        counts = [True] * len(piece) + [False] * (seq_length + 1 - len(piece))
        piece = piece + [0] * (seq_length + 1 - len(piece))
        counts = counts[1:]
        if stride != seq_length and number > 0:
            counts[:-stride] = [False] * (seq_length - stride)
        if not any(counts):
            continue
        every = logits(model, piece[:-1])
        for row in range(seq_length):
            if counts[row]:
                total -= float(every[row].double().log_softmax(-1)[piece[row + 1]])
    tokens = len(ids)
    return math.exp(total / (tokens - 1) * ((tokens - 1) / (words - 1)))


def obvious_lambada(model: Any, texts: Sequence[str], encode: Encode, *, strict: bool) -> list[bool]:
    """Whether each text's last word, or last token, is what the model would have written."""
    right = []
    for text in texts:
        if strict:
            word = text.split()[-1]
            context, labels = encode(text[: text.rfind(word)].strip()), encode(" " + word)
        else:
            *context, label = encode(text)
            labels = [label]
        guesses = logits(model, (context + labels)[:-1])[-len(labels) :].argmax(-1)
        right.append(guesses.tolist() == labels)
    return right
