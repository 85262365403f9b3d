"""Tokenizers: equality with Hugging Face's, round trips, broken definitions."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config import ModelConfig, TokenizerConfig
from megatron.errors import UserError
from megatron.tokenizer.build import add_tokenizer_flags, build_tokenizer, named_tokenizer, tokenizer_config
from megatron.tokenizer.gpt2_bpe import GPT2BPETokenizer, byte_alphabet, safe_pieces
from megatron.tokenizer.huggingface import HFTokenizer
from megatron.tokenizer.training import TrainedTokenizer, train_bpe

WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
NEARLY_WHITE = "\x1c\x1d\x1e\x1f\u180e\u200b\u2060\ufeff"
ODD = [
    "",
    " ",
    "\n",
    "\n\n\n",
    "  \n\t x",
    "a  b   c    ",
    "<|endoftext|>",
    "a<|endoftext|>b<|endoftext|>",
    "don't we'll they've I'm he'd it's you're 'S 'LL ' s",
    "\x00\x01\x7f\x80",
    "e\u0301 \u00e9 \u1e9b\u0323 \ufb01",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea",
    "\ufffe\uffff\U0010ffff\ue000",
    "\u0661\u0662\u0663 \u216b \u00bd 1234567890 ten10",
    "\u4f60\u597d\uff0c\u4e16\u754c \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0645\u0631\u062d\u0628\u0627",
    "\ufeffwith a byte order mark",
    "\r\n\r\n",
    WHITE_SPACE,
    *(f"a{c}{c}b {c} {c}1 !{c}" for c in WHITE_SPACE + NEARLY_WHITE),
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(st.sampled_from(list(WHITE_SPACE + NEARLY_WHITE + "ab1'!s<|>"))),
)


def hugging_face(vocab_file: Path, merge_file: Path):
    """Hugging Face's GPT2Tokenizer, told to take `<|endoftext|>` in a text as text."""
    transformers = pytest.importorskip("transformers")
    vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
    lines = merge_file.read_text(encoding="utf-8").split("\n")[1:-1]
    tokenizer = transformers.GPT2Tokenizer(vocab=vocab, merges=[tuple(line.split(" ")) for line in lines])
    return lambda text: tokenizer(text, split_special_tokens=True)["input_ids"]


@pytest.fixture(scope="session")
def gpt2_files(shared_data: Path) -> tuple[Path, Path]:
    return shared_data / "gpt2-vocab.json", shared_data / "gpt2-merges.txt"


@pytest.fixture(scope="session")
def gpt2(gpt2_files):
    return GPT2BPETokenizer(*gpt2_files), hugging_face(*gpt2_files)


@pytest.fixture(scope="session")
def tiny(tiny_tokenizer: TrainedTokenizer):
    files = (tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file)
    return GPT2BPETokenizer(*files), HFTokenizer(tiny_tokenizer.tokenizer_file), hugging_face(*files)


class TestGPT2:
    def test_known_ids(self, gpt2):
        tokenizer, _ = gpt2
        assert tokenizer.encode("Hello world") == [15496, 995]
        assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]
        assert (tokenizer.vocab_size, tokenizer.eod) == (50257, 50256)
        assert tokenizer.decode([15496, 995, 50256]) == "Hello world<|endoftext|>"

    @pytest.mark.parametrize("text", ODD)
    def test_equals_hugging_face_on_oddities(self, gpt2, text):
        tokenizer, reference = gpt2
        assert tokenizer.encode(text) == reference(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @settings(max_examples=300, deadline=None)
    @given(text=texts)
    def test_equals_hugging_face(self, gpt2, text):
        tokenizer, reference = gpt2
        assert tokenizer.encode(text) == reference(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_equals_hugging_face_on_every_seventeenth_character(self, gpt2):
        tokenizer, reference = gpt2
        points = [point for point in range(0, 0x110000, 17) if not 0xD800 <= point < 0xE000]
        for start in range(0, len(points), 500):
            text = "".join(f"a{c}{c}b {c} {c}1 !{c}" for c in map(chr, points[start : start + 500]))
            assert tokenizer.encode(text) == reference(text)

    def test_equals_hugging_face_on_real_text(self, gpt2, shared_data):
        tokenizer, reference = gpt2
        text = (shared_data / "wiki.valid.tokens").read_text(encoding="utf-8")[:300_000]
        assert tokenizer.encode(text) == reference(text)


class TestTrained:
    def test_same_ids_from_both_forms(self, tiny):
        ours, theirs, reference = tiny
        for text in [*ODD, Path(__file__).read_text(encoding="utf-8")]:
            assert ours.encode(text) == theirs.encode(text) == reference(text)
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
        assert (ours.vocab_size, ours.eod) == (theirs.vocab_size, theirs.eod) == (400, 399)

    @settings(max_examples=200, deadline=None)
    @given(text=texts)
    def test_same_ids_from_both_forms_on_any_text(self, tiny, text):
        ours, theirs, reference = tiny
        assert ours.encode(text) == theirs.encode(text) == reference(text)
        assert theirs.decode(theirs.encode(text)) == text

    def test_ids_out_of_the_order_of_the_merges(self, tiny, tiny_tokenizer, tmp_path):
        vocab = json.loads(tiny_tokenizer.vocab_file.read_text(encoding="utf-8"))
        turned = {token: len(vocab) - 1 - index for token, index in vocab.items()}
        path = tmp_path / "vocab.json"
        path.write_text(json.dumps(turned), encoding="utf-8")
        tokenizer = GPT2BPETokenizer(path, tiny_tokenizer.merge_file)
        text = Path(__file__).read_text(encoding="utf-8")
        assert tokenizer.encode(text) == hugging_face(path, tiny_tokenizer.merge_file)(text)
        assert tokenizer.encode(text) == [399 - index for index in tiny[0].encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.fingerprint != tiny[0].fingerprint

    def test_training_is_deterministic_and_leaves_no_temporary_file(self, tmp_path):
        text = "the cat sat on the mat, the rat ran at the cat " * 20
        written = [train_bpe(iter([text]), 270, tmp_path / name) for name in "ab"]
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert len(list((tmp_path / "a").iterdir())) == 3
        assert written[0].vocab_size == 270
        assert HFTokenizer(written[0].tokenizer_file).decode(range(270)).endswith("<|endoftext|>")

    def test_says_when_the_text_has_too_few_pairs(self, tmp_path):
        assert train_bpe(iter(["aaaa aaaa"]), 1000, tmp_path).vocab_size < 270

    def test_a_negative_frequency_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="--min-frequency must not be negative, found -5"):
            train_bpe(iter(["a"]), 300, tmp_path, min_frequency=-5)

    @pytest.mark.parametrize(("texts", "size", "match"), [([], 300, "no text"), (["a"], 256, "--vocab-size.*257")])
    def test_refused(self, tmp_path, texts, size, match):
        with pytest.raises(UserError, match=match):
            train_bpe(iter(texts), size, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_same_in_another_process(tiny):
    """As it is sent to worker processes."""
    for tokenizer in tiny[:2]:
        copy = pickle.loads(pickle.dumps(tokenizer))
        for text in ODD:
            assert copy.encode(text) == tokenizer.encode(text)
        assert copy.decode(range(400)) == tokenizer.decode(range(400))
        assert (copy.fingerprint, copy.eod, copy.name) == (tokenizer.fingerprint, tokenizer.eod, tokenizer.name)


class TestLongTexts:
    @settings(max_examples=300, deadline=None)
    @given(text=texts, limit=st.integers(1, 12))
    def test_pieces_have_the_tokens_of_the_whole(self, tiny, text, limit):
        tokenizer = tiny[0]
        pieces = list(safe_pieces(text, limit))
        assert "".join(pieces) == text
        assert [index for piece in pieces for index in tokenizer.encode(piece)] == tokenizer.encode(text)

    def test_two_million_spaces_before_a_word(self, tiny):
        text = "a" + " \n" * 1_000_000 + " b"
        assert tiny[0].decode(tiny[0].encode(text)) == text

    def test_array_and_list(self, tiny):
        text = "some words " * 100_000
        array = tiny[0].encode_array(text)
        assert array.dtype == np.int32 and array.tolist() == tiny[0].encode(text)
        assert tiny[0].encode_array("").shape == (0,)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "\udc00\ud800"])
def test_lone_surrogates_are_refused(tiny, text):
    for tokenizer in tiny[:2]:
        with pytest.raises(UserError, match="lone surrogate U\\+D"):
            tokenizer.encode(text)


@pytest.mark.parametrize("ids", [[-1], [400], [3, 10**6]])
def test_decoding_an_unknown_id(tiny, ids):
    for tokenizer in tiny[:2]:
        with pytest.raises(UserError, match=f"token id {ids[-1]} is not in the vocabulary of 400"):
            tokenizer.decode(ids)


def test_cut_characters_become_replacements(tiny):
    for tokenizer in tiny[:2]:
        ids = tokenizer.encode("\U0001f600")
        assert tokenizer.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize(("size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304), (8192, 8192)])
def test_padded_vocab_size(size, padded):
    assert ModelConfig().padded_vocab_size(size) == padded


def definition(
    tmp_path: Path, merges: str, drop: tuple[str, ...] = (), extra: dict | None = None, newline: str = "\n"
) -> tuple[Path, Path]:
    """A vocabulary of the bytes, the products of `merges` and <|endoftext|>, less `drop`."""
    products = ["".join(line.split(" ")) for line in merges.split("\n") if line.count(" ") == 1]
    tokens = dict.fromkeys([*byte_alphabet(), *products, "<|endoftext|>"])
    vocab = {token: index for index, token in enumerate(token for token in tokens if token not in drop)} | (extra or {})
    vocab_file, merge_file = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab_file.write_text(json.dumps(vocab), encoding="utf-8")
    merge_file.write_text("#version: 0.2\n" + merges, encoding="utf-8", newline=newline)
    return vocab_file, merge_file


class TestBrokenDefinitions:
    @pytest.mark.parametrize(
        ("merges", "drop", "extra", "match"),
        [
            ("a b\nab c\n", ("abc",), None, r"merges\.txt:3: makes 'abc', which is not in --vocab-file .*vocab\.json"),
            ("a b\nx\n", (), None, r"merges\.txt:3: expected two tokens"),
            ("a  b\n", (), None, r"merges\.txt:2: expected two tokens"),
            ("bc d\nb c\n", (), None, r"merges\.txt:2: joins 'bc', which is neither one byte nor made by a line above"),
            ("a b\na b\n", (), None, r"merges\.txt:3: makes 'ab' a second time, after line 2"),
            ("a b\nb c\nbc d\na bcd\nab cd\n", (), None, r"merges\.txt:6: joins 'cd'"),
            ("b c\na b\nab c\n", (), None, r"merges\.txt:4: makes 'abc', but the merges above it lead elsewhere"),
            ("a b\n", ("<|endoftext|>",), None, r"vocab\.json: has no token '<\|endoftext\|>'"),
            ("a b\n", ("q",), None, r"vocab\.json: has no token 'q' for the byte 0x71"),
            ("a b\n", (), {"zz": 0}, r"vocab\.json: .* have the same id 0"),
            ("a b\n", (), {"zz": -1}, r"vocab\.json: the id of 'zz' must be an integer from 0"),
            ("a b\n", (), {"zz": "1"}, r"vocab\.json: the id of 'zz' must be an integer"),
        ],
    )
    def test_refused(self, tmp_path, merges, drop, extra, match):
        with pytest.raises(UserError, match=match):
            GPT2BPETokenizer(*definition(tmp_path, merges, drop, extra))

    def test_windows_line_ends_and_merges_of_the_comment_sign(self, tmp_path):
        tokenizer = GPT2BPETokenizer(*definition(tmp_path, "# #\na b\n", newline="\r\n"))
        assert tokenizer.decode(tokenizer.encode("## ab")) == "## ab" and len(tokenizer.encode("##ab")) == 2

    @pytest.mark.parametrize(
        ("content", "match"), [(b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[]", "expected a JSON object")]
    )
    def test_broken_vocab(self, tmp_path, content, match):
        vocab_file, merge_file = definition(tmp_path, "a b\n")
        vocab_file.write_bytes(content)
        with pytest.raises(UserError, match=rf"--vocab-file .*vocab\.json: .*{match}"):
            GPT2BPETokenizer(vocab_file, merge_file)

    def test_merges_that_are_no_text(self, tmp_path):
        vocab_file, merge_file = definition(tmp_path, "a b\n")
        merge_file.write_bytes(b"#version: 0.2\na b\n\xff c\n")
        with pytest.raises(UserError, match=r"--merge-file .*merges\.txt:3: is not UTF-8"):
            GPT2BPETokenizer(vocab_file, merge_file)

    @pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"model": {"type": "Nothing"}}'])
    def test_broken_tokenizer_file(self, tmp_path, content):
        path = tmp_path / "tokenizer.json"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"--tokenizer-file .*tokenizer\.json: is not a tokenizer\.json"):
            HFTokenizer(path)


class TestBuild:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (("GPT2BPETokenizer",), "--vocab-file is not given"),
            (("GPT2BPETokenizer", "v.json"), "--merge-file is not given"),
            (("GPT2BPETokenizer", "v.json", "m.txt", "t.json"), "--tokenizer-file is for --tokenizer-type HFTokenizer"),
            (("GPT2BPETokenizer", "v.json", "m.txt"), r"--vocab-file v\.json: cannot be read \(No such file"),
            (("HFTokenizer",), "needs --tokenizer-file"),
            (("HFTokenizer", "v.json"), "--vocab-file is for --tokenizer-type GPT2BPETokenizer"),
            (("HFTokenizer", None, None, "t.json"), r"--tokenizer-file t\.json: cannot be read"),
            (("GPT2BPETokeniser",), "did you mean GPT2BPETokenizer"),
        ],
    )
    def test_refused(self, arguments, match, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=match):
            build_tokenizer(*arguments)

    def test_another_end_of_document(self, tiny_tokenizer):
        file = tiny_tokenizer.tokenizer_file
        assert build_tokenizer("HFTokenizer", tokenizer_file=file, eod_token="a").eod != 399
        with pytest.raises(UserError, match=r"has no token '</s>'.*--eod-token"):
            build_tokenizer("HFTokenizer", tokenizer_file=file, eod_token="</s>")
        both = tiny_tokenizer.vocab_file, tiny_tokenizer.merge_file
        with pytest.raises(UserError, match=r"vocab\.json: has no token '</s>'.*--eod-token"):
            build_tokenizer("GPT2BPETokenizer", *both, eod_token="</s>")

    def test_flags_of_a_tool(self, tiny_tokenizer):
        parser = argparse.ArgumentParser()
        add_tokenizer_flags(parser)
        assert tokenizer_config(parser.parse_args([])) == TokenizerConfig()
        files = ["--vocab-file", str(tiny_tokenizer.vocab_file), "--merge-file", str(tiny_tokenizer.merge_file)]
        tokenizer = named_tokenizer(tokenizer_config(parser.parse_args([*files, "--eod-token", "a"])))
        assert (
            tokenizer is not None and tokenizer.eod == build_tokenizer("GPT2BPETokenizer", *files[1::2]).encode("a")[0]
        )

    @pytest.mark.parametrize(
        ("words", "match"),
        [
            ("--tokenizer-type HFTokenizer", r"--tokenizer-type HFTokenizer needs --tokenizer-file"),
            (
                "--tokenizer-type GPT2BPETokenizer",
                r"--tokenizer-type GPT2BPETokenizer needs --vocab-file .* is not given",
            ),
            (
                "--tokenizer-file t.json --tokenizer-type GPT2BPETokenizer",
                r"--tokenizer-file is for --tokenizer-type HF",
            ),
            ("--eod-token </s>", r"--eod-token </s> is a tokenizer's: give --vocab-file and --merge-file, or"),
        ],
    )
    def test_flags_that_name_half_a_tokenizer(self, words, match):
        parser = argparse.ArgumentParser()
        add_tokenizer_flags(parser)
        with pytest.raises(UserError, match=match):
            named_tokenizer(tokenizer_config(parser.parse_args(words.split())))

    def test_settings_that_name_half_a_tokenizer(self):
        with pytest.raises(UserError, match="--tokenizer-type HFTokenizer needs --tokenizer-file"):
            named_tokenizer(TokenizerConfig("HFTokenizer"))
        with pytest.raises(UserError, match="--vocab-size is for a model without a tokenizer's files: drop it"):
            named_tokenizer(TokenizerConfig(vocab_file="v.json", vocab_size=5))
