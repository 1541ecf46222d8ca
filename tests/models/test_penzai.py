"""Penzai's variants, from their builders and with our loader's weights; what cannot be adapted is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from penzai import pz
from penzai.models.transformer.model_parts import TransformerBlock, TransformerFeedForward
from penzai.models.transformer.variants import llamalike_common

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.adapters import from_penzai, to_penzai
from jaxinterp.models.load import load
from jaxinterp.models.mlp import MLP
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace, select, sites
from jaxinterp.models.transformer import TransformerConfig
from tests.models.flax_llamas import filled, own_llama
from tests.models.model_files import GOLDENS

TOKENS = jnp.arange(24).reshape(2, 12) * 7 % 50
VARIANTS = ["llama", "mistral-window", "gemma", "gemma2", "gpt-neox"]
forward = jax.jit(lambda model, tokens: run(model, tokens))


@jax.jit
def penzai_logits(frozen, tokens):
    return frozen(pz.nx.wrap(tokens).tag("batch", "seq")).unwrap("batch", "seq", "vocabulary")


def llamalike(key=None, **options):
    """A small model from Penzai's builder."""
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=32,
        projection_dim=8,
        mlp_hidden_dim=48,
        num_decoder_blocks=2,
        vocab_size=50,
        mlp_variant="swiglu",
        **{"tie_embedder_and_logits": False} | options,
    )
    return llamalike_common.build_llamalike_transformer(config, key)


@pytest.fixture(scope="module")
def llama():
    return to_penzai(own_llama())


@pytest.mark.parametrize("name", VARIANTS)
def test_our_weights_in_penzais_layers_give_our_arrays(name):
    """Every variant, with the files of the parity tests, through our loader; as it was, and taken apart."""
    own = load(GOLDENS / name, dtype="float32").model
    whole = to_penzai(own)
    model = from_penzai(whole)
    inside = [f"{leaf}/{name}_proj" for leaf in sites(own, "blocks/*/attn") for name in "qkvo"]
    assert sites(model) == [name for name in sites(own) if name not in inside]
    tokens = TOKENS % own.config.vocab_size
    ours, theirs = forward(own, tokens), forward(model, tokens)
    for site, array in ours.arrays.items():
        np.testing.assert_allclose(theirs[site], array, rtol=1e-5, atol=1e-5, err_msg=site)
    np.testing.assert_allclose(theirs.logits, ours.logits, rtol=1e-5, atol=1e-5)
    untouched = penzai_logits(pz.freeze_params(whole), tokens)
    np.testing.assert_allclose(theirs.logits, untouched, rtol=2e-6, atol=5e-6)


def test_a_model_of_penzais_own_builder():
    """Weights in bfloat16, computed in float32: Penzai casts behind its embedding."""
    options = {"parameter_dtype": jnp.bfloat16}
    shapes = jax.eval_shape(lambda key: pz.freeze_params(llamalike(key, **options)), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape.shape, scale=0.2), shape.dtype)

    parameters = [
        pz.Parameter(value=jax.tree.map(draw, value.value), label=value.label)
        for value in pz.select(shapes).at_instances_of(pz.ParameterValue).get_sequence()
    ]
    whole = pz.bind_variables(llamalike(**options), parameters)
    model = from_penzai(whole)
    expected = penzai_logits(pz.freeze_params(whole), TOKENS)
    np.testing.assert_allclose(forward(model, TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert forward(model, TOKENS)["embed"].dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.blocks) if leaf.ndim > 1} == {"bfloat16"}
    assert select(model, "blocks/*/mlp").count() == 2


def test_a_tied_embedding_is_held_once():
    model = from_penzai(to_penzai(load(GOLDENS / "gemma", dtype="float32").model))
    shape = model.embedding[0].table.embeddings.value.data_array.shape
    tables = [name for name, leaf in named_leaves(model).items() if getattr(leaf, "shape", ()) == shape]
    assert tables == ["embedding/0/table/embeddings/value/data_array"]


NEOX = TransformerConfig(
    vocab_size=50, d_model=32, layers=1, heads=4, kv_heads=4, head_dim=8, d_mlp=48, context=32, activation="gelu",
    gated=False, norm="layer", norm_bias=True, norm_epsilon=0.1, parallel=True, rotary_dimensions=4, qkv_bias=True,
    attention_out_bias=True, mlp_bias=True, tied=False,
)  # fmt: skip


def test_every_norm_has_the_epsilon_of_the_file():
    """Penzai's converter leaves the final norm at 1e-6."""
    own = filled(NEOX)
    model = from_penzai(to_penzai(own))
    np.testing.assert_allclose(forward(model, TOKENS).logits, forward(own, TOKENS).logits, rtol=1e-5, atol=1e-5)
    narrow = filled(dataclasses.replace(NEOX, norm_epsilon=1e-6))
    assert float(jnp.abs(forward(narrow, TOKENS).logits - forward(own, TOKENS).logits).max()) > 0.01


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-llama3", "rotary_scaling=RopeScaling"),
        ("qwen3", "query_key_norm=True"),
        ("qwen2", "qkv_bias=True"),
        ("gpt2", "learned_positions=True"),
        ("gemma3", "local_rotary_base="),
        ("olmo2", "pre_norms=False"),
        ("bert-masked-lm", "pre_norms=False"),
        ("gpt-neox-sequential", "parallel=False"),
        ("mistral-full", "activation='gelu' .* is none of Penzai's: it has silu, gelu_tanh"),
    ],
)
def test_what_penzais_layers_cannot_compute_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        to_penzai(load(GOLDENS / name).model)


def test_a_replaced_leaf_is_not_converted():
    own = own_llama()
    with pytest.raises(UserError, match="blocks/1/mlp was replaced"):
        to_penzai(replace(own, {"blocks/1/mlp": lambda x: x}))
    assert isinstance(own.blocks[1].mlp, MLP)


def test_a_layer_stack_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"LayerStack: .* no layer has a name of its own: .* use_layer_stack=False"):
        from_penzai(llamalike(use_layer_stack=True))


def test_other_structures_are_refused_by_what_was_found(llama):
    blocks = pz.select(llama).at_instances_of(TransformerBlock)
    attentions = pz.select(llama).at_instances_of(pz.nn.Attention)
    layers = list(llama.body.sublayers)

    def with_layers(*layers):
        return dataclasses.replace(llama, body=pz.nn.Sequential(list(layers)))

    for model, words in [
        (llama.body, "a Sequential is not a penzai TransformerLM"),
        (llamalike(), "parameter 'transformer/.*' of this Penzai model has no value"),
        (blocks.apply(lambda block: TransformerBlock(block.sublayers[:1])), "block 0 .* holds Residual"),
        (with_layers(*layers[:2], pz.nn.Identity(), *layers[2:]), "in a row"),
        (with_layers(*layers[:-1]), "a final norm and a head"),
        (attentions.apply(lambda _: pz.nn.Identity()), "branch of RMSLayerNorm, Identity, in which one Attention was"),
    ]:
        with pytest.raises(UserError, match=words):
            from_penzai(model)


def test_a_feed_forward_of_another_make_keeps_its_inside_to_itself(llama):
    """Here with one more layer inside: its ports are there, and its names say no more."""
    feed_forwards = pz.select(llama).at_instances_of(TransformerFeedForward)
    changed = feed_forwards.apply(lambda layer: TransformerFeedForward([*layer.sublayers, pz.nn.Identity()]))
    model = from_penzai(changed)
    assert sites(model, "blocks/0/mlp/*") == [f"blocks/0/mlp/{port}" for port in ("in", "out", "added")]
    expected = forward(own_llama(), TOKENS).logits
    np.testing.assert_allclose(forward(model, TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
