"""GPT pre-training with sequence length warmup."""

__version__ = "0.1.0"
