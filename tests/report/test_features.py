"""Feature statistics against direct computation, on a planted model whose neurons are the features."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import ReLU, TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.evaluation.features.peaks import collect
from jaxinterp.evaluation.features.vectors import direct_logits, neuron_cosines, row_cosines, unit
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.run import run
from jaxinterp.models.tiny import TINY, planted_transformer
from jaxinterp.report.content import Report
from jaxinterp.report.features import BINS, choose, feature_pages
from jaxinterp.report.page import write_report
from jaxinterp.report.passages import AROUND
from tests.report.as_dictionary import as_dictionary

SITE = "blocks/1/mlp"
WINDOWS, SEQ = 10, 64


@pytest.fixture(scope="module")
def subject() -> Subject:
    config = dataclasses.replace(TINY, layers=2)
    model = eqx.filter_jit(planted_transformer)(jax.random.key(0), config)
    return Subject(model, byte_tokenizer(), "planted")


@pytest.fixture(scope="module")
def dataset() -> list[dict[str, np.ndarray]]:
    """Windows of random printable bytes, two documents each; position 0 has weight 0."""
    random = np.random.default_rng(1)
    weight = np.ones(SEQ, np.float32)
    weight[0] = 0
    return [
        {
            "tokens": random.integers(32, 127, SEQ).astype(np.int32),
            "weight": weight,
            "document": (2 * index + (np.arange(SEQ) >= 40)).astype(np.int32),
        }
        for index in range(WINDOWS)
    ]


@pytest.fixture(scope="module")
def dictionary(subject: Subject) -> Dictionary:
    return as_dictionary(subject, Sites(f"{SITE}/in", f"{SITE}/out"), ReLU())


@pytest.fixture(scope="module")
def codes(subject: Subject, dataset: list, dictionary: Dictionary) -> np.ndarray:
    """[window, seq, features], computed at once and with weights applied: what the streamed statistics must equal."""
    tokens = jnp.asarray(np.stack([window["tokens"] for window in dataset]))
    read = eqx.filter_jit(lambda model, tokens: run(model, tokens)[f"{SITE}/in"])
    dense = dictionary.encode(read(subject.model, tokens)).dense()
    return np.asarray(dense) * np.stack([window["weight"] for window in dataset])[..., None]


@pytest.fixture(scope="module", params=["one batch", "many batches"])
def measured(request, subject: Subject, dataset: list, dictionary: Dictionary):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many batches":  # of 3 windows, the last one filled up
            patch.setattr("jaxinterp.evaluation.features.peaks.MOST_CODES", 3 * SEQ * dictionary.features)
        return feature_pages(dictionary, subject, dataset, features=200, contexts=4, tokens=WINDOWS * SEQ)


def test_densities_equal_a_direct_computation(measured, codes: np.ndarray) -> None:
    densities, _ = measured
    expected = (codes != 0).sum((0, 1)) / (WINDOWS * (SEQ - 1))
    assert 0.01 < expected[:-1].mean() < 0.3, "the planted features should be sparse but alive"
    np.testing.assert_allclose(densities, expected, atol=1e-12)
    assert densities[-1] == 0


def test_every_live_feature_and_no_dead_one_has_a_page(measured, codes: np.ndarray) -> None:
    densities, pages = measured
    assert [page.index for page in pages] == list(np.flatnonzero(densities > 0))
    assert all(page.density == densities[page.index] for page in pages)


def test_contexts_are_the_highest_peaks_of_distinct_windows(measured, codes: np.ndarray, dataset: list) -> None:
    _, pages = measured
    for page in pages:
        own = codes[..., page.index]
        best = np.sort(own.max(axis=1))[::-1][:4]
        shown = [context.activations[context.peak] for context in page.contexts]
        np.testing.assert_allclose(shown, best[best > 0], rtol=1e-5)
        np.testing.assert_allclose(page.max_activation, own.max(), rtol=1e-5)
        window, place = np.unravel_index(own.argmax(), own.shape)
        top = page.contexts[0]
        assert top.tokens[top.peak] == chr(dataset[window]["tokens"][place])


def test_a_context_is_the_text_around_the_peak_within_its_document(measured, codes: np.ndarray, dataset: list) -> None:
    _, pages = measured
    cut = 0
    for page in pages:
        own = codes[..., page.index]
        window, place = np.unravel_index(own.argmax(), own.shape)
        document = dataset[window]["document"]
        inside = [
            spot
            for spot in range(max(0, place - AROUND), min(SEQ, place + AROUND + 1))
            if document[spot] == document[place]
        ]
        top = page.contexts[0]
        assert "".join(top.tokens) == "".join(chr(dataset[window]["tokens"][spot]) for spot in inside)
        np.testing.assert_allclose(top.activations, own[window, inside], rtol=1e-4, atol=1e-5)
        assert top.peak == inside.index(place)
        cut += len(inside) < min(SEQ, place + AROUND + 1) - max(0, place - AROUND)
    assert cut > 0, "no context touched a document boundary: the test does not test it"


def test_histogram_counts_every_activation_once(measured, codes: np.ndarray) -> None:
    _, pages = measured
    for page in pages:
        own = codes[..., page.index]
        assert sum(page.histogram_counts) == (own != 0).sum()
        assert len(page.histogram_edges) == BINS + 1
        half = page.histogram_edges[BINS // 2]
        assert sum(page.histogram_counts[BINS // 2 :]) == pytest.approx((own > half).sum(), abs=1)


def test_features_of_the_planted_mlp_are_its_neurons(measured) -> None:
    _, pages = measured
    for page in pages:
        nearest = page.neurons[0]
        assert nearest.index == page.index
        assert nearest.write_cosine == pytest.approx(1, abs=1e-5)
        assert nearest.read_cosine == pytest.approx(1, abs=1e-5)
        assert abs(page.neurons[1].write_cosine) < 0.9


def test_features_that_are_asked_for_are_shown_in_that_order(
    measured, dictionary: Dictionary, subject, dataset
) -> None:
    """Kind I: `features=[606]` failed. The last feature is dead: it has a page without contexts."""
    by_index = {page.index: page for page in measured[1]}
    dead = dictionary.decoder.shape[0] - 1
    wanted = [list(by_index)[5], dead, list(by_index)[2]]
    densities, pages = feature_pages(dictionary, subject, dataset, features=wanted, contexts=4)
    assert [page.index for page in pages] == wanted
    for page in (pages[0], pages[2]):  # cosines with neurons are sums whose order depends on how many are shown
        assert dataclasses.replace(page, neurons=()) == dataclasses.replace(by_index[page.index], neurons=())
        assert page.neurons[0].index == page.index
    assert pages[1].contexts == () and pages[1].density == 0
    np.testing.assert_array_equal(densities, measured[0])


@pytest.mark.parametrize(
    ("features", "message"),
    [([606], "606 is not an index of a feature, 0 to"), ([1, 1], "names a feature twice"), ([], "names no feature"),
     ([-1], "-1 is not an index"), ([True], "True is not an index"), (0, "features=0 must be at least 1")],
)  # fmt: skip
def test_features_that_are_not_there_are_refused(features, message, dictionary: Dictionary, subject, dataset) -> None:
    with pytest.raises(UserError, match=message):
        feature_pages(dictionary, subject, dataset, features=features)


def test_read_write_cosine(measured, dictionary: Dictionary) -> None:
    _, pages = measured
    page = pages[3]
    read, write = np.asarray(dictionary.encoder)[page.index], np.asarray(dictionary.decoder)[page.index]
    expected = read @ write / np.linalg.norm(read) / np.linalg.norm(write)
    assert page.read_write_cosine == pytest.approx(float(expected), abs=1e-6)


def test_logits_equal_the_derivative_of_the_unembedding(subject: Subject, dictionary: Dictionary, measured) -> None:
    """A step along a write vector, through the final norm with its scale held at 1, and the unembedding."""
    page = measured[1][0]
    write = dictionary.decoder[page.index]
    moved = subject.model.unembed(write * (subject.model.final_norm.weight + subject.model.final_norm.offset))
    moved = np.asarray(moved - moved.mean())
    assert page.raised[0][1] == pytest.approx(moved.max(), rel=1e-4)
    assert page.lowered[0][1] == pytest.approx(moved.min(), rel=1e-4)
    assert page.raised[0][0] == subject.tokenizer.token_text(int(moved.argmax()))
    assert [logit for _, logit in page.raised] == sorted((logit for _, logit in page.raised), reverse=True)


def test_logits_follow_post_norm_and_layer_norm(subject: Subject, dictionary: Dictionary) -> None:
    vectors = np.asarray(dictionary.decoder)[:5]
    plain = direct_logits(subject.model, f"{SITE}/out", vectors)
    assert plain is not None and np.abs(plain.mean(axis=1)).max() < 1e-5
    post = eqx.tree_at(lambda norm: norm.weight, subject.model.final_norm, 3 * jnp.ones(TINY.d_model))
    model = eqx.tree_at(lambda m: m.blocks[1].mlp_post_norm, subject.model, post, is_leaf=lambda leaf: leaf is None)
    np.testing.assert_allclose(direct_logits(model, f"{SITE}/out", vectors), 3 * plain, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(direct_logits(model, f"{SITE}/added", vectors), plain, rtol=1e-5, atol=1e-5)
    layer_norm = dataclasses.replace(subject.model.final_norm, kind="layer")
    layer = eqx.tree_at(lambda m: m.final_norm, subject.model, layer_norm)
    shifted = direct_logits(layer, f"{SITE}/out", vectors + 7.0)
    np.testing.assert_allclose(shifted, direct_logits(layer, f"{SITE}/out", vectors), rtol=1e-3, atol=1e-3)


def test_logits_are_per_unit_of_activation_in_the_models_units(subject, dataset, dictionary, measured) -> None:
    doubled = eqx.tree_at(lambda d: d.output_scale, dictionary, jnp.asarray(2.0))
    _, pages = feature_pages(doubled, subject, dataset, features=200, contexts=1, tokens=WINDOWS * SEQ)
    assert pages[0].raised[0][1] == pytest.approx(2 * measured[1][0].raised[0][1], rel=1e-4)


def test_sites_that_do_not_fit_give_nothing(subject: Subject) -> None:
    vectors = np.ones((2, TINY.d_model), np.float32)
    assert direct_logits(subject.model, f"{SITE}/in", vectors) is None
    assert direct_logits(object(), f"{SITE}/out", vectors) is None
    assert neuron_cosines(subject.model, f"{SITE}/pre", vectors) is None
    hidden = np.eye(TINY.d_mlp, dtype=np.float32)[:2]
    np.testing.assert_array_equal(neuron_cosines(subject.model, f"{SITE}/hidden", 5 * hidden), hidden)
    through = direct_logits(subject.model, f"{SITE}/hidden", hidden)
    rows = np.asarray(subject.model.blocks[1].mlp.down_proj.weight)[:2]
    np.testing.assert_allclose(through, direct_logits(subject.model, f"{SITE}/out", rows), rtol=1e-5, atol=1e-5)
    assert row_cosines(vectors, np.ones((2, 3), np.float32)) is None
    assert unit(np.zeros((1, 3), np.float32)).tolist() == [[0, 0, 0]]


def test_choice_spreads_over_density_and_leaves_out_the_dead() -> None:
    densities = np.array([0.0] * 20 + list(np.geomspace(1e-4, 0.5, 80)))
    chosen = choose(densities, 8, seed=3)
    assert len(chosen) == 8 and len(set(chosen.tolist())) == 8 and densities[chosen].min() > 0
    groups = np.sort((chosen - 20) // 10)
    assert groups.tolist() == list(range(8)), "one of each tenth of the live features"
    assert choose(densities, 8, seed=3).tolist() == chosen.tolist()
    assert choose(densities, 8, seed=4).tolist() != chosen.tolist()
    assert choose(densities, 500).tolist() == list(range(20, 100))
    assert choose(np.zeros(4), 3).size == 0


def test_topk_codes_batches_and_the_token_limit(subject: Subject, dataset: list, dictionary: Dictionary) -> None:
    sparse = as_dictionary(subject, dictionary.sites, TopK(4))
    batch = {name: np.stack([window[name] for window in dataset]) for name in dataset[0]}
    densities, pages = feature_pages(sparse, subject, [batch], features=3, contexts=2, tokens=4 * SEQ)  # of 10 windows
    assert len(pages) == 3 and all(len(page.contexts) <= 2 for page in pages)
    tokens = jnp.asarray(batch["tokens"][:4])
    codes = eqx.filter_jit(lambda model, tokens: sparse.encode(run(model, tokens)[f"{SITE}/in"]))(subject.model, tokens)
    kept, active = np.asarray(codes.indices)[:, 1:], np.asarray(codes.values)[:, 1:] > 0
    assert active.sum(axis=-1).max() == 4
    fired = np.bincount(kept[active], minlength=sparse.features)
    np.testing.assert_allclose(densities, fired / (4 * (SEQ - 1)), atol=1e-12)


def test_a_dataset_with_a_length_is_sampled(dataset: list) -> None:
    def read(data, seed: int, tokens: int = 3 * SEQ) -> list[int]:
        return [int(window["document"][0]) // 2 for window in collect(data, tokens, seed)]

    assert read(iter(dataset), 0) == read(iter(dataset), 1) == [0, 1, 2], "of an iterator the beginning is read"
    samples = [read(dataset, seed) for seed in range(5)]
    assert all(len(set(sample)) == 3 and sample == sorted(sample) for sample in samples)
    assert len(set(map(tuple, samples))) > 1 and read(dataset, 0) == samples[0]
    assert read(dataset, 0, 10**9) == list(range(WINDOWS)) and len(read(dataset, 0, 1)) == 1


def test_no_live_feature_gives_no_page(subject: Subject, dataset: list, dictionary: Dictionary) -> None:
    silent = eqx.tree_at(lambda d: d.encoder_bias, dictionary, jnp.full(dictionary.features, -1e9))
    densities, pages = feature_pages(silent, subject, dataset[:1])
    assert pages == () and not densities.any()


class Bare(eqx.Module):
    """A decomposition without read and write vectors."""

    inside: Dictionary

    @property
    def sites(self):
        return self.inside.sites

    @property
    def target_mean(self):
        return self.inside.target_mean

    def encode(self, x):
        return self.inside.encode(x)

    def decode(self, codes, x=None):
        return self.inside.decode(codes, x)

    def __call__(self, x):
        return self.inside(x)


def test_bad_input_is_refused(subject: Subject, dataset: list, dictionary: Dictionary) -> None:
    with pytest.raises(UserError, match="features=0"):
        feature_pages(dictionary, subject, dataset, features=0)
    with pytest.raises(UserError, match="not one held-out window"):
        feature_pages(dictionary, subject, [])
    with pytest.raises(UserError, match="no encoder and decoder"):
        feature_pages(Bare(dictionary), subject, dataset)


def test_pages_of_a_model_without_tokenizer_can_be_written(
    measured, dataset: list, subject, dictionary, tmp_path
) -> None:
    bare = Subject(subject.model, None, "bare")
    densities, pages = feature_pages(dictionary, bare, dataset, features=2, contexts=1)
    assert pages[0].contexts[0].tokens[0].startswith("[")
    path = write_report(Report("t", "s", {}, [], [], densities, (*pages, *measured[1])), tmp_path / "report.html")
    assert f'id="feature-{pages[0].index}"' in path.read_text()


def test_weaker_firings_are_shown_by_quantile_from_windows_of_their_own(measured, codes: np.ndarray) -> None:
    _, pages = measured
    for page in pages[:20]:
        values = np.sort(codes[..., page.index][codes[..., page.index] != 0])
        for name, contexts in page.quantiles:
            for context in contexts:
                assert np.isclose(context.activations[context.peak], values, rtol=1e-4).any(), name
        shown = [c.tokens for c in (*page.contexts, *(c for _, group in page.quantiles for c in group))]
        assert len(shown) == len(set(shown))
    busiest = max(pages, key=lambda page: page.density)
    ((_, tenth), (_, middle), *_), values = busiest.quantiles, codes[..., busiest.index]
    median = np.median(values[values != 0])
    distances = [abs(c.activations[c.peak] - median) for c in (*middle, *tenth)]
    assert max(distances[: len(middle)]) < min(distances[len(middle) :]), "broken: the strongest again"


def test_what_later_layers_make_of_a_feature(subject, dataset, dictionary, codes) -> None:
    """Mean change of log-probability where it fires, in the windows where it peaks, by an edit of the MLP's output."""
    feature = int(np.argmax((codes != 0).sum((0, 1))))
    sizes = {"features": [feature], "contexts": 2, "tokens": WINDOWS * SEQ}
    _, (page,) = feature_pages(dictionary, subject, dataset, later=2, **sizes)
    _, (plain,) = feature_pages(dictionary, subject, dataset, **sizes)
    assert plain.later_raised == () and plain.raised == page.raised
    peaks = np.argsort(-codes[..., feature].max(1))[:2]
    tokens = jnp.asarray(np.stack([dataset[each]["tokens"] for each in peaks]))
    read = run(subject.model, tokens)[f"{SITE}/in"]
    part = dictionary.encode(read).dense()[..., feature, None] * dictionary.decoder[feature]
    log_p = [
        jax.nn.log_softmax(run(subject.model, tokens, edits=edits).logits)
        for edits in ({}, {f"{SITE}/out": lambda y: y - part})
    ]
    fires = codes[peaks][..., feature] != 0
    expected = np.asarray(log_p[0] - log_p[1])[fires].mean(0)
    np.testing.assert_allclose([nats for _, nats in page.later_raised], np.sort(expected)[::-1][:8], atol=2e-5)
    np.testing.assert_allclose([nats for _, nats in page.later_lowered], np.sort(expected)[:8], atol=2e-5)
    assert page.later_raised != page.raised
    with pytest.raises(UserError, match="later=-1"):
        feature_pages(dictionary, subject, dataset, later=-1)
