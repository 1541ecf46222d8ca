"""Short questions about features, against the dense codes."""

import numpy as np
import pytest

from jaxinterp import codes_table, find_features, logits_of, run, top_contexts
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.features.vectors import direct_logits
from tests.explore.conftest import SEQ, dataset, dictionary, subject  # noqa: F401


def test_codes_as_arrays_and_columns(subject, dictionary):  # noqa: F811
    tokens = subject.tokens(["abcab", "gfdca"])
    trace = run(subject.model, tokens)
    codes = dictionary.encode(trace["blocks/1/mlp/in"])
    dense = np.asarray(codes)
    assert dense.shape == (2, 5, 128) and np.array_equal(dense, codes.dense())
    table = codes_table(codes, tokens, subject)
    again = np.zeros_like(dense)
    again[table["row"], table["place"], table["feature"]] = table["value"]
    assert np.array_equal(again, dense) and len({len(column) for column in table.values()}) == 1
    assert table["text"].tolist() == [
        ("abcab", "gfdca")[r][p] for r, p in zip(table["row"], table["place"], strict=True)
    ]
    first = table["value"][(table["row"] == 0) & (table["place"] == 1)]
    assert first.tolist() == sorted(first.tolist(), reverse=True)
    with pytest.raises(UserError, match="give both as"):
        codes_table(codes, tokens[:1])
    assert trace._ipython_key_completions_() == list(trace)


def test_the_feature_of_a_word_and_where_it_fires(subject, dictionary, dataset):  # noqa: F811
    word = "".join(chr(t) for t in dataset[0]["tokens"][5:7])
    found = find_features(dictionary, subject, dataset, word, tokens=10 * SEQ)
    ids = np.stack([window["tokens"] for window in dataset])
    weight = np.stack([window["weight"] for window in dataset])
    codes = np.asarray(dictionary.encode(run(subject.model, ids)["blocks/1/mlp/in"])) * weight[..., None]
    pairs = (ids[:, :-1] == ord(word[0])) & (ids[:, 1:] == ord(word[1]))
    there = np.zeros(ids.shape, bool)  # the places of the word; one after another, not one over the other
    for row, hits in enumerate(pairs):
        last = -2
        for place in np.flatnonzero(hits):
            if place > last:
                there[row, place : place + 2] = True
                last = place + 1
    there &= weight > 0
    for feature, score in found:
        size = np.abs(codes[..., feature])
        p, r = size[there].sum() / size.sum(), (size[there] > 0).mean()
        assert score == pytest.approx(2 * p * r / (p + r), rel=1e-4)
    assert [score for _, score in found] == sorted([score for _, score in found], reverse=True)
    best = found[0][0]
    contexts = top_contexts(dictionary, subject, dataset, [best], contexts=3, tokens=10 * SEQ)[best]
    assert contexts[0].activations[contexts[0].peak] == pytest.approx(np.abs(codes[..., best]).max(), rel=1e-4)
    line = str(contexts[0])
    assert f"[[{contexts[0].tokens[contexts[0].peak]}]]" in line and "\n" not in line
    with pytest.raises(UserError, match="does not occur"):
        find_features(dictionary, subject, "abc", "xyz")


def test_the_logits_of_a_feature_are_the_extremes_of_its_direct_path(subject, dictionary):  # noqa: F811
    vector = np.asarray(dictionary.decoder, np.float32)[7:8] * float(dictionary.output_scale)
    logits = direct_logits(subject.model, "blocks/1/mlp/out", vector)[0]
    raised, lowered = logits_of(dictionary, subject, 7, count=3)
    assert [value for _, value in raised] == pytest.approx(sorted(logits)[::-1][:3])
    assert [value for _, value in lowered] == pytest.approx(sorted(logits)[:3])
    with pytest.raises(UserError, match="feature=128 is not"):
        logits_of(dictionary, subject, 128)
