from itertools import islice

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orbax.checkpoint import v1 as ocp

from jaxinterp.core.errors import UserError
from jaxinterp.data.text.documents import Document
from jaxinterp.data.tokens import TokenCorpus, encode_documents, split
from jaxinterp.data.windows import batches, epochs_needed, windows

END, BEGIN = 0, 1


def documents_of(*texts):
    return [Document(text, f"test:{index}") for index, text in enumerate(texts)]


def make_corpus(lengths, begin=None):
    """Documents of these lengths with tokens that tell their place in the stream, each ending in END."""
    lengths = np.asarray(lengths, np.int64)
    stops = np.cumsum(lengths)
    ids = 100 + np.arange(lengths.sum(), dtype=np.int32)
    ids[stops - 1] = END
    keys = np.arange(len(lengths), dtype=np.uint64)
    return TokenCorpus("made", ids, stops - lengths, lengths, keys, frozenset({END, BEGIN}), begin)


def stream(corpus):
    """All tokens in order, and the document of each."""
    tokens = np.concatenate([corpus.document(index) for index in range(corpus.documents)])
    return tokens, np.repeat(np.arange(corpus.documents), corpus.lengths)


def rows_of(batch):
    """What a row is known by: its first token after position 0."""
    return batch["tokens"][:, 1].tolist()


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths=LENGTHS, seq_len=st.integers(2, 24), begin=st.sampled_from([None, BEGIN]), data=st.data())
def test_every_token_occurs_once_in_order_up_to_the_tail(lengths, seq_len, begin, data):
    corpus = make_corpus(lengths, begin)
    chosen = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    corpus = corpus.select(np.asarray(chosen))
    payload = seq_len - (begin is not None)
    if corpus.tokens < payload:
        with pytest.raises(UserError, match="too few"):
            windows(corpus, seq_len)
        return
    elements = list(windows(corpus, seq_len))
    skip = seq_len - payload
    tokens, document = stream(corpus)
    kept = corpus.tokens // payload * payload
    assert np.array_equal(np.concatenate([element["tokens"][skip:] for element in elements]), tokens[:kept])
    assert np.array_equal(np.concatenate([element["document"][skip:] for element in elements]), document[:kept])
    for element in elements:
        assert [(array.dtype, array.shape) for array in element.values()] == [
            (np.int32, (seq_len,)),
            (np.float32, (seq_len,)),
            (np.int32, (seq_len,)),
        ]
        assert begin is None or (element["tokens"][0] == begin and element["document"][0] == element["document"][1])
        expected = ~np.isin(element["tokens"], [END, BEGIN])
        expected[0] = False
        assert np.array_equal(element["weight"], expected)


def test_windows_of_text(tokenizer, beginning_tokenizer):
    documents = documents_of("the sum", "of squares")
    corpus = encode_documents(documents, tokenizer, name="two")
    (element,) = windows(corpus, corpus.tokens)
    assert tokenizer.decode(element["tokens"]) == "the sum<|endoftext|>of squares<|endoftext|>"
    assert element["weight"].sum() == corpus.tokens - 3
    corpus = encode_documents(documents, beginning_tokenizer, name="two")
    (element,) = windows(corpus, corpus.tokens + 1)
    assert tokenizer.decode(element["tokens"]) == "<|begin|>the sum<|endoftext|>of squares<|endoftext|>"
    assert element["weight"].sum() == corpus.tokens - 2


def test_a_memory_mapped_file_gives_the_same_windows(tmp_path):
    corpus = make_corpus([7, 9, 30, 1, 12])
    np.save(tmp_path / "ids.npy", corpus.ids.astype(np.uint16))
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    other = TokenCorpus("made", mapped, corpus.starts, corpus.lengths, corpus.keys, corpus.special, None)
    for ours, theirs in zip(windows(corpus, 8), windows(other, 8), strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


@settings(deadline=None, max_examples=30)
@given(
    count=st.integers(6, 60),
    per_host=st.integers(1, 3),
    host_count=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
)
def test_the_hosts_batches_make_up_the_global_batch(count, per_host, host_count, seed, shuffle):
    """Invariant 11."""
    dataset = windows(make_corpus([4] * count), 4)
    batch_size = per_host * host_count

    def read(**hosts):
        return list(islice(batches(dataset, batch_size, seed=seed, shuffle=shuffle, epochs=3, **hosts), 50))

    whole = read()
    parts = [read(host_index=host, host_count=host_count) for host in range(host_count)]
    assert len(whole) == min(50, 3 * count // batch_size)
    for index, batch in enumerate(whole):
        for name, array in batch.items():
            assert np.array_equal(np.concatenate([part[index][name] for part in parts]), array)


def test_every_epoch_is_another_permutation():
    dataset = windows(make_corpus([4] * 60), 4)
    seen = [row for batch in batches(dataset, 6, seed=3, epochs=2) for row in rows_of(batch)]
    first, second = seen[:60], seen[60:]
    everything = [element["tokens"][1] for element in dataset]
    assert sorted(first) == sorted(second) == everything
    assert first != second and first != everything and second != everything


def test_unshuffled_batches_are_in_order_and_end():
    dataset = windows(make_corpus([4] * 10), 4)
    found = list(batches(dataset, 4, seed=0, shuffle=False, epochs=1))
    assert [rows_of(batch) for batch in found] == [
        [101 + 4 * (4 * index + row) for row in range(4)] for index in (0, 1)
    ]


def test_without_epochs_there_is_no_end():
    dataset = windows(make_corpus([4] * 3), 4)
    assert len(list(islice(batches(dataset, 8, seed=0), 20))) == 20


def test_seeds_give_orders_of_their_own():
    """Also across epochs: Grain's own seeds count up, so that epoch 1 of seed 0 would be epoch 0 of seed 1."""
    dataset = windows(make_corpus([4] * 40), 4)

    def epochs(seed):
        rows = [row for batch in batches(dataset, 40, seed=seed, epochs=3) for row in rows_of(batch)]
        return {tuple(rows[start : start + 40]) for start in (0, 40, 80)}

    assert epochs(7) == epochs(7)
    assert len(epochs(0) | epochs(1) | epochs(2)) == 9


def test_the_iterator_resumes_from_every_state():
    dataset = windows(make_corpus([5, 9, 4, 12] * 8), 4)
    grain.experimental.assert_equal_output_after_checkpoint(
        batches(dataset, 4, seed=1, epochs=2, host_index=1, host_count=2)
    )


def test_the_iterator_resumes_through_orbax(tmp_path):
    stream_of = lambda: iter(batches(windows(make_corpus([4] * 30), 4), 4, seed=5))
    iterator = stream_of()
    for _ in range(11):
        next(iterator)
    ocp.save_checkpointables(tmp_path / "step", {"data": iterator})
    expected = [next(iterator) for _ in range(5)]
    restored = stream_of()
    ocp.load_checkpointables(tmp_path / "step", {"data": restored})
    for ours, theirs in zip(expected, [next(restored) for _ in range(5)], strict=True):
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_epochs_needed_counts_full_windows():
    corpus = make_corpus([10] * 10)  # 100 tokens: 12 windows of 8
    assert epochs_needed(corpus, 8, 96) == 1.0
    assert epochs_needed(corpus, 8, 240) == 2.5


def test_training_and_heldout_windows_share_no_document(tokenizer):
    texts = [f"document number {index}" for index in range(200)]
    train, heldout = split(encode_documents(documents_of(*texts), tokenizer, name="many"), 0.2)
    streams = [np.concatenate([element["tokens"] for element in windows(part, 16)]) for part in (train, heldout)]
    found = [set(tokenizer.decode(tokens).split("<|endoftext|>")) for tokens in streams]
    assert not found[0] & found[1] & set(texts)
    assert len(found[0] & set(texts)) > 50 and len(found[1] & set(texts)) > 10


@pytest.mark.parametrize("seq_len", [1, 0, -4])
def test_windows_need_two_positions(seq_len):
    with pytest.raises(UserError, match=f"seq_len={seq_len}"):
        windows(make_corpus([10]), seq_len)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 6, "host_count": 4}, "batch_size=6.*host_count=4"),
        ({"batch_size": 4, "host_count": 0}, "host_count=0"),
        ({"batch_size": 4, "host_index": 2, "host_count": 2}, "host_index=2.*0..1"),
        ({"batch_size": 4, "host_index": -1}, "host_index=-1"),
        ({"batch_size": 4, "seed": -1}, "seed=-1"),
        ({"batch_size": 4, "epochs": 0}, "epochs=0"),
        ({"batch_size": 8, "epochs": 1}, "batch_size=8 windows, but 5 windows x 1 epochs"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    dataset = windows(make_corpus([4] * 5), 4)
    with pytest.raises(UserError, match=message):
        batches(dataset, **{"seed": 0} | settings)


def test_a_batch_may_be_one_window():
    """Without end, which Grain counts as the greatest length that there is."""
    text = windows(make_corpus([30, 20]), 8)
    first, second = (next(iter(batches(text, 1, seed=0)))["tokens"] for _ in range(2))
    assert first.shape == (1, 8) and (first == second).all()


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 50), stretch=st.integers(1, 60), epochs=st.integers(1, 3), seed=st.integers(0, 2**40))
def test_shuffling_within_stretches_moves_nothing_out_of_its_stretch(count, stretch, epochs, seed):
    dataset = windows(make_corpus([4] * count), 4)
    found = list(batches(dataset, 1, seed=seed, shuffle_within=stretch, epochs=epochs))
    order = [(batch["tokens"][0, 1] - 101) // 4 for batch in found]
    for epoch in range(epochs):
        one = order[epoch * count : (epoch + 1) * count]
        assert sorted(one) == list(range(count))
        assert [place // stretch for place in one] == [place // stretch for place in range(count)]


def test_every_stretch_of_every_epoch_has_its_own_order():
    dataset = windows(make_corpus([4] * 64), 4)

    def stretches(seed):
        rows = [row for batch in batches(dataset, 8, seed=seed, shuffle_within=16, epochs=2) for row in rows_of(batch)]
        return [tuple((row - 101) // 4 % 16 for row in rows[start : start + 16]) for start in range(0, 128, 16)]

    assert stretches(3) == stretches(3)
    assert len({*stretches(3), *stretches(4)}) == 16


@pytest.mark.parametrize("stretch", [None, 5])
def test_hosts_and_resumption_are_the_same_within_stretches(stretch):
    """Invariant 11."""
    dataset = windows(make_corpus([4] * 22), 4)
    options = {"seed": 3, "shuffle_within": stretch, "epochs": 2}
    whole = list(batches(dataset, 4, **options))
    parts = [list(batches(dataset, 4, **options, host_index=host, host_count=2)) for host in range(2)]
    for index, batch in enumerate(whole):
        both = np.concatenate([part[index]["tokens"] for part in parts])
        assert np.array_equal(both, batch["tokens"])
    grain.experimental.assert_equal_output_after_checkpoint(batches(dataset, 4, **options, host_count=2))


def test_an_endless_text_is_shuffled_within_stretches():
    dataset = windows(make_corpus([4] * 3), 4)
    assert len(list(islice(batches(dataset, 8, seed=0, shuffle_within=2), 20))) == 20
    with pytest.raises(UserError, match="shuffle_within=0 must be at least 1"):
        batches(dataset, 1, seed=0, shuffle_within=0)


def test_a_host_may_read_parts_that_do_not_lie_side_by_side():
    """Invariant 11: as a host of a pod does whose chips lie at two places of the mesh's data axis."""
    dataset = windows(make_corpus([4] * 32), 4)
    whole = list(batches(dataset, 8, seed=3, epochs=1))
    own = list(batches(dataset, 8, seed=3, epochs=1, host_index=(0, 2), host_count=4))
    for batch, part in zip(whole, own, strict=True):
        np.testing.assert_array_equal(part["tokens"], batch["tokens"][[0, 1, 4, 5]])
    with pytest.raises(UserError, match=r"host_index=\(0, 4\) must lie in 0\.\.3"):
        batches(dataset, 8, seed=3, host_index=(0, 4), host_count=4)
