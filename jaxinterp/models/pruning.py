"""Pruning a model: weights set to zero by masks, or neurons, experts and heads taken out, so that arrays get smaller.

    masks = {name: weight_mask(wanda(weight, norms), 0.5, within="output") for name, weight in ...}
    sparse = mask_weights(model, masks)                             # same shapes, zeros
    small = keep_neurons(model, {"blocks/0/mlp": [0, 3, 4], ...})   # smaller arrays, the same function as masking

Names are projections, `blocks/3/mlp/up_proj`; weights are `(d_in, d_out)`.

Published choices: magnitude within a matrix; Wanda within an output (2306.11695), N:M groups along the inputs; DaSS
within an input for gate and up, groups along the neurons (2405.01943).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.attention import Attention
from jaxinterp.models.layers import Linear, Norm
from jaxinterp.models.mixtures.moe_x import MoEX
from jaxinterp.models.mlp import MLP
from jaxinterp.models.selection import n_of_m, top_k
from jaxinterp.models.sites import replace, select
from jaxinterp.models.transformer import Transformer

Within = Literal["layer", "output", "input"]
Choice = Mapping[str, Sequence[int]]


def weight_mask(
    score: Float[Array | np.ndarray, "d_in d_out"],
    sparsity: float | tuple[int, int],
    *,
    within: Within,
) -> Bool[Array, "d_in d_out"]:
    """True where a weight is kept: the largest scores of each group.

    Args:
      sparsity: the share that goes, int(share * size of a group) of each, of equal scores the first, as in the code
        of Wanda and DaSS; or (n, m): n of every m neighbours stay (their code counts those that go).
      within: what a group is: the whole matrix, the weights of one output (neighbours along the inputs), or of one
        input (neighbours along the outputs). For (n, m) "layer" is refused.
    Raises:
      UserError: the sparsity is out of range, or m does not divide the side.
    """
    score = jnp.asarray(score)
    rows = score.T if within == "output" else score
    if isinstance(sparsity, tuple):
        if within == "layer":
            raise UserError(f"sparsity={sparsity} needs within='output' or 'input': groups lie along one side.")
        mask = n_of_m(rows, *sparsity)
    else:
        if not 0 <= sparsity <= 1:
            raise UserError(f"sparsity={sparsity} must lie in 0 to 1.")
        groups = score.reshape(1, -1) if within == "layer" else rows
        length = groups.shape[-1]
        # Flipped: of equal scores the last ones stay, so that the first ones go, as in a stable sort.
        mask = top_k(groups[:, ::-1], length - int(length * sparsity))[:, ::-1].reshape(rows.shape)
        if within == "layer":
            return mask
    return mask.T if within == "output" else mask


def mask_weights(model: PyTree, masks: Mapping[str, Bool[Array | np.ndarray, "_in _out"]]) -> PyTree:
    """A new model with the weights of projections set to zero where their mask is False.

    Raises:
      UserError: a name is not a projection of the model, or a mask has another shape.
    """
    pruned = {}
    for name, mask in masks.items():
        linear = select(model, name).get()
        if not isinstance(linear, Linear):
            raise UserError(f"masks: {name!r} is a {type(linear).__name__}, not a projection.")
        if mask.shape != linear.weight.shape:
            raise UserError(f"masks[{name!r}] has shape {mask.shape}, the weight {linear.weight.shape}.")
        pruned[name] = eqx.tree_at(lambda map: map.weight, linear, jnp.where(mask, linear.weight, 0))
    return replace(model, pruned)


def keep_neurons(model: PyTree, kept: Choice) -> PyTree:
    """A new model whose MLPs have only the neurons named, in the order given.

    `config.d_mlp` follows where every layer keeps equally many; otherwise it stays, and the model cannot be saved.

    Raises:
      UserError: a name is not an MLP leaf, or a neuron does not exist or is named twice.
    """
    leaves = {}
    for name, neurons in kept.items():
        mlp = select(model, name).get()
        if not isinstance(mlp, MLP):
            raise UserError(f"kept: {name!r} is a {type(mlp).__name__}; neurons are taken from an MLP.")
        index = _index(name, neurons, mlp.down_proj.weight.shape[0], "neuron")
        gate = None if mlp.gate_proj is None else _outputs(mlp.gate_proj, index)
        leaves[name] = MLP(gate, _outputs(mlp.up_proj, index), _inputs(mlp.down_proj, index), mlp.activation)
    pruned = replace(model, leaves)
    sizes = {block.mlp.down_proj.weight.shape[0] for block in pruned.blocks if isinstance(block.mlp, MLP)}
    return _with_config(pruned, d_mlp=sizes.pop()) if len(sizes) == 1 else pruned


def keep_heads(model: PyTree, kept: Choice) -> PyTree:
    """A new model whose attention has only the key/value heads named, each with the query heads that read it.

    Without grouped queries a key/value head is a head. `config` follows where every layer keeps equally many.

    Raises:
      UserError: a name is not an attention leaf, norms span the whole projection, or a head does not exist.
    """
    leaves = {}
    for name, groups in kept.items():
        attention = select(model, name).get()
        if not isinstance(attention, Attention):
            raise UserError(f"kept: {name!r} is a {type(attention).__name__}; heads are taken from attention.")
        if attention.k_proj is None or attention.v_proj is None:
            raise UserError(f"kept: {name!r} shares keys or values: heads are taken from attention that has its own.")
        head_dim = attention.k_proj.weight.shape[1] // attention.kv_heads
        for norm in (attention.query_norm, attention.key_norm):
            if isinstance(norm, Norm) and norm.weight.shape[0] != head_dim:
                raise UserError(f"kept: the norms of {name!r} span all heads: without some, the others would change.")
        index = _index(name, groups, attention.kv_heads, "key/value head")
        size = attention.heads // attention.kv_heads
        heads = (index[:, None] * size + np.arange(size)).reshape(-1)
        keys, queries = ((each[:, None] * head_dim + np.arange(head_dim)).reshape(-1) for each in (index, heads))
        leaves[name] = dataclasses.replace(
            attention,
            q_proj=_outputs(attention.q_proj, queries),
            k_proj=_outputs(attention.k_proj, keys),
            v_proj=_outputs(attention.v_proj, keys),
            o_proj=_inputs(attention.o_proj, queries),
            heads=len(heads),
            kv_heads=len(index),
        )
    pruned = replace(model, leaves)
    sizes = {(block.attn.heads, block.attn.kv_heads) for block in pruned.blocks if isinstance(block.attn, Attention)}
    if len(sizes) != 1:
        return pruned
    heads_left, kv_left = sizes.pop()
    return _with_config(pruned, heads=heads_left, kv_heads=kv_left)


def keep_experts(model: PyTree, kept: Choice) -> PyTree:
    """A new model whose mixtures (Switch, MoE-X) have only the experts named; `config` follows where all keep equally
    many.

    Raises:
      UserError: a name is not such a mixture, an expert does not exist, or fewer stay than a token chooses.
    """
    leaves = {}
    for name, experts in kept.items():
        mixture = select(model, name).get()
        if not isinstance(mixture, MoEX):
            raise UserError(f"kept: {name!r} is a {type(mixture).__name__}; experts are taken from a Switch or MoE-X.")
        index = _index(name, experts, mixture.up.shape[0], "expert")
        if len(index) < mixture.k:
            raise UserError(f"kept[{name!r}] has {len(index)} experts, but every token chooses {mixture.k}.")
        leaves[name] = dataclasses.replace(
            mixture,
            up=mixture.up[index],
            up_bias=None if mixture.up_bias is None else mixture.up_bias[index],
            down=mixture.down[index],
            router=None if mixture.router is None else _outputs(mixture.router, index),
        )
    pruned = replace(model, leaves)
    sizes = {block.mlp.up.shape[0] for block in pruned.blocks if isinstance(block.mlp, MoEX)}
    if len(sizes) != 1 or pruned.config.mixture is None:
        return pruned
    return _with_config(pruned, mixture=dataclasses.replace(pruned.config.mixture, experts=sizes.pop()))


def _index(name: str, chosen: Sequence[int], count: int, what: str) -> np.ndarray:
    index = np.asarray(chosen, np.int64)
    if index.ndim != 1 or not len(index):
        raise UserError(f"kept[{name!r}] must be a list of at least one {what}.")
    if index.min() < 0 or index.max() >= count:
        wrong = index.min() if index.min() < 0 else index.max()
        raise UserError(f"kept[{name!r}] has {what} {wrong}, but there are {count}.")
    if len(np.unique(index)) != len(index):
        raise UserError(f"kept[{name!r}] names a {what} twice.")
    return index


def _outputs(linear: Linear, index: np.ndarray) -> Linear:
    bias = None if linear.bias is None else linear.bias[index]
    return Linear(linear.weight[:, index], bias, linear.cut)


def _inputs(linear: Linear, index: np.ndarray) -> Linear:
    return Linear(linear.weight[index], linear.bias, linear.cut)


def _with_config(model: Transformer, **fields: Any) -> Transformer:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **fields))
