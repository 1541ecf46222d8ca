"""End-to-end terms: a model whose MLP mostly writes where nobody looks, and where a small dictionary then goes.

Half of the neurons write three times as loud, into dimensions that the unembedding does not read. A dictionary trained
to reconstruct spends its k features on them; one trained on the model's predictions does not.
"""

import dataclasses

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.data.activations import harvest
from jaxinterp.decompositions.cross_layer import PerLayer
from jaxinterp.decompositions.exact import exact_transcoder
from jaxinterp.methods import GradientSparseAutoencoder, SparseAutoencoder, Transcoder
from jaxinterp.models.edits import SetTo
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.models.tiny import TINY, planted_transformer
from jaxinterp.objectives import l1, reconstruction, scale, total
from jaxinterp.objectives.end_to_end import counted, cross_entropy, divergence, spliced
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh

CONFIG = dataclasses.replace(TINY, vocab_size=64, d_model=32, layers=2, heads=2, kv_heads=2, d_mlp=64)
SITE = "blocks/1/mlp"
SIZES = {"site": SITE, "steps": 100, "batch_size": 256, "buffer_batches": 4, "log_every": 50}
METHOD = Transcoder(features=32, k=3, learning_rate=1e-2, auxk=0.0)


@pytest.fixture(scope="module")
def subject():
    """Neurons 0..31 of the last MLP write to dimensions 0..15, which the unembedding does not read."""
    model = planted_transformer(jax.random.key(0), CONFIG)
    unread, loud = jnp.arange(32) < 16, jnp.arange(64) < 32
    weight = model.blocks[1].mlp.down_proj.weight * jnp.where(loud[:, None], 3.0, 1.0)
    weight = jnp.where(loud[:, None] == unread, weight, 0.0)
    unembedding = jnp.where(unread[:, None], 0.0, model.unembedding.weight)
    places = lambda model: (model.blocks[1].mlp.down_proj.weight, model.unembedding.weight)
    return Subject(eqx.tree_at(places, model, (weight, unembedding)), None, "half unread")


def text(seed, windows):
    rng = np.random.default_rng(seed)
    weight = np.ones(32, np.float32)
    weight[0] = 0
    rows = [
        {"tokens": rng.integers(0, 64, 32, np.int32), "weight": weight, "document": np.full(32, i, np.int32)}
        for i in range(windows)
    ]
    return grain.MapDataset.source(rows)


@pytest.fixture(scope="module")
def heldout():
    data = text(1, 64)
    return {name: jnp.asarray(np.stack([data[i][name] for i in range(64)])) for name in ("tokens", "weight")}


def measure(decomposition, subject, windows):
    """(KL, cross-entropy) of the spliced model on windows, without the code under test."""
    tokens, weight = windows["tokens"], windows["weight"]
    clean = run(subject.model, tokens)
    site = decomposition.sites.writes
    guess = jnp.where(weight[..., None] > 0, decomposition(clean[decomposition.sites.reads]), clean[site])
    p, q = (
        jax.nn.log_softmax(logits[:, :-1])
        for logits in (clean.logits, run(subject.model, tokens, edits={site: SetTo(guess)}).logits)
    )
    counts = weight[:, :-1] * weight[:, 1:]
    nll = -jnp.take_along_axis(q, tokens[:, 1:, None], -1)[..., 0]
    kl = jnp.sum(jnp.exp(p) * (p - q), -1)
    return tuple(float(jnp.sum(values * counts) / jnp.sum(counts)) for values in (kl, nll))


@pytest.fixture(scope="module")
def trained(subject, heldout):
    """(KL, cross-entropy) on held-out tokens by what was trained: the same size and steps."""
    objectives = {
        "reconstruction": None,
        "kl": total(divergence()),
        "ce": total(cross_entropy()),
        "flipped": total(scale(divergence(), -1.0)),
    }
    found = {}
    for name, objective in objectives.items():
        method = dataclasses.replace(METHOD, objective=objective)
        found[name] = measure(fit(method, subject, text(0, 512), **SIZES).decomposition, subject, heldout)
    return found


@pytest.mark.slow
def test_training_on_kl_beats_reconstruction_in_kl(trained):
    """Measured over three seeds: 0.66 to 0.69 of it."""
    assert trained["kl"][0] < 0.8 * trained["reconstruction"][0]


@pytest.mark.slow
def test_training_on_cross_entropy_beats_reconstruction_in_cross_entropy(trained):
    """Measured: 4.20 against 4.41 nats."""
    assert trained["ce"][1] < trained["reconstruction"][1] - 0.1


@pytest.mark.slow
def test_the_flipped_sign_fails(trained):
    """The negative control of the same threshold; measured: 500 times as much."""
    assert trained["flipped"][0] > 10 * trained["reconstruction"][0]


def batch_of(subject, windows, decomposition):
    trace = run(subject.model, windows["tokens"])
    arrays = {name: trace[name].reshape(-1, 32) for name in decomposition.sites.names()}
    return make_batch(arrays, windows["weight"].reshape(-1), decomposition.sites, windows=windows)


def test_the_terms_equal_their_definitions(subject, heldout):
    dictionary = exact_transcoder(subject.model.blocks[0].mlp, SITE)  # of another layer: far from exact
    kl, ce = measure(dictionary, subject, heldout)
    batch = batch_of(subject, heldout, dictionary)
    objective = total(divergence(), scale(cross_entropy(), 0.5))
    loss, metrics = objective(dictionary, batch, jax.random.key(0), model=subject.model)
    assert float(metrics["kl"].value()) == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    assert float(metrics["ce"].value()) == pytest.approx(ce, rel=1e-4)
    assert float(loss) == pytest.approx(kl + 0.5 * ce, rel=1e-4)
    document = jnp.broadcast_to(jnp.arange(32) // 8, heldout["tokens"].shape)
    assert float(counted(heldout)[0].sum()) == 30
    assert float(counted(heldout | {"document": document})[0].sum()) == 27


def test_a_dictionary_that_is_the_mlp_has_no_divergence_and_no_gradient(subject, heldout):
    exact = exact_transcoder(subject.model.blocks[1].mlp, SITE)
    batch = batch_of(subject, heldout, exact)

    def loss(decoder):
        changed = eqx.tree_at(lambda d: d.decoder, exact, decoder)
        return total(divergence())(changed, batch, jax.random.key(0), model=subject.model)[0]

    value, gradient = jax.value_and_grad(loss)(exact.decoder)
    assert abs(float(value)) < 1e-6 and float(jnp.abs(gradient).max()) < 1e-5
    away = exact.decoder.at[40].multiply(2.0)  # a neuron that the unembedding sees
    assert float(loss(away)) > 1e-5 and float(jnp.abs(jax.grad(loss)(away)[40]).max()) > 1e-5


def test_splicing_is_replacing_the_leaf(subject, heldout):
    tokens = heldout["tokens"]
    first = exact_transcoder(subject.model.blocks[1].mlp, "blocks/0/mlp")
    second = exact_transcoder(subject.model.blocks[0].mlp, "blocks/1/mlp")
    both = replace(subject.model, {"blocks/0/mlp": first, "blocks/1/mlp": second})
    one = replace(subject.model, {"blocks/1/mlp": second})
    np.testing.assert_allclose(spliced(second, subject.model, tokens), run(one, tokens).logits, atol=1e-4)
    together = spliced(PerLayer((first, second)), subject.model, tokens)
    np.testing.assert_allclose(together, run(both, tokens).logits, atol=1e-4)
    assert float(jnp.abs(together - run(one, tokens).logits).max()) > 0.1
    nowhere = spliced(second, subject.model, tokens, jnp.zeros(tokens.shape))
    np.testing.assert_array_equal(nowhere, run(subject.model, tokens).logits)


@pytest.mark.slow
def test_any_dictionary_method_trains_end_to_end_and_the_same_on_a_mesh(subject):
    """Invariant 5, with the model in the loop: an autoencoder of the hidden activations, and a transcoder with L1."""
    sizes = SIZES | {"steps": 20, "log_every": 1}
    hidden = SparseAutoencoder(features=32, k=3, array="hidden", learning_rate=1e-2, objective=total(divergence()))
    history = fit(hidden, subject, text(0, 64), **sizes).history
    assert history[-1]["kl"] < 0.9 * history[0]["kl"]
    objective = total(divergence(), scale(reconstruction(), 0.1), scale(l1(), 1e-4))
    method = dataclasses.replace(METHOD, objective=objective)
    one = fit(method, subject, text(0, 64), **sizes)
    many = fit(method, subject, text(0, 64), **sizes, mesh=make_mesh(2, 4))
    assert one.history[-1]["kl"] < 0.9 * one.history[0]["kl"]
    for name, leaf in named_leaves(one.decomposition).items():
        other = np.asarray(named_leaves(many.decomposition)[name])
        np.testing.assert_allclose(other, leaf, rtol=0, atol=1e-4, err_msg=name)


def test_a_dictionary_that_reads_a_gradient_does_without_it_in_the_model(subject, heldout):
    method = GradientSparseAutoencoder(features=32, k=3, objective=total(divergence(), cross_entropy()))
    sites = method.needs(SITE)
    rows = harvest(subject.model, heldout, sites.names()).flat()
    batch = make_batch(rows.arrays, rows.weight, sites, windows=heldout)
    dictionary = method.recipe(1).init(jax.random.key(0), batch, subject.model).decomposition
    tokens = heldout["tokens"]
    alone = spliced(dictionary.dictionary, subject.model, tokens)
    np.testing.assert_array_equal(spliced(dictionary, subject.model, tokens), alone)
    state = method.recipe(1).init(jax.random.key(0), batch, subject.model)
    _, metrics = jax.jit(method.recipe(1).step)(state, batch, jax.random.key(0), subject.model)
    assert 0 < float(metrics["kl"].value()) < float(metrics["ce"].value())


def test_a_single_layer_of_several_is_spliced_too(subject, heldout):
    exact = exact_transcoder(subject.model.blocks[0].mlp, SITE)
    one = spliced(PerLayer((exact,)), subject.model, heldout["tokens"])
    np.testing.assert_array_equal(one, spliced(exact, subject.model, heldout["tokens"]))


def test_what_cannot_be_spliced_is_refused(subject, heldout):
    exact = exact_transcoder(subject.model.blocks[1].mlp, SITE)
    rows = make_batch({name: jnp.ones((4, 32)) for name in exact.sites.names()}, jnp.ones(4), exact.sites)
    with pytest.raises(UserError, match="needs the model and its windows"):
        total(divergence())(exact, rows, jax.random.key(0), model=subject.model)
    for reads, writes, words in [
        ("blocks/1/mlp/in", "blocks/0/mlp/out", "is written before 'blocks/1/mlp/in' is read"),
        ("blocks/7/mlp/in", "blocks/7/mlp/out", "no site 'blocks/7/mlp/out' in this model"),
    ]:
        backwards = dataclasses.replace(exact, sites=Sites(reads, writes))
        with pytest.raises(UserError, match=words):
            spliced(backwards, subject.model, heldout["tokens"])
