"""Codes are sites: ablating, differentiating and patching features are edits by name. Equations: `offered`."""

from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import BatchTopK, ReLU, TopK
from jaxinterp.decompositions.adaptive import GroupBias, TopAFA
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer, PerLayer
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.decompositions.in_model import run_with
from jaxinterp.decompositions.offered import Through
from jaxinterp.decompositions.stand_in import StandIn
from jaxinterp.methods.sparse.attention_sparse_autoencoder import AttentionStandIn
from jaxinterp.models.edits import Add, SetTo
from jaxinterp.models.rules import EXACT
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace, sites
from jaxinterp.models.transformer import TransformerConfig, initialise

CONFIG = TransformerConfig(
    vocab_size=50, d_model=16, layers=2, heads=2, kv_heads=1, head_dim=8, d_mlp=24, context=64, rotary_dimensions=8
)
LEAF, ARRAY = "blocks/0/mlp", "blocks/0/resid/post"
FEATURES = 20
TOKENS = jnp.arange(10).reshape(2, 5)


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def dictionary(activation, sites, *, d=16, features=FEATURES, skip=True):
    keys = iter(jax.random.split(jax.random.key(7), 6))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    return Dictionary(
        encoder=draw(features, d) / d**0.5,
        encoder_bias=0.1 * draw(features),
        decoder=draw(features, d) / d**0.5,
        decoder_bias=draw(d),
        skip=0.1 * draw(d, d) if skip else None,
        input_mean=jnp.full(d, 0.1),
        input_scale=jnp.asarray(1.3),
        output_mean=jnp.full(d, 0.2),
        output_scale=jnp.asarray(0.7),
        target_mean=jnp.zeros(d),
        target_variance=jnp.ones(()),
        tokens_since_fired=jnp.zeros(features, jnp.int32),
        activation=activation,
        sites=sites,
    )


OF_LEAF, OF_ARRAY = Sites(f"{LEAF}/in", f"{LEAF}/out"), Sites(ARRAY, ARRAY)


@cache
def model_of(dtype):
    return cast(initialise(CONFIG, jax.random.key(0)), dtype)


@cache
def places(dtype, activation=None):
    """By place: (model, edits that are always there, the array written, the name of the codes)."""
    activation = TopK(4) if activation is None else activation
    model = model_of(dtype)
    own = cast(dictionary(activation, OF_LEAF), dtype)
    sae = cast(dictionary(activation, OF_ARRAY, skip=False), dtype)
    keeping = replace(model, {LEAF: StandIn(model.blocks[0].mlp, own, keep_error=True)})
    return {
        "leaf": (replace(model, {LEAF: own}), {}, f"{LEAF}/out", f"{LEAF}/codes"),
        "leaf with error": (keeping, {}, f"{LEAF}/out", f"{LEAF}/codes"),
        "array": (model, {ARRAY: Through(sae)}, ARRAY, f"{ARRAY}/codes"),
        "array with error": (model, {ARRAY: Through(sae, keep_error=True)}, ARRAY, f"{ARRAY}/codes"),
    }, (own, sae)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-6), ("float64", 1e-12)])
def test_an_ablated_feature_is_what_it_wrote_taken_away(dtype, close):
    """out - s z_j D_j at every place; taking the neighbour's write vector instead is far off."""
    with jax.enable_x64(dtype == "float64"):
        by_place, (own, sae) = places(dtype)
        for place in by_place:
            check_ablation(*by_place[place], own if "leaf" in place else sae, close)


def check_ablation(model, edits, array, name, written, close):
    clean = run(model, TOKENS, edits=edits)
    codes = clean[name]
    feature = int(jnp.argmax(codes[0, 2]))
    ablated = run(model, TOKENS, edits=edits | {name: lambda z: z.at[0, 2, feature].set(0)})
    size = float(jnp.abs(clean[array]).max())
    change = clean[array] - ablated[array]

    def off(row):
        lost = written.output_scale * codes[0, 2, feature] * written.decoder[row]
        return float(jnp.abs(change[0, 2] - lost).max()) / size

    assert off(feature) < close and off((feature + 1) % FEATURES) > 1e-2
    assert float(jnp.abs(change.at[0, 2].set(0)).max()) < close * size
    assert codes.shape == (2, 5, FEATURES) and int((codes != 0).sum()) <= 4 * TOKENS.size


@pytest.mark.parametrize("place", ["leaf", "leaf with error", "array", "array with error"])
def test_the_gradient_by_codes_is_that_of_finite_differences(place):
    with jax.enable_x64(True):
        model, edits, _, name = places("float64")[0][place]

        @jax.jit
        def answer(delta):
            return run(model, TOKENS, edits=edits | {name: Add(delta)}, keep=()).logits[0, -1, 3]

        zero = jnp.zeros((2, 5, FEATURES))
        gradient = jax.jit(jax.grad(answer))(zero)
        direction = jax.random.normal(jax.random.key(4), zero.shape)
        finite = (answer(1e-5 * direction) - answer(-1e-5 * direction)) / 2e-5
        np.testing.assert_allclose(jnp.sum(gradient * direction), finite, rtol=1e-6)
        assert float(jnp.abs(gradient).max()) > 1e-3


def test_with_the_error_kept_the_derivative_upstream_is_that_of_the_leaf():
    """By what the leaf reads. Broken: a stopped gradient in the place of decode(c) counts the decomposition twice."""
    with jax.enable_x64(True):
        leaf = places("float64")[0]["leaf with error"][0].blocks[0].mlp
        x, direction = (jax.random.normal(jax.random.key(n), (1, 3, 16), jnp.float64) for n in (4, 5))

        def answer(x, edit):
            return jnp.sum(leaf(x, tap=lambda name, z: edit(z) if name == "codes" else z, rules=EXACT) ** 2)

        def stopped(x):  # y + decode(c') - stop_gradient(decode(c))
            written = leaf.decomposition.decode(leaf.decomposition.encode(x), x)
            return jnp.sum((leaf.mlp(x) + written - jax.lax.stop_gradient(written)) ** 2)

        for edit in (lambda z: z, lambda z: z.at[..., 3].add(0.1)):
            slope = partial(answer, edit=edit)
            finite = (slope(x + 1e-6 * direction) - slope(x - 1e-6 * direction)) / 2e-6
            np.testing.assert_allclose(jax.jvp(slope, (x,), (direction,))[1], finite, rtol=1e-6)
        exact = jax.jvp(partial(answer, edit=lambda z: z), (x,), (direction,))[1]
        broken = jax.jvp(stopped, (x,), (direction,))[1]
        assert abs(float(broken - exact)) > 1e-2 * abs(float(exact))


def test_nothing_changes_where_the_error_is_kept_and_nothing_is_edited():
    """Invariant 29. Bit-identical logits; an edited error is what it says."""
    by_place = places("float32")[0]
    base = model_of("float32")
    program = jax.jit(lambda model, edits: run(model, TOKENS, edits=edits, keep=()).logits)
    for place in ("leaf with error", "array with error"):
        model, edits, array, name = by_place[place]
        assert (program(model, edits) == program(base, {})).all(), place
        error = name.replace("codes", "error")
        bare = run(model, TOKENS, edits=edits | {error: SetTo(0.0)})
        without = by_place[place.removesuffix(" with error")]
        expected = run(without[0], TOKENS, edits=without[1])
        np.testing.assert_allclose(bare[array], expected[array], rtol=1e-5, atol=1e-5)
        assert float(jnp.abs(bare.logits - base(TOKENS)).max()) > 1e-2
    hidden = dictionary(TopK(4), Sites(f"{LEAF}/hidden", f"{LEAF}/hidden"), d=24, skip=False)
    inside = replace(base, {LEAF: StandIn(base.blocks[0].mlp, hidden, keep_error=True)})
    assert (program(inside, {}) == program(base, {})).all()
    trace = run(inside, TOKENS, edits={f"{LEAF}/codes": SetTo(0.0)})
    change = -hidden.output_scale * run(inside, TOKENS)[f"{LEAF}/codes"] @ hidden.decoder
    expected = run(base, TOKENS, edits={f"{LEAF}/hidden": Add(change)})
    np.testing.assert_allclose(trace.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_the_error_can_be_held_constant():
    """`stop_gradient` at `error`: the value of the leaf, the derivative of the decomposition."""
    leaf = places("float32")[0]["leaf with error"][0].blocks[0].mlp
    x, g = (jax.random.normal(jax.random.key(n), (1, 3, 16)) for n in (4, 5))
    hold = lambda name, value: jax.lax.stop_gradient(value) if name == "error" else value
    y, held = jax.vjp(lambda x: leaf(x, tap=hold, rules=EXACT), x)
    np.testing.assert_allclose(y, leaf.mlp(x), rtol=1e-4, atol=1e-5)
    alone = jax.vjp(leaf.decomposition, x)[1](g)[0]
    np.testing.assert_allclose(held(g)[0], alone, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(jax.vjp(leaf.mlp, x)[1](g)[0] - alone).max()) > 0.1


ACTIVATIONS = {
    "relu": ReLU(),
    "topk": TopK(4),
    "batch_topk": BatchTopK(4, jnp.asarray(0.3)),
    "top_afa": TopAFA(),
    "top_afa_cap": TopAFA(6),
    "jumprelu": JumpReLU.start(FEATURES, 0.3, bandwidth=0.1),
    "gated": Gated(*(0.3 * jax.random.normal(jax.random.key(n), (FEATURES,)) for n in range(3))),
    "group_bias": eqx.tree_at(
        lambda a: a.adapted_bias,
        GroupBias.start(FEATURES, groups=2, highest=0.5, lowest=0.1, every=1, rate=0.1),
        jnp.full(FEATURES, -0.2),
    ),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_codes_can_be_made_of_pre_activations(name):
    """from_pre(pre(x), x) are the codes of x; with one feature's pre-activation put low, all but its code stay."""
    own = dictionary(ACTIVATIONS[name], OF_LEAF)
    x = jax.random.normal(jax.random.key(3), (2, 5, 16))
    pre, codes = own.pre(x), own.encode(x).dense()
    assert set(pre) == ({"codes_pre", "gate_pre"} if name == "gated" else {"codes_pre"})
    np.testing.assert_allclose(own.from_pre(pre, x).dense(), codes, rtol=1e-5, atol=1e-6)
    assert 0 < int((codes != 0).sum()) < codes.size
    model = replace(model_of("float32"), {LEAF: own})
    clean = run(model, TOKENS)
    feature = int(jnp.argmax(jnp.sum(clean[f"{LEAF}/codes"], axis=(0, 1))))
    port = "gate_pre" if name == "gated" else "codes_pre"
    edited = run(model, TOKENS, edits={f"{LEAF}/{port}": lambda a: a.at[..., feature].set(-9.0)})
    assert (edited[f"{LEAF}/codes"][..., feature] == 0).all() and (clean[f"{LEAF}/codes"][..., feature] != 0).any()
    if name in ("relu", "jumprelu", "gated", "group_bias", "batch_topk"):
        others = np.delete(np.arange(FEATURES), feature)
        np.testing.assert_allclose(
            edited[f"{LEAF}/codes"][..., others], clean[f"{LEAF}/codes"][..., others], rtol=1e-5, atol=1e-6
        )


class Squares(eqx.Module):
    """An activation that knows nothing of pre-activations."""

    def codes(self, x, rows, bias, *, k, weight, training):
        return ReLU().codes(x**2, rows, bias, k=k, weight=weight, training=training)

    def after_step(self, metrics, step):
        return self


def test_what_has_no_pre_activations_says_so():
    model = replace(model_of("float32"), {LEAF: dictionary(Squares(), OF_LEAF)})
    assert f"{LEAF}/codes" in sites(model) and f"{LEAF}/codes_pre" not in sites(model)
    with pytest.raises(UserError, match="'codes_pre' where its activation can go on from it"):
        run(model, TOKENS, edits={f"{LEAF}/codes_pre": SetTo(0.0)})
    with pytest.raises(UserError, match="activation=Squares has no codes_pre"):
        model.blocks[0].mlp.from_pre({}, jnp.zeros((1, 16)))
    with pytest.raises(UserError, match="put it at 'blocks/0/resid/post'"):
        run(model, TOKENS, edits={"blocks/1/resid/post": Through(dictionary(TopK(4), OF_ARRAY))})
    with pytest.raises(UserError, match="replace the leaf 'blocks/0/mlp' by it instead"):
        run(model, TOKENS, edits={f"{LEAF}/out": Through(dictionary(TopK(4), OF_LEAF))})


def test_the_codes_of_an_attention_sublayer():
    """At z, heads beside each other: in the leaf's place and by an edit alike."""
    name = "blocks/1/attn/z"
    own = dictionary(TopK(4), Sites(name, name), skip=False)
    model = model_of("float32")
    there = replace(model, {"blocks/1/attn": AttentionStandIn(model.blocks[1].attn, own)})
    ablate = lambda z: z.at[..., 2].set(0)
    one = run(there, TOKENS, edits={"blocks/1/attn/codes": ablate})
    two = run(model, TOKENS, edits={name: Through(own), f"{name}/codes": ablate})
    np.testing.assert_allclose(one.logits, two.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(one["blocks/1/attn/codes"], two[f"{name}/codes"])


def cross_layer(dtype):
    keys = iter(jax.random.split(jax.random.key(11), 16))
    draw = lambda *shape: jax.random.normal(next(keys), shape)

    def layer(reach):
        return Layer(
            draw(FEATURES, 16) / 4, 0.1 * draw(FEATURES), draw(FEATURES, reach, 16) / 4, draw(16), jnp.zeros(16),
            jnp.full(16, 1.1), jnp.zeros(16), jnp.full(16, 0.8), jnp.zeros(16), jnp.ones(()),
            jnp.zeros(FEATURES, jnp.int32), TopK(4),
        )  # fmt: skip

    reads, writes = (tuple(f"blocks/{n}/mlp/{port}" for n in range(2)) for port in ("in", "out"))
    return cast(CrossLayer((layer(2), layer(1)), Sites(reads, writes)), dtype)


@pytest.mark.parametrize("keep_error", [False, True])
def test_a_cross_layer_feature_is_a_site(keep_error):
    """Ablated at its source, it is gone at both targets; the gradient is that of finite differences."""
    with jax.enable_x64(True):
        cross = cross_layer("float64")
        model = model_of("float64")
        go = lambda **how: run_with(cross, model, TOKENS, keep_error=keep_error, **how)
        clean = go()
        if keep_error:
            assert (clean.logits == run(model, TOKENS).logits).all()
        feature = int(jnp.argmax(clean["blocks/0/mlp/codes"][0, 2]))
        frozen = {"blocks/1/mlp/codes": SetTo(clean["blocks/1/mlp/codes"])}  # what the second source says stays
        if keep_error:
            frozen = {"blocks/1/mlp/in": SetTo(clean["blocks/1/mlp/in"])}
        ablate = {"blocks/0/mlp/codes": lambda z: z.at[0, 2, feature].set(0)}
        ablated = go(edits=ablate | frozen)
        for target in range(2):
            lost = cross.layers[target].output_scale * clean["blocks/0/mlp/codes"][0, 2, feature]
            change = (clean[f"blocks/{target}/mlp/out"] - ablated[f"blocks/{target}/mlp/out"])[0, 2]
            np.testing.assert_allclose(change, lost * cross.layers[0].decoder[feature, target], rtol=1e-9, atol=1e-12)

        @jax.jit
        def answer(delta):
            return go(edits={"blocks/0/mlp/codes": Add(delta)}, keep=()).logits[0, -1, 3]

        zero, direction = jnp.zeros((2, 5, FEATURES)), jax.random.normal(jax.random.key(4), (2, 5, FEATURES))
        finite = (answer(1e-6 * direction) - answer(-1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(jnp.sum(jax.grad(answer)(zero) * direction), finite, rtol=1e-6)


def test_several_layers_side_by_side_are_their_leaves():
    """PerLayer in one pass = each in its leaf, with the same edit; user edits of what is read and written hold."""
    parts = tuple(dictionary(TopK(4), Sites(f"blocks/{n}/mlp/in", f"blocks/{n}/mlp/out")) for n in range(2))
    model = model_of("float32")
    edits = {
        "blocks/0/mlp/codes": lambda z: z.at[..., 2].set(1.0),
        "blocks/1/mlp/in": Add(0.5),
        "blocks/1/mlp/out": lambda y: 2 * y,
        "blocks/1/mlp/codes_pre": Add(0.1),
    }
    one = run_with(PerLayer(parts), model, TOKENS, edits=edits)
    leaves = replace(model, {f"blocks/{n}/mlp": part for n, part in enumerate(parts)})
    two = run(leaves, TOKENS, edits=edits)
    np.testing.assert_allclose(one.logits, two.logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one["blocks/1/mlp/codes"], two["blocks/1/mlp/codes"], rtol=1e-4, atol=1e-5)


class Silent(eqx.Module):
    """The same decomposition without sites of its own: what a program costs without them."""

    inner: eqx.Module

    def __call__(self, x):
        return self.inner.decode(self.inner.encode(x), x).astype(x.dtype)


def compiled(function, *arguments):
    program = jax.jit(function).lower(*arguments).compile()
    return program.memory_analysis().temp_size_in_bytes, program.as_text()


def test_codes_that_nobody_asks_for_cost_nothing():
    """Invariant 29. N 2048, F 4608, TopK: temporary bytes as without sites, and no array of tokens x features."""
    tokens = jnp.zeros((32, 64), jnp.int32)
    model = model_of("float32")
    own = dictionary(TopK(8), OF_LEAF, features=4608)
    sae = dictionary(TopK(8), OF_ARRAY, features=4608, skip=False)
    elsewhere = {"blocks/1/mlp/out": Add(jnp.ones(16))}
    with_sites, without = replace(model, {LEAF: own}), replace(model, {LEAF: Silent(own)})
    whole = lambda text: any(f"[{shape}]" in text for shape in ("2048,4608", "4608,2048", "32,64,4608"))
    for edits in ({}, elsewhere):
        logits = lambda model, edits=edits: run(model, tokens, edits=edits).logits
        (ours, text), (theirs, _) = (compiled(logits, each) for each in (with_sites, without))
        assert ours == theirs and not whole(text)
    _, text = compiled(
        lambda model: run(model, tokens, edits={f"{LEAF}/codes": Add(jnp.ones(4608))}).logits, with_sites
    )
    assert whole(text), "what is looked for is found where codes are edited"
    at_array = lambda edit: compiled(lambda model: run(model, tokens, edits={ARRAY: edit}).logits, model)
    (ours, text), (theirs, _) = at_array(Through(sae)), at_array(Silent(sae))
    assert ours == theirs and not whole(text)


def test_a_cross_layer_pass_makes_no_dense_codes():
    tokens = jnp.zeros((32, 64), jnp.int32)
    parts = tuple(
        dictionary(TopK(8), Sites(f"blocks/{n}/mlp/in", f"blocks/{n}/mlp/out"), features=4608) for n in range(2)
    )
    model = model_of("float32")
    ours, text = compiled(lambda model: run_with(PerLayer(parts), model, tokens).logits, model)
    silent = {f"blocks/{n}/mlp": Silent(part) for n, part in enumerate(parts)}
    assert ours == compiled(lambda model: run(replace(model, silent), tokens).logits, model)[0]
    assert not any(f"[{shape}]" in text for shape in ("2048,4608", "4608,2048", "32,64,4608"))
