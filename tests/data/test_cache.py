"""Token caches: read where nothing changed, made anew where something did, remade where they are damaged."""

import json
import tracemalloc

import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.data import cache as module
from jaxinterp.data import tokens
from jaxinterp.data.cache import through_cache
from jaxinterp.data.text import sources
from jaxinterp.data.text.documents import Document
from jaxinterp.data.text.load_text import load_text
from jaxinterp.data.text.sources import load_corpus
from jaxinterp.data.token_files import read_token_file
from jaxinterp.data.vocabulary import train_tokenizer
from jaxinterp.data.windows import windows
from jaxinterp.models.files.tokenizer import byte_tokenizer

TEXTS = [f"document number {index}, which says {index * index}." for index in range(60)]


@pytest.fixture
def folder(tmp_path):
    """A folder of text files."""
    (tmp_path / "texts").mkdir()
    for index, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{index:02}.txt").write_text(text)
    return tmp_path / "texts"


@pytest.fixture
def encodings(monkeypatch):
    """How often a text was tokenised."""
    counted = []
    real = module.encoded
    monkeypatch.setattr(module, "encoded", lambda *args, **options: counted.append(1) or real(*args, **options))
    return counted


def same(one, two):
    return (
        np.array_equal(one.ids, two.ids)
        and np.array_equal(one.starts, two.starts)
        and (one.content_hash, one.special, one.begin) == (two.content_hash, two.special, two.begin)
    )


def test_tokenising_twice_reads_the_cache(folder, tmp_path, encodings):
    plain = load_corpus(str(folder), byte_tokenizer())
    first, again = (load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "cache") for _ in range(2))
    assert len(encodings) == 1 and same(first, plain) and same(again, plain)
    assert isinstance(again.ids, np.memmap) and again.ids.dtype == np.uint16
    for ours, theirs in zip(windows(again, 16), windows(plain, 16), strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    train, heldout = load_text(str(folder), byte_tokenizer(), seq=16, heldout=0.3, cache=tmp_path / "cache")
    assert len(encodings) == 1 and len(train) > len(heldout) > 0


def test_another_text_tokenizer_field_or_length_has_another_cache(folder, tmp_path, encodings):
    cache = tmp_path / "cache"

    def load(tokenizer=None, **options):
        return load_corpus(str(folder), tokenizer or byte_tokenizer(), cache=cache, **options)

    load()
    (folder / "07.txt").write_text(TEXTS[7].replace("7", "8"))
    assert load().content_hash != load_corpus(str(folder), byte_tokenizer(), max_tokens=50).content_hash
    load(max_tokens=50)
    load(train_tokenizer([Document(text, "") for text in TEXTS], 270))
    load(text_field="body")
    assert len(encodings) == len(list(cache.iterdir())) == 5
    (folder / "07.txt").write_text(TEXTS[7])
    load()
    assert len(encodings) == 5, "the text is what it was, and so is its cache"


def test_a_file_that_only_moved_or_was_touched_is_not_tokenised_again(folder, tmp_path, encodings):
    load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "cache")
    moved = folder.rename(tmp_path / "elsewhere")
    (moved / "00.txt").write_text(TEXTS[0])
    load_corpus(str(moved), byte_tokenizer(), cache=tmp_path / "cache")
    assert len(encodings) == 1


def test_named_corpora_are_cached_by_their_content(tmp_path, monkeypatch, encodings):
    texts = list(TEXTS)
    monkeypatch.setattr(sources, "NAMED", {"docs": lambda: [Document(text, "") for text in texts]})
    first, again = (load_corpus("docs", byte_tokenizer(), cache=tmp_path / "cache") for _ in range(2))
    assert len(encodings) == 1 and same(first, again) and first.name == "docs"
    texts.append("another package was installed")
    assert load_corpus("docs", byte_tokenizer(), cache=tmp_path / "cache").documents == 61 and len(encodings) == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "ids.bin"),
        lambda folder: flip(folder / "lengths.bin"),
        lambda folder: flip(folder / "keys.bin"),
        lambda folder: (folder / "ids.bin").unlink(),
        lambda folder: (folder / "ids.bin").write_bytes((folder / "ids.bin").read_bytes()[:-10]),
        lambda folder: (folder / "corpus.json").unlink(),
        lambda folder: (folder / "corpus.json").write_text('{"sha'),
        lambda folder: (folder / "corpus.json").write_text("[]"),
    ],
)
def test_a_damaged_cache_is_told_and_made_again(folder, tmp_path, encodings, damage):
    """Invariant 26."""
    good = load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "cache")
    kept = np.array(good.ids)
    (entry,) = (tmp_path / "cache").iterdir()
    damage(entry)
    with pytest.warns(UserWarning, match=f"the token cache {entry} is damaged .*: it is made again"):
        again = load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "cache")
    assert np.array_equal(again.ids, kept) and len(encodings) == 2
    load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "cache")
    assert len(encodings) == 2 and [path.name for path in (tmp_path / "cache").iterdir()] == [entry.name]


def test_files_that_contradict_each_other_are_damage(folder, tmp_path):
    load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    description = json.loads((entry / "corpus.json").read_text())
    (entry / "ids.bin").write_bytes((entry / "ids.bin").read_bytes()[:-10])
    description["sha256"]["ids.bin"] = module._sha256(entry / "ids.bin")
    (entry / "corpus.json").write_text(json.dumps(description))
    with pytest.warns(UserWarning, match="its files contradict each other"):
        load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "cache")


def test_a_text_that_fails_on_the_way_leaves_no_cache(tmp_path):
    def documents():
        yield Document("fine", "")
        raise UserError("line 2 is broken")

    with pytest.raises(UserError, match="line 2"):
        through_cache(tmp_path / "cache", "key", documents(), byte_tokenizer(), name="a")
    assert list((tmp_path / "cache").iterdir()) == []


def test_who_comes_second_takes_what_the_first_one_wrote(tmp_path):
    """Two processes find no cache and both write it: the slower one's work is dropped."""

    def slow():
        yield Document("one", "")
        through_cache(tmp_path, "key", [Document("one", "")], byte_tokenizer(), name="fast")

    corpus = through_cache(tmp_path, "key", slow(), byte_tokenizer(), name="slow")
    assert corpus.documents == 1 and len(list(tmp_path.iterdir())) == 1


def test_the_cached_ids_are_a_file_of_token_ids(folder, tmp_path):
    corpus = load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    assert read_token_file(entry / "ids.bin", byte_tokenizer()).documents == corpus.documents


def test_a_text_larger_than_the_memory_is_tokenised_in_little_of_it(tmp_path, monkeypatch):
    """Four million tokens pass through; their ids alone would be 16 MB."""
    monkeypatch.setattr(tokens, "CHUNK", 20_000)
    documents = (Document(f"{index:04}" * 500, "") for index in range(2000))
    tracemalloc.start()
    corpus = through_cache(tmp_path, "key", documents, byte_tokenizer(), name="large")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert corpus.tokens == 2000 * 2001 and peak < 8e6
    assert corpus.document(1999)[:4].tolist() == [ord(c) for c in "1999"]


def test_a_tokenizer_without_a_hash_or_a_folder_that_is_a_file_is_refused(tokenizer, folder, tmp_path):
    with pytest.raises(UserError, match="a SmallTokenizer has no content_hash; pass cache=None"):
        load_corpus(str(folder), tokenizer, cache=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        load_corpus(str(folder), byte_tokenizer(), cache=tmp_path / "file")
