"""Fixtures that several test files share."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from megatron.tokenizer.training import TrainedTokenizer, train_bpe

# The same examples every time: a test run says something about the change at hand. To look for new ones:
# pytest --hypothesis-profile search
settings.register_profile("search", max_examples=5000, deadline=None)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# nohup and jobs in the background have these ignored, and every program that a test starts would ignore them too.
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Runs without `-m gpu` use no GPU, also where there is one, and so do the programs that they start."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real inputs that stand beside the repository on some machines; a test that asks for them skips elsewhere."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs ../shared/data")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TrainedTokenizer:
    """A BPE tokenizer of 400 tokens, trained on this repository's own sources."""
    sources = sorted(Path(__file__).resolve().parent.glob("test_*.py"))[:12]
    texts = (source.read_text(encoding="utf-8") for source in sources)
    return train_bpe(texts, 400, tmp_path_factory.mktemp("tokenizer"))
