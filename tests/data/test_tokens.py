import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinterp.core.errors import UserError
from jaxinterp.data import token_files
from jaxinterp.data import tokens as module
from jaxinterp.data.text import sources
from jaxinterp.data.text.documents import Document
from jaxinterp.data.text.sources import load_corpus
from jaxinterp.data.token_files import read_token_file
from jaxinterp.data.tokens import TextTokenizer, encode_documents, split
from jaxinterp.models.files.tokenizer import byte_tokenizer


def documents_of(*texts):
    return [Document(text, f"test:{index}") for index, text in enumerate(texts)]


def texts_of(corpus, tokenizer):
    return [tokenizer.decode(corpus.document(index)) for index in range(corpus.documents)]


def sides(corpus):
    """The contents of the two sides, as sorted lists of token lists or texts."""
    if isinstance(corpus, list):
        return sorted(document.text for document in corpus)
    return sorted(tuple(corpus.document(index).tolist()) for index in range(corpus.documents))


def test_the_packages_own_tokenizer_fits_the_protocol(tokenizer):
    assert isinstance(byte_tokenizer(), TextTokenizer) and isinstance(tokenizer, TextTokenizer)


def test_documents_are_encoded_each_with_its_end_token(tokenizer):
    corpus = encode_documents(documents_of("the sum", "", "of squares"), tokenizer, name="two")
    assert texts_of(corpus, tokenizer) == ["the sum<|endoftext|>", "of squares<|endoftext|>"]
    assert corpus.documents == 2 and corpus.tokens == len(corpus.ids) == corpus.lengths.sum()
    assert corpus.ids.dtype == np.int32 and (corpus.ids == tokenizer.end).sum() == 2
    assert corpus.keys.tolist() == [document.key for document in documents_of("the sum", "of squares")]
    assert corpus.special == {0, 1}


def test_without_an_end_token_nothing_is_added(endless_tokenizer):
    corpus = encode_documents(documents_of("the sum", "of squares"), endless_tokenizer, name="two")
    assert texts_of(corpus, endless_tokenizer) == ["the sum", "of squares"]


def test_groups_do_not_change_the_corpus(tokenizer, monkeypatch):
    documents = documents_of(*(f"document {index} " * (index % 7 + 1) for index in range(50)))
    whole = encode_documents(documents, tokenizer, name="a")
    monkeypatch.setattr(module, "CHUNK", 30)
    grouped = encode_documents(iter(documents), tokenizer, name="a")
    assert np.array_equal(whole.ids, grouped.ids) and whole.content_hash == grouped.content_hash


def test_max_tokens_stops_reading(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 1)

    def many():
        for _ in range(1000):
            yield Document("the sum of the squares", "test")
        pytest.fail("read on after max_tokens")

    corpus = encode_documents(many(), tokenizer, name="many", max_tokens=1001)
    whole = encode_documents(documents_of("the sum of the squares"), tokenizer, name="one")
    assert corpus.tokens == 1001
    assert np.array_equal(corpus.ids, np.resize(whole.ids, 1001))


def test_the_content_hash_sees_text_and_order(tokenizer):
    hashes = [
        encode_documents(documents_of(*texts), tokenizer, name=name).content_hash
        for name, texts in [("a", "xy"), ("b", "xy"), ("a", "yx"), ("a", "xz"), ("a", "x")]
    ]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


TEXTS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=40, max_size=120)


def try_split(corpus, fraction):
    """Forty documents or so can all fall on one side; that is refused, and not what these properties are about."""
    try:
        return split(corpus, fraction)
    except UserError:
        return None


@given(texts=TEXTS, fraction=st.floats(0.1, 0.9), random=st.randoms(use_true_random=False))
def test_the_split_is_by_content_alone(texts, fraction, random):
    """Invariant 12: disjoint, complete, the same in any order, and unmoved by other documents; copies stay together."""
    found = try_split(documents_of(*texts), fraction)
    if found is None:
        return
    train, heldout = map(sides, found)
    assert sorted(train + heldout) == sorted(texts)
    assert not set(train) & set(heldout)
    shuffled = list(texts)
    random.shuffle(shuffled)
    assert tuple(map(sides, split(documents_of(*shuffled), fraction))) == (train, heldout)
    more_train, more_heldout = map(sides, split(documents_of("something new", *texts, *texts[:5]), fraction))
    assert set(train) <= set(more_train) and set(heldout) <= set(more_heldout)
    assert not set(more_train) & set(more_heldout)


@given(texts=TEXTS, fraction=st.floats(0.1, 0.9))
def test_tokens_are_split_as_their_texts_are(texts, fraction):
    tokenizer = byte_tokenizer()
    found = try_split(documents_of(*texts), fraction)
    if found is None:
        return
    for part, documents in zip(
        split(encode_documents(documents_of(*texts), tokenizer, name="a"), fraction), found, strict=True
    ):
        assert np.array_equal(part.keys, [document.key for document in documents])
        texts_back = [tokenizer.decode(part.document(i)[:-1].tolist()) for i in range(part.documents)]
        assert texts_back == [document.text for document in documents]


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.5, 0.9])
def test_the_fraction_held_out_is_near_the_one_asked_for(fraction):
    documents = documents_of(*map(str, range(20_000)))
    train, heldout = split(documents, fraction)
    spread = (fraction * (1 - fraction) / len(documents)) ** 0.5
    assert abs(len(heldout) / len(documents) - fraction) < 4 * spread
    assert len(train) + len(heldout) == len(documents)


def test_a_larger_fraction_holds_out_more_besides():
    documents = documents_of(*map(str, range(300)))
    smaller, larger = ({d.text for d in split(documents, fraction)[1]} for fraction in (0.1, 0.3))
    assert smaller < larger


def test_a_split_shares_the_tokens(tokenizer):
    corpus = encode_documents(documents_of(*map(str, range(100))), tokenizer, name="numbers")
    for part in split(corpus, 0.3):
        assert part.ids is corpus.ids and part.name == "numbers"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(UserError, match=f"heldout_fraction={fraction}"):
        split(documents_of("a", "b"), fraction)


def test_a_split_that_leaves_a_side_empty_is_refused(tokenizer):
    with pytest.raises(UserError, match="no held-out document among 2"):
        split(documents_of("a", "b"), 1e-9)
    with pytest.raises(UserError, match="no training document among 1"):
        split(encode_documents(documents_of("a"), tokenizer, name="a"), 1 - 1e-9)


# Files of token ids.


def write_ids(path, ids, dtype):
    ids = np.asarray(ids, dtype)
    np.save(path, ids) if path.suffix == ".npy" else ids.tofile(path)
    return path


@pytest.mark.parametrize(("name", "dtype"), [("a.bin", "<u2"), ("a.npy", "<u2"), ("a.npy", "<u4"), ("a.npy", ">i8")])
def test_a_file_of_token_ids_is_memory_mapped_and_divided_at_end_tokens(tmp_path, tokenizer, name, dtype):
    path = write_ids(tmp_path / name, [0, 5, 6, 7, 0, 0, 8, 0, 9, 10], dtype)
    corpus = read_token_file(path, tokenizer)
    assert isinstance(corpus.ids, np.memmap)
    assert [corpus.document(i).tolist() for i in range(3)] == [[5, 6, 7, 0], [8, 0], [9, 10]]
    assert corpus.documents == 3 and corpus.tokens == 8
    again = read_token_file(write_ids(tmp_path / "b.npy", [9, 10, 0, 5, 6, 7], "<u2"), tokenizer)
    assert again.keys.tolist() == [corpus.keys[2], corpus.keys[0]], "the end token is not part of a document's content"


def test_chunks_do_not_change_what_is_read(tmp_path, tokenizer, monkeypatch):
    ids = np.random.default_rng(0).choice([0, 4, 5, 6, 7], 1000)
    path = write_ids(tmp_path / "a.bin", ids, "<u2")
    whole = read_token_file(path, tokenizer)
    monkeypatch.setattr(token_files, "CHUNK", 7)
    chunked = read_token_file(path, tokenizer)
    assert whole.content_hash == chunked.content_hash and np.array_equal(whole.starts, chunked.starts)


@pytest.mark.parametrize("length", [1024, 2500, 3072, 10])
def test_without_separators_documents_are_spans(tmp_path, tokenizer, endless_tokenizer, length):
    ids = np.arange(length) % 200 + 2
    path = write_ids(tmp_path / "a.npy", ids, "<u2")
    for corpus in (read_token_file(path, tokenizer), read_token_file(path, endless_tokenizer)):
        assert corpus.starts.tolist() == list(range(0, length, 1024))
        assert corpus.tokens == length
        assert np.array_equal(np.concatenate([corpus.document(i) for i in range(corpus.documents)]), ids)


def test_a_large_vocabulary_means_wide_integers(tmp_path):
    class Large:
        end, begin, special, vocab_size = 1, None, frozenset({1}), 100_000

        def encode_batch(self, texts):
            raise NotImplementedError

    corpus = read_token_file(write_ids(tmp_path / "a.bin", [99_999, 5, 1, 70_000], "<u4"), Large())
    assert [corpus.document(i).tolist() for i in range(2)] == [[99_999, 5, 1], [70_000]]


@pytest.mark.parametrize(("bad", "dtype"), [(298, "<u4"), (2**32 - 1, "<u4"), (-1, "<i4")])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path, tokenizer, monkeypatch, bad, dtype):
    monkeypatch.setattr(token_files, "CHUNK", 8)
    path = write_ids(tmp_path / "a.npy", [5] * 19 + [bad, 5, bad], dtype)
    with pytest.raises(UserError, match=rf"a\.npy: token id {bad} at position 19 .* vocabulary of 298"):
        read_token_file(path, tokenizer)
    assert read_token_file(path, tokenizer, max_tokens=19).tokens == 19


def test_token_files_that_are_none_are_refused(tmp_path, tokenizer):
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "odd.bin").write_bytes(b"\0\0\0")
    (tmp_path / "junk.npy").write_bytes(b"\x80\x04junk")
    np.save(tmp_path / "empty.npy", np.zeros(0, np.uint16))
    np.save(tmp_path / "floats.npy", np.zeros(4))
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2), np.uint16))
    np.save(tmp_path / "objects.npy", np.asarray([{}, {}]), allow_pickle=True)
    np.save(tmp_path / "cut.npy", np.zeros(1000, np.uint16))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-100])
    for name, message in {
        "empty.bin": "is empty",
        "odd.bin": "3 bytes",
        "junk.npy": "not a readable .npy",
        "empty.npy": "empty",
        "floats.npy": r"float64 with shape \(4,\)",
        "cube.npy": r"uint16 with shape \(2, 2, 2\)",
        "objects.npy": "not a readable .npy",
        "cut.npy": "not a readable .npy",
        "odd.bni": "Did you mean 'odd.bin'",
    }.items():
        with pytest.raises(UserError, match=rf"{name}.*{message}"):
            read_token_file(tmp_path / name, tokenizer)


# By name or path.


def test_named_corpora_are_mixed_and_each_text_is_taken_once(tokenizer, monkeypatch):
    monkeypatch.setattr(
        sources,
        "NAMED",
        {
            "docs": lambda: documents_of(*(f"documentation {index}" for index in range(300))),
            "kjv": lambda: documents_of(*(f"verse {index}" for index in range(100)), "documentation 7"),
        },
    )
    whole = load_corpus("docs+kjv", tokenizer)
    assert whole.documents == 400 and whole.name == "docs+kjv"
    sample = load_corpus("docs+kjv", tokenizer, max_tokens=whole.tokens // 2)
    assert np.array_equal(sample.ids, whole.ids[: sample.tokens])
    verses = sum("verse" in text for text in texts_of(sample, tokenizer)) / sample.documents
    assert 0.15 < verses < 0.35, "the beginning is a fair sample of both"
    # The order knows nothing of the split: a sample holds out the same share as the whole.
    _, heldout = split(sample, 0.25)
    assert 0.15 < heldout.documents / sample.documents < 0.35


def test_paths_are_read_by_their_kind(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the sum")
    (tmp_path / "b.jsonl").write_text('{"body": "of squares"}\n')
    write_ids(tmp_path / "c.bin", [5, 6, 0], "<u2")
    assert texts_of(load_corpus(f"{tmp_path}/a.txt", tokenizer), tokenizer) == ["the sum<|endoftext|>"]
    assert load_corpus(f"{tmp_path}/b.jsonl", tokenizer, text_field="body").documents == 1
    assert load_corpus(f"{tmp_path}/c.bin", tokenizer).tokens == 3
    assert load_corpus(str(tmp_path), tokenizer, text_field="body").documents == 2
    assert load_corpus(f"{tmp_path}/c.bin", tokenizer, max_tokens=2).tokens == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("doc", r"'doc'.*docs, kjv, shakespeare.*Did you mean 'docs'"),
        ("docs+shakespear", "'shakespear'.*Did you mean 'shakespeare'"),
        ("", "no corpus and no path ''"),
        ("nowhere/a.txt", r"nowhere/a\.txt"),
        ("nowhere/a.bin", r"nowhere/a\.bin"),
    ],
)
def test_an_unknown_source_is_refused(tokenizer, source, message):
    with pytest.raises(UserError, match=message):
        load_corpus(source, tokenizer)


def test_max_tokens_must_be_positive(tokenizer):
    with pytest.raises(UserError, match="max_tokens=0"):
        load_corpus("docs", tokenizer, max_tokens=0)
