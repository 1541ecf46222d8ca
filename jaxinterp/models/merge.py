"""Merging models that were fine-tuned from one: task arithmetic, and an ensemble of weights chosen by the input.

    task vector        τ_i = θ_i - θ_0
    task arithmetic    θ = θ_0 + sum_i λ_i τ_i
    WEMoE              for MLPs λ = mean over tokens of router(x): the weights of the MLP depend on the sequence

The router is `x -> relu(x W_1 + b_1) W_2 + b_2`; at the start W_2 = 0 and b_2 = λ_0, so that the merge begins as task
arithmetic. With λ one-hot the MLP is that of model i exactly.

Sources: task arithmetic 2212.04089; WEMoE 2402.00433 (λ_0 = 0.3; the router is trained there by test-time entropy,
which `fit` can do with an objective of your own: every array here is a leaf).
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.layers import Linear, random_linear
from jaxinterp.models.mlp import MLP
from jaxinterp.models.sites import replace, select, sites


def task_arithmetic(base: Any, tuned: Sequence[Any], weights: Sequence[float]) -> PyTree:
    """θ_0 + sum_i λ_i (θ_i - θ_0) for every array.

    Raises:
      UserError: there is no model, the numbers of models and weights differ, or a model has other arrays.
    """
    if not tuned or len(tuned) != len(weights):
        raise UserError(f"tuned has {len(tuned)} models and weights {len(weights)} numbers: give one for each.")
    for index, model in enumerate(tuned):
        check_alike(base, model, f"tuned[{index}]")
    arrays, rest = eqx.partition(base, eqx.is_inexact_array)
    others = [eqx.filter(model, eqx.is_inexact_array) for model in tuned]
    merged = jax.tree.map(
        lambda zero, *each: zero + sum(w * (one - zero) for w, one in zip(weights, each, strict=True)), arrays, *others
    )
    return eqx.combine(merged, rest)


def check_alike(base: Any, model: PyTree, name: str) -> None:
    """Raises UserError if two models have other arrays."""
    first, second = named_leaves(base), named_leaves(model)
    for leaf in sorted({*first, *second}):
        if leaf not in first or leaf not in second or first[leaf].shape != second[leaf].shape:
            raise UserError(f"{name} differs from the base in array {leaf!r}: merge models tuned from one base.")


class WeightEnsemble(eqx.Module):
    """An MLP whose weights are those of a base plus task vectors, mixed for each sequence. Make it by `ensemble`."""

    base: MLP
    tasks: MLP  # every array has a leading axis of tasks
    inner: Linear
    outer: Linear

    def mixture(self, x: Float[Array, "*batch seq d_model"]) -> Float[Array, "*batch tasks"]:
        """λ of each sequence: the mean over its tokens of the router's answers."""
        return jnp.mean(self.outer(jax.nn.relu(self.inner(x))), axis=-2)

    def __call__(self, x: Float[Array, "*batch seq d_model"]) -> Float[Array, "*batch seq d_model"]:
        flat = x.reshape(-1, *x.shape[-2:])

        def one(x: Array, weights: Array) -> Array:
            mlp = jax.tree.map(
                lambda base, task: base + jnp.tensordot(weights, task, 1) if eqx.is_inexact_array(base) else base,
                self.base,
                self.tasks,
            )
            return mlp(x)

        return jax.vmap(one)(flat, self.mixture(flat)).reshape(x.shape)


def ensemble(
    base: Any, tuned: Sequence[Any], key: PRNGKeyArray, *, start: float = 0.3, width: int | None = None
) -> PyTree:
    """The base with every MLP a `WeightEnsemble` of the tuned ones; all else by task arithmetic with λ = `start`.

    Args:
      width: of the router's inner layer; default d_model.
    Raises:
      UserError: there is no tuned model, or one has other arrays than the base.
    """
    merged = task_arithmetic(base, tuned, [start] * len(tuned))
    leaves: dict[str, WeightEnsemble] = {}
    for name in [name for name in sites(base, "**/mlp") if name.endswith("/mlp")]:
        first = select(base, name).get()
        tasks = jax.tree.map(
            lambda zero, *each: jnp.stack([one - zero for one in each]),
            eqx.filter(first, eqx.is_inexact_array),
            *(eqx.filter(select(model, name).get(), eqx.is_inexact_array) for model in tuned),
        )
        d_model = first.up_proj.weight.shape[0]
        inner, _ = jax.random.split(jax.random.fold_in(key, len(leaves)))
        size = d_model if width is None else width
        outer = Linear(jnp.zeros((size, len(tuned))), jnp.full(len(tuned), start))
        leaves[name] = WeightEnsemble(first, tasks, random_linear(inner, d_model, size, True), outer)
    return replace(merged, leaves)
