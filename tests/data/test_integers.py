"""Bare integers: what they look like is compared with what they are read as. Nothing is believed."""

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.data.integers import looks_like
from jaxinterp.data.text.load_text import load_text
from jaxinterp.data.token_files import read_token_file
from jaxinterp.models.files.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
RNG = np.random.default_rng(0)


class Large:
    """A tokenizer of 128,256 ids."""

    end, begin, special, vocab_size = 128_001, None, frozenset({128_001}), 128_256

    def encode_batch(self, texts):
        raise NotImplementedError


def write(path, ids, dtype):
    np.asarray(ids).astype(dtype).tofile(path)
    return path


@pytest.mark.parametrize("count", [8, 3_000])
@pytest.mark.parametrize("kind", ["<u4", "<i4", "<i8", "<u8", ">u2", ">u4", ">i8"])
def test_integers_of_another_type_are_refused_by_name_and_read_when_named(tmp_path, kind, count):
    ids = RNG.integers(1, 256, count)
    path = write(tmp_path / "a.bin", ids, kind)
    with pytest.raises(UserError, match="does not look like uint16, but like"):
        read_token_file(path, BYTES)
    corpus = read_token_file(path, BYTES, token_dtype=kind)
    assert np.array_equal(corpus.ids[:], ids)
    # What the old reading gave: every id followed or preceded by zeros, or ids that nobody wrote.
    assert not np.array_equal(np.fromfile(path, "<u2")[:count], ids)


@pytest.mark.parametrize("below", [65, 257, 50_257])
def test_uint16_is_read_as_ever(tmp_path, below):
    class Small(Large):
        vocab_size, end, special = below, 0, frozenset({0})

    ids = RNG.integers(0, min(below, 12 if below == 65 else below), 2_000)
    path = write(tmp_path / "a.bin", ids, "<u2")
    assert np.array_equal(read_token_file(path, Small()).ids[:], ids)
    alternating = write(tmp_path / "b.bin", [5, 0, 6, 0, 7, 0], "<u2")  # documents of one token
    assert read_token_file(alternating, Small()).documents == 3


def test_a_large_vocabulary_has_its_own_mistakes(tmp_path):
    ids = RNG.integers(0, 128_000, 2_000)
    assert np.array_equal(read_token_file(write(tmp_path / "a.bin", ids, "<u4"), Large()).ids[:], ids)
    for kind, seen in (("<i8", "int64"), (">u4", ">u4")):
        with pytest.raises(UserError, match=f"not look like uint32, but like {seen}"):
            read_token_file(write(tmp_path / "b.bin", ids, kind), Large())
    with pytest.raises(UserError, match="but like uint16"):
        read_token_file(write(tmp_path / "c.bin", ids % 50_000, "<u2"), Large())
    # Ids of a large vocabulary, read where the tokenizer is small: upper halves of 0 and 1 are ids of it, too.
    assert looks_like(ids.astype("<u4").view(np.uint8), np.dtype("<u2"), 50_257) == "uint32"


def test_a_text_is_not_token_ids_and_a_named_type_is_checked(tmp_path):
    (tmp_path / "a.bin").write_text("All happy families are alike; each unhappy family is unhappy in its own way.\n")

    class Gpt2(Large):
        vocab_size, end, special = 50_257, 50_256, frozenset({50_256})

    with pytest.raises(UserError, match=r"like text: give it the suffix \.txt"):
        read_token_file(tmp_path / "a.bin", Gpt2())
    for name in ("float32", "nonsense"):
        with pytest.raises(UserError, match=f"token_dtype='{name}' is not"):
            read_token_file(tmp_path / "a.bin", BYTES, token_dtype=name)
    with pytest.raises(UserError, match="77 bytes, which is not a whole number of uint16"):
        read_token_file(tmp_path / "a.bin", BYTES, token_dtype="uint16")


def test_bare_integers_under_the_suffix_npy(tmp_path):
    ids = RNG.integers(1, 256, 400)
    path = write(tmp_path / "a.npy", ids, "<u4")
    with pytest.raises(UserError, match=r"not a readable \.npy file: no header.*token_dtype='uint32'"):
        read_token_file(path, BYTES)
    assert np.array_equal(read_token_file(path, BYTES, token_dtype="uint32").ids[:], ids)
    np.save(tmp_path / "b.npy", ids.astype(np.uint16))
    with pytest.raises(UserError, match="holds uint16, not token_dtype='uint32'"):
        read_token_file(tmp_path / "b.npy", BYTES, token_dtype="uint32")


def test_the_type_goes_through_load_text(tmp_path):
    path = write(tmp_path / "a.bin", RNG.integers(1, 256, 40_000), "<i8")
    train, heldout = load_text(str(path), BYTES, seq=64, token_dtype="int64")
    assert len(train) + len(heldout) == 40_000 // 64
    assert all(train[index]["tokens"].min() > 0 for index in range(3))
