"""Every matrix of our models says how it is cut over several devices."""

import equinox as eqx
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float

from jaxinterp.core.trees import named_leaves
from jaxinterp.models.files.weights import skeleton
from jaxinterp.models.layers import Linear, cut_axes
from jaxinterp.models.transformer import Transformer, TransformerConfig

SIZES = {"vocab_size": 50, "d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "d_mlp": 24}
BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True, "norm_bias": True}
CONFIGS = {
    "gated": TransformerConfig(
        **SIZES, context=32, rotary_dimensions=8, query_key_norm=True, post_norms=True, tied=False
    ),
    "dense": TransformerConfig(**SIZES, context=32, gated=False, learned_positions=True, **BIASES),
    "encoder": TransformerConfig(
        **SIZES, context=32, gated=False, learned_positions=True, token_types=2, causal=False, head=False,
        pre_norms=False, sum_norms=True, embedding_norm=True, **BIASES,
    ),
}  # fmt: skip
OUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "unembedding")
WHOLE = ("embedding/position", "embedding/token_type")


def unplaced(model: Transformer) -> list[str]:
    """Matrices without a rule."""
    axes = cut_axes(model)
    return [
        name
        for name, leaf in named_leaves(model).items()
        if leaf.ndim > 1 and axes.get(name) is None and name not in WHOLE
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_matrix_of_our_models_has_a_rule(name: str) -> None:
    """Outputs of a sublayer's first maps with their biases, inputs of its last; tokens of the vocabulary."""
    model = skeleton(CONFIGS[name])
    assert unplaced(model) == []
    for leaf, axis in cut_axes(model).items():
        linear, _, field = leaf.rpartition("/")
        if leaf == "embedding/token":
            assert axis == 0
        elif leaf in WHOLE:
            assert axis is None
        elif linear.endswith(OUT):
            assert axis == (1 if field == "weight" else 0), leaf
        else:
            assert linear.endswith(("o_proj", "down_proj")), leaf
            assert axis == (0 if field == "weight" else None), leaf


class Renamed(eqx.Module):
    """A map with a matrix of its own, which says nothing of several devices."""

    matrix: Float[Array, "d_in d_out"]

    def __call__(self, x: Float[Array, "*axes d_in"]) -> Float[Array, "*axes d_out"]:
        return x @ self.matrix


@pytest.mark.parametrize("other", [Linear(jnp.zeros((16, 24)), None), Renamed(jnp.zeros((16, 24)))])
def test_a_matrix_without_a_rule_is_found(other: eqx.Module) -> None:
    """The broken variant: a layer that forgot to say how it is cut, and one that no rule knows."""
    model = eqx.tree_at(lambda model: model.blocks[1].mlp.up_proj, skeleton(CONFIGS["gated"]), other)
    field = "weight" if isinstance(other, Linear) else "matrix"
    assert unplaced(model) == [f"blocks/1/mlp/up_proj/{field}"]
