"""What a table of places may say, and what is refused before anything is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.adapters import Places, from_linen, from_nnx
from jaxinterp.models.adapters.flax_places import count_blocks
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites
from tests.models.flax_llamas import (
    CONFIG,
    LinenBlock,
    LinenLlama,
    LinenMLP,
    linen_params,
    nnx_llama,
    own_llama,
    random_tokens,
)

TOKENS = random_tokens()
PLACES = Places(block="layer_{i}", mlp="layer_{i}/mlp")


@pytest.fixture(scope="module")
def own():
    return own_llama()


@pytest.fixture(scope="module")
def llama(own):
    return nnx_llama(own)


def logits(model):
    return jax.jit(lambda model: run(model, TOKENS).logits)(model)


def started(module, **options):
    """The module's variables, random, without compiling its own start."""
    shapes = jax.eval_shape(lambda key: module.init(key, TOKENS, **options), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=0.5), jnp.float32), shapes)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (Places(mlp="blocks/{i}/mlp"), "mlp='blocks/{i}/mlp': .* no module 'blocks/0/mlp'; it has .*layers/{i}/mlp, "),
        (Places(mlp="layers/{i}/mlp", block="block/{i}"), "block of block 0: the model has no module 'block/0'"),
        (Places(mlp="layers/{i}/mlp", final_norm="ln_f"), "final_norm: the model has no module 'ln_f'"),
        (Places(mlp="layers/{i}/mlp", up="up", down="down"), "up of block 0: .* no module 'layers/0/mlp/up'"),
        (Places(mlp="layers/{i}/attention/q"), "maps .2, 3, 32. to .2, 3, 4, 8.: a leaf must keep the shape"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_by_what_the_model_has(llama, places, words):
    with pytest.raises(UserError, match=words):
        from_nnx(llama, places)


@pytest.mark.parametrize(
    ("places", "modules", "words"),
    [
        (Places(mlp="h/{i}/mlp"), ["h/0/mlp", "h/1/moe", "h/2/mlp"], "mlp of block 2 is there, but .* 'h/1/mlp'"),
        (Places(mlp="h/{i}/mlp", block="h/{i}"), ["h/0/mlp", "h/1/moe"], "block of block 1 is there, but .*'h/1/mlp'"),
        (Places(mlp="h_{i}/mlp_{i}"), ["h_0/mlp_0", "h_11/mlp_11"], "mlp of block 11 is there"),
    ],
)
def test_blocks_of_different_kinds_are_refused_and_not_lost(places, modules, words):
    paths = {*modules, *(path.rpartition("/")[0] for path in modules), "h"}
    with pytest.raises(UserError, match=words):
        count_blocks(places, paths)
    fewer = {path for path in paths if path.startswith(("h/0", "h_0"))} | {"h_0/mlp_1", "head/1/mlp", "h/1/mlp/x"}
    assert count_blocks(places, fewer) == 1


def test_a_table_without_a_number_is_refused():
    with pytest.raises(UserError, match="mlp='layers/mlp' does not say where the block's number stands"):
        Places(mlp="layers/mlp")


def test_the_given_model_stays_as_it_is(own):
    llama = nnx_llama(own)
    before = nnx.to_pure_dict(nnx.state(llama, nnx.Param))
    from_nnx(llama, Places(mlp="layers/{i}/mlp"))
    after = nnx.to_pure_dict(nnx.state(llama, nnx.Param))
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    assert not llama.layers[0].mlp.dropout.deterministic, "its dropout is on, as it was"


def last_logits(model, tokens):
    return model(tokens)[:, -1]


def pair(model, tokens):
    return model(tokens), None


def first_of_pair(model, tokens):
    return pair(model, tokens)[0]


def test_how_the_model_is_called_can_be_said(llama, own):
    places = Places(mlp="layers/{i}/mlp")
    with pytest.raises(UserError, match=r"to \(2, 50\): give call=function"):
        from_nnx(llama, places, call=last_logits)
    with pytest.raises(UserError, match="to tuple: give call=function"):
        from_nnx(llama, places, call=pair)
    model = from_nnx(llama, places, call=first_of_pair)
    np.testing.assert_allclose(logits(model), logits(own), rtol=1e-5, atol=1e-5)


class Masked(nnx.Module):
    """An MLP that is called with an array beside its input."""

    def __init__(self, mlp):
        self.mlp = mlp

    def __call__(self, x, mask):
        return self.mlp(x) * mask


class Flagged(nnx.Module):
    """An MLP that is called with a flag beside its input."""

    def __init__(self, mlp):
        self.mlp = mlp

    def __call__(self, x, *, negative):
        return -self.mlp(x) if negative else self.mlp(x)


class Around(nnx.Module):
    """A language model with one block, which hands `extra` on to its MLP."""

    def __init__(self, llama, wrap, calls=1, **extra):
        self.embed, self.head = llama.embed, llama.head
        self.layers = nnx.List([wrap(llama.layers[0].mlp)])
        self.calls, self.extra = calls, nnx.data(extra)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for _ in range(self.calls):
            x = self.layers[0](x, **self.extra)
        return self.head(x)


def test_arguments_beside_the_input(llama):
    """Flags are kept; an array, which no leaf is called with, is refused."""
    places = Places(mlp="layers/{i}")
    with pytest.raises(UserError, match="module 'layers/0' takes argument 'mask'"):
        from_nnx(Around(llama, Masked, mask=jnp.ones(())), places)
    negative, positive = (from_nnx(Around(llama, Flagged, negative=flag), places) for flag in (True, False))
    x = jnp.ones((2, CONFIG.d_model))
    np.testing.assert_array_equal(negative.blocks[0].mlp(x), -positive.blocks[0].mlp(x))
    assert float(jnp.abs(logits(negative) - logits(positive)).max()) > 0.1


class Remembered(nnx.Module):
    """An MLP whose hidden activations are computed again in the backward pass."""

    def __init__(self, mlp):
        self.mlp = mlp

    @nnx.remat
    def __call__(self, x):
        return self.mlp(x)


def test_what_runs_inside_a_transformation_is_refused_and_the_whole_of_it_is_not(llama):
    model = Around(llama, Remembered)
    with pytest.raises(UserError, match=r"module 'layers/0/mlp' runs inside a transformation \(remat"):
        from_nnx(model, Places(mlp="layers/{i}/mlp"))
    plain = from_nnx(Around(llama, lambda mlp: mlp), Places(mlp="layers/{i}"))
    np.testing.assert_allclose(logits(from_nnx(model, Places(mlp="layers/{i}"))), logits(plain), rtol=1e-6, atol=1e-6)


def test_a_module_that_is_called_twice_is_refused(llama):
    with pytest.raises(UserError, match="module 'layers/0' is called 2 times"):
        from_nnx(Around(llama, lambda mlp: mlp, calls=2), Places(mlp="layers/{i}"))


class LoopedLlama(nn.Module):
    """Blocks under a transformation of Linen's."""

    transform: str

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(CONFIG.vocab_size, CONFIG.d_model, name="embed")(tokens)
        if self.transform == "scan":
            scan = nn.scan(LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = scan(name="layers")(x)
        else:
            for index in range(CONFIG.layers):
                x, _ = nn.remat(LinenBlock)(name=f"layer_{index}")(x)
        return nn.Dense(CONFIG.vocab_size, use_bias=False, name="head")(x)


def test_transformed_blocks_are_refused():
    remat, scan = LoopedLlama("remat"), LoopedLlama("scan")
    with pytest.raises(UserError, match=r"module 'layer_0' runs inside a transformation \(remat"):
        from_linen(remat, started(remat), PLACES)
    with pytest.raises(
        UserError, match=r"the model has no module 'layer_0/mlp'; it has .*layers/mlp, layers/mlp/down_proj"
    ):
        from_linen(scan, started(scan), PLACES)


class SetupMLP(nn.Module):
    """Declares its parameters in `setup`, and takes a flag."""

    def setup(self):
        self.up = self.param("up", nn.initializers.lecun_normal(), (CONFIG.d_model, CONFIG.d_mlp))
        self.down = self.param("down", nn.initializers.lecun_normal(), (CONFIG.d_mlp, CONFIG.d_model))

    def __call__(self, x, deterministic):
        assert deterministic
        return nn.relu(x @ self.up) @ self.down


class SetupModel(nn.Module):
    """Gemma's ways: a norm behind the MLP, boxed parameters, a second collection, a keyword that must be given."""

    @nn.compact
    def __call__(self, tokens, *, deterministic):
        boxed = nn.with_partitioning(nn.initializers.normal(), ("vocab", None))
        embed = nn.Embed(CONFIG.vocab_size, CONFIG.d_model, embedding_init=boxed, name="embed")
        x = embed(tokens) * self.variable("scales", "scale", lambda: jnp.asarray(3.0)).value
        for index in range(2):
            x = x + nn.LayerNorm(name=f"post_{index}")(SetupMLP(name=f"mlp_{index}")(x, deterministic))
        return embed.attend(x)


def deterministic(model, tokens):
    return model(tokens, deterministic=True)


def test_linen_in_its_other_ways():
    module = SetupModel()
    variables = started(module, deterministic=True)
    places = Places(mlp="mlp_{i}", mlp_post_norm="post_{i}")
    model = from_linen(module, variables, places, call=deterministic)
    expected = module.apply(variables, TOKENS, deterministic=True)
    np.testing.assert_allclose(logits(model), expected, rtol=1e-6, atol=1e-6)
    trace = run(model, TOKENS)
    assert sites(model, "blocks/1/**") == [f"blocks/1/mlp{port}" for port in ("", "/in", "/out", "/added")]
    assert float(jnp.abs(trace["blocks/1/mlp/out"] - trace["blocks/1/mlp/added"]).max()) > 0.1
    names = list(named_leaves(model))
    assert "blocks/0/mlp/module/variables/params/up" in names and "body/variables/params/mlp_0/up" not in names
    with pytest.raises(UserError, match="has the collections up, down: give"):
        from_linen(LinenMLP(), {"up": 1, "down": 2}, PLACES)


def test_a_leaf_of_another_model_is_not_mistaken_for_a_place(own):
    """Paths inside a leaf may be those of the table: the leaf is a model of its own."""

    class Nested(nn.Module):
        @nn.compact
        def __call__(self, x):
            return LinenMLP(name="mlp_0")(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(CONFIG.vocab_size, CONFIG.d_model, name="embed")(tokens)
            for index in range(2):
                x = x + Nested(name=f"mlp_{index}")(x)
            return nn.Dense(CONFIG.vocab_size, name="head")(x)

    module = Outer()
    variables = started(module)
    model = from_linen(module, variables, Places(mlp="mlp_{i}"))
    np.testing.assert_allclose(logits(model), module.apply(variables, TOKENS), rtol=1e-6, atol=1e-6)
    assert len(sites(model, "blocks/*/mlp/in")) == 2


def test_a_linen_model_without_a_part_of_the_table_is_refused(own):
    with pytest.raises(UserError, match="attn of block 0: the model has no module 'layer_0/attn'"):
        from_linen(LinenLlama(), {"params": linen_params(own)}, dataclasses.replace(PLACES, attn="layer_{i}/attn"))
