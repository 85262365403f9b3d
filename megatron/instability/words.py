"""The words of a report, explained for a reader who meets them there for the first time."""

from __future__ import annotations

WORDS: tuple[tuple[str, str], ...] = (
    (
        "SLW, length",
        "Sequence length warmup: training begins on short sequences (pieces of text) and lengthens them step by step "
        "up to the full length. The length of a step is that of its sequences.",
    ),
    ("baseline", "A run without the warmup, at full length from the first step; the first run is taken for it."),
    (
        "token",
        "What the model reads and predicts: a word, or a piece of one. Lengths and amounts of text count tokens.",
    ),
    (
        "step, batch",
        "A step is one update of the model's weights. The batch is the number of sequences it learns from; batch times "
        "length is the tokens of a step.",
    ),
    (
        "loss",
        "How badly the model predicted the next token, averaged over tokens: the cross entropy, in nats. Lower is "
        "better; the logarithm of the vocabulary's size is blind guessing.",
    ),
    (
        "perplexity",
        "e to the power of the loss: among how many tokens, equally likely, the model in effect still wavers. Lower is "
        "better.",
    ),
    (
        "training, validation, test",
        "Three parts of the data. The model learns from the first only. Validation measures it on the second from time "
        "to time, always at full length, so that runs can be compared; the test part is measured once, at the end.",
    ),
    (
        "seed",
        "The number that the random initial weights and the order of the text follow from. Runs that differ in nothing "
        "else still end at different losses.",
    ),
    (
        "loss ratio",
        "The loss of a step over the lowest loss of all steps before it. 1 or less: as good as ever. 1.2: a fifth "
        "worse than it has been, the threshold that the paper counts by: its runs with many such steps ended with a "
        "worse model. A spike may also grow until the run is lost. Where a step has only a few hundred tokens, chance "
        "alone moves the ratio a good way.",
    ),
    (
        "same positions (position-matched)",
        "Late tokens of a sequence are easier, as more text stands before them, so that the loss falls by itself where "
        "the length grows, and the plain ratio hides spikes. This one compares only losses at the same places.",
    ),
    (
        "smoothed",
        "The ratio of a moving average of the loss. A single unlucky step hardly shows in it, a spike that lasts does.",
    ),
    ("spike", "A step, or a few, whose loss jumps up."),
    (
        "learning rate",
        "How far a step moves the weights. It rises at the beginning and falls afterwards. High rates learn faster "
        "and are less stable.",
    ),
    (
        "momentum, variance",
        "What the optimizer (Adam) remembers of each weight: moving averages of its gradient, m, and of the gradient's "
        "square, v. √v is the usual size of the gradient, and is called variance here, as in the paper. Jumps of it go "
        "with unstable training.",
    ),
    (
        "l1 norm, largest element",
        "Two ways to sum up such a value over all weights: the sum of its absolute values, ‖·‖₁, and the largest one.",
    ),
    (
        "r, p",
        "r says how well two series follow a straight line together: 0 not at all, 1 exactly, -1 exactly but one falls "
        "as the other rises. p is the chance to see that much by accident; from 0.05 on it is no finding.",
    ),
    ("clipped steps", "Their gradient was longer than a limit (--clip-grad) and was shortened to it."),
    ("skipped steps", "They changed nothing, as their gradient overflowed or was not finite."),
    ("non-finite steps", "Their loss was infinite or not a number. A run that ends in that has diverged."),
    (
        "training time, wall time",
        "Training time is that of the steps alone, wall time also that of validation, saving and starting.",
    ),
)
"""Term and explanation, in the order of reading."""
