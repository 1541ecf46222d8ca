"""Tokenizers: from nothing (bytes), from tokenizer.json, from GGUF metadata; token texts a reader can use."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.tokenizer import BYTE_OF, byte_tokenizer, tokenizer_from_file, tokenizer_from_gguf

BYTES = byte_tokenizer()


def test_byte_tokenizer_counts_bytes() -> None:
    assert BYTES.vocab_size == 257
    assert BYTES.encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert BYTES.encode("") == []
    assert (BYTES.end, BYTES.begin, BYTES.special) == (256, None, frozenset([256]))


@settings(deadline=None, max_examples=200)
@given(st.text().filter(lambda text: "<|endoftext|>" not in text))
def test_byte_tokenizer_round_trips_any_text(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == list(text.encode("utf-8", errors="replace"))
    assert BYTES.decode(ids) == text


def test_encode_batch_equals_encode() -> None:
    texts = ["one", "", "two words", "naïve 日本"]
    assert BYTES.encode_batch(texts) == [BYTES.encode(text) for text in texts]


def test_byte_token_texts() -> None:
    assert BYTES.token_text(ord("a")) == "a"
    assert BYTES.token_text(ord(" ")) == " "
    assert BYTES.token_text(ord("\n")) == "\n"
    assert BYTES.token_text(0xE2) == r"\xe2"
    assert BYTES.token_text(256) == "<|endoftext|>"
    with pytest.raises(UserError, match="no token has id=257"):
        BYTES.token_text(257)


def byte_level(merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """A byte-level BPE with the given merges, in the byte alphabet (`Ġ` is a space)."""
    vocab = dict(BYTE_OF) | {left + right: 256 + index for index, (left, right) in enumerate(merges)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def test_file_with_byte_level_pieces(tmp_path: Path) -> None:
    backend = byte_level([("t", "h"), ("th", "e"), ("Ġ", "the"), ("â", "Ģ")])
    backend.add_special_tokens(["<|im_end|>", "<|endoftext|>"])
    backend.add_tokens(["<tool>"])
    backend.enable_truncation(3)
    backend.enable_padding()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    tokenizer = tokenizer_from_file(tmp_path / "tokenizer.json")
    assert [tokenizer.token_text(id) for id in tokenizer.encode("the the")] == ["the", " the"]
    assert tokenizer.token_text(259) == r"\xe2\x80"  # the first two bytes of a dash
    assert tokenizer.end == backend.token_to_id("<|endoftext|>")  # between documents, not between turns
    assert tokenizer.special == {260, 261}
    assert tokenizer.token_text(262) == "<tool>"
    assert len(tokenizer.encode("a longer text is not cut")) > 3
    assert tokenizer.encode_batch(["a", "abc"]) == [[97], [97, 98, 99]]


def sentencepiece_like(path: Path, prepend: bool) -> Path:
    """Spaces as `▁`, bytes as <0x..>, `<s>` before every sequence if `prepend`: as in Llama 2 and Gemma."""
    vocab = {"<s>": 0, "</s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "▁a": 5, "<0xE2>": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if prepend:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.mark.parametrize("prepend", [True, False])
def test_file_with_sentencepiece_pieces(prepend: bool, tmp_path: Path) -> None:
    path = sentencepiece_like(tmp_path, prepend)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 4]}))
    tokenizer = tokenizer_from_file(path)
    assert tokenizer.encode("a a\n") == [4, 5, 2]  # nothing is put before it
    assert [tokenizer.token_text(id) for id in range(7)] == ["<s>", "</s>", "\n", " ", "a", " a", r"\xe2"]
    assert tokenizer.begin == (0 if prepend else None)
    assert tokenizer.end == 1


def test_add_bos_token_is_believed(tmp_path: Path) -> None:
    path = sentencepiece_like(tmp_path, prepend=False)
    settings = {"add_bos_token": True, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer_from_file(path).begin == 0


@pytest.mark.parametrize("others", [{}, {"bos_token_id": 1}])
def test_a_begin_token_that_is_asked_for_but_null_is_told(others: dict[str, Any], tmp_path: Path) -> None:
    """Kind K: Qwen's files say add_bos_token with bos_token null; transformers adds none, and neither do we."""
    backend = byte_level([])
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps(others))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": None}))
    with pytest.warns(UserWarning, match="add_bos_token is true, but bos_token is null"):
        assert tokenizer_from_file(tmp_path / "tokenizer.json").begin is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "bos_token": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokenizer_from_file(tmp_path / "tokenizer.json").begin is None


def test_file_with_word_pieces(tmp_path: Path) -> None:
    """As in BERT: `##` where a word goes on, [CLS] before and [SEP] after, truncation and padding in the file."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "eat": 4, "##ing": 5, "food": 6}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([AddedToken(name, special=True) for name in list(vocab)[:4]])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]"}))
    tokenizer = tokenizer_from_file(tmp_path / "tokenizer.json")
    assert (tokenizer.begin, tokenizer.end, tokenizer.special) == (2, 3, {0, 1, 2, 3})
    assert tokenizer.encode("Eating food eating") == [4, 5, 6, 4, 5]
    assert [tokenizer.token_text(id) for id in (2, 4, 5, 6)] == ["[CLS]", " eat", "ing", " food"]


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer file .*tokenizer\.json"):
        tokenizer_from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a readable tokenizer\.json"):
        tokenizer_from_file(tmp_path / "tokenizer.json")
    sentencepiece_like(tmp_path, prepend=False)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json holds a list"):
        tokenizer_from_file(tmp_path / "tokenizer.json")


def gguf_metadata(**changes: Any) -> Any:
    """What `gguf.GGUFReader` offers, for a small byte-level BPE."""
    tokens = ["<|endoftext|>", "<|im_end|>", *BYTE_OF, "Ġa", "12"]
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [3, 3, *[1] * 258],
        "merges": ["Ġ a", "1 2"],
        "eos_token_id": 1,
        "bos_token_id": 1,
        "add_bos_token": False,
    } | changes
    contents = lambda value: SimpleNamespace(contents=lambda: value)
    return SimpleNamespace(fields={f"tokenizer.ggml.{name}": contents(value) for name, value in fields.items()})


def test_gguf_tokenizer_is_rebuilt() -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata())
    ids = tokenizer.encode("a a12é<|im_end|>")
    texts = [tokenizer.token_text(id) for id in ids]
    assert texts == ["a", " a", "1", "2", r"\xc3", r"\xa9", "<|im_end|>"]  # digits stay apart before merging
    assert tokenizer.decode(ids) == "a a12é<|im_end|>"
    assert (tokenizer.end, tokenizer.begin, tokenizer.special) == (0, None, {0, 1})
    merged = tokenizer_from_gguf(gguf_metadata(pre="gpt-2"))
    assert [merged.token_text(id) for id in merged.encode("a12")] == ["a", "12"]
    assert tokenizer_from_gguf(gguf_metadata(add_bos_token=True)).begin == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "qwen2"}, r"tokenizer\.ggml\.pre='qwen2' is not supported \(supported: gpt-2, smollm\)"),
        ({"model": "llama"}, r"tokenizer\.ggml\.model='llama' is not supported"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type 1"),
        ({"tokens": []}, r"tokenizer\.ggml\.tokens has 0 entries"),
        ({"merges": ["no such"]}, r"tokenizer\.ggml\.merges make no tokenizer"),
    ],
)
def test_gguf_tokenizers_of_other_kinds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer_from_gguf(gguf_metadata(**changes))
