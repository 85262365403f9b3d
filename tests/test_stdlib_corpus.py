"""The corpus of every Python: its library's own text, whatever else the process holds."""

import sys

from megatron.data.stdlib_corpus import stdlib_documents


def test_what_others_have_put_into_the_library_is_left_out(monkeypatch):
    def hook(*_: object) -> None:
        """A text of some forty characters or more that is nobody's but ours."""

    before = list(stdlib_documents())
    monkeypatch.setattr(sys, "excepthook", hook)
    assert list(stdlib_documents()) == before
    texts = {document["source"]: document["text"] for document in before}
    assert "exc_info" in texts["docstrings of sys"] and "def dumps(" in texts["json/__init__.py"]
    assert not any("test" in source.split("/") for source in texts)
