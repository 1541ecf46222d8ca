"""Planted problems: activations whose dictionary is known, and the training of a method on them, over seeds.

    x = h V + noise

V holds `features` unit rows in `width` dimensions; h has exactly `active` entries that are not zero (or `active` on
average), uniform between `low` and `high`. Options make the plant harder in the ways that language models are:

    exponent       feature j occurs with frequency ~ (j + 1)^-exponent
    correlation    features 2j and 2j + 1 share their luck in this fraction of samples
    children       every parent feature has so many children, which occur only where it does
    independent    a random number of features is active (toy superposition)
    also_active    every second sample has so many active features instead (samples of unequal sparsity)
    unit           every sample's codes are divided by their length
    noise          Gaussian, with this standard deviation per dimension

A chosen set is the `active` largest of log-frequency + Gumbel noise: sampling without replacement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch, Sites, make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.protocols import Method
from jaxinterp.evaluation.stability import compare_seeds
from jaxinterp.kernels import select_topk
from jaxinterp.methods.recipes import one_pass
from jaxinterp.models.tiny import unit_rows

Draw = Callable[[Any, PRNGKeyArray, int], dict[str, Array]]
"""(what is planted, key, samples) -> arrays by site name."""

SAMPLE = 4096
"""Rows that a method sees before it starts, for scales and means."""

CODES = "h"
"""The name of the planted codes among the samples."""

LATE = 200
"""Steps at the end of training that metrics are averaged over."""


@dataclass(frozen=True)
class Plant:
    """What is planted; the defaults are the reference problem of the thresholds in tests/methods."""

    features: int = 48
    width: int = 32
    active: int = 3
    low: float = 0.5
    high: float = 1.5
    exponent: float = 0.0
    correlation: float = 0.0
    children: int = 0
    independent: bool = False
    noise: float = 0.0
    also_active: int = 0
    unit: bool = False

    def __post_init__(self) -> None:
        """Raises UserError if a plant is invalid."""
        for name in ("features", "width"):
            if vars(self)[name] < 1:
                raise UserError(f"{name}={vars(self)[name]} must be at least 1.")
        if not 0 <= self.low <= self.high or self.high == 0:
            raise UserError(
                f"low={self.low} and high={self.high}: sizes of codes lie between them, 0 <= low <= high > 0."
            )
        if self.noise < 0:
            raise UserError(f"noise={self.noise} is a standard deviation: it must not be negative.")
        if not 0 < self.active <= self.features:
            raise UserError(f"active={self.active} must lie between 1 and features={self.features}.")
        if not 0 <= self.also_active <= self.features or (self.also_active and self.independent):
            raise UserError(
                f"also_active={self.also_active} must lie between 0 and features={self.features}, and be 0 where "
                "independent."
            )
        if not 0 <= self.correlation <= 1:
            raise UserError(f"correlation={self.correlation} is a fraction: between 0 and 1.")
        if self.children < 0 or self.features % (self.children + 1):
            raise UserError(f"children={self.children}: families of 1 + children must fill features={self.features}.")

    def rows(self, key: PRNGKeyArray) -> Float[Array, "features width"]:
        """V: the planted dictionary."""
        return unit_rows(key, self.features, self.width)

    def codes(self, key: PRNGKeyArray, samples: int) -> Float[Array, "samples features"]:
        """h: the planted codes."""
        return _codes(self, key, samples)

    def draw(
        self, rows: Float[Array, "features width"], key: PRNGKeyArray, samples: int
    ) -> dict[str, Float[Array, "samples _width"]]:
        """Samples of x, under the site name `x`, and the codes that they were made of, `h`."""
        code_key, noise_key = jax.random.split(key)
        codes = self.codes(code_key, samples)
        x = codes @ rows
        return {"x": x + self.noise * jax.random.normal(noise_key, x.shape), CODES: codes}


# Inside `jax.jit` it is inlined; outside it is one program, not one for each operation.
@partial(jax.jit, static_argnums=(0, 2), inline=True)
def _codes(plant: Plant, key: PRNGKeyArray, samples: int) -> Float[Array, "samples features"]:
    luck_key, shared_key, size_key, count_key = jax.random.split(key, 4)
    luck = jax.random.gumbel(luck_key, (samples, plant.features))
    if plant.correlation:
        partner = luck[:, jnp.arange(plant.features) // 2 * 2]
        together = jax.random.bernoulli(shared_key, plant.correlation, (samples, (plant.features + 1) // 2))
        luck = jnp.where(jnp.repeat(together, 2, axis=1)[:, : plant.features], partner, luck)
    score = luck - plant.exponent * jnp.log1p(jnp.arange(plant.features))
    if plant.children:
        parents = plant.features // (1 + plant.children)
        of_parent = score[:, jnp.arange(plant.features) % parents]
        score = jnp.where(jnp.arange(plant.features) < parents, score, jnp.minimum(score, of_parent - 1e-3))
    if plant.independent:
        rate = plant.active / plant.features
        chosen = jax.random.bernoulli(count_key, rate, score.shape)
    else:
        places = select_topk(score, k=max(plant.active, plant.also_active))[1]
        inside: PyTree = True
        if plant.also_active:
            counts = jnp.where(jnp.arange(samples) % 2 == 1, plant.also_active, plant.active)
            inside = jnp.arange(places.shape[1]) < counts[:, None]
        chosen = jnp.zeros(score.shape, bool).at[jnp.arange(samples)[:, None], places].set(inside)
    sizes = jax.random.uniform(size_key, score.shape, minval=plant.low, maxval=plant.high)
    codes = jnp.where(chosen, sizes, 0.0)
    return codes / jnp.maximum(jnp.linalg.norm(codes, axis=1, keepdims=True), 1e-12) if plant.unit else codes


def train(
    method: Method,
    draw: Draw,
    planted: Sequence[Any],
    sites: Sites,
    *,
    steps: int = 6000,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[list[Any], list[dict[str, float]]]:
    """Train a method on fresh samples, once for each entry of `planted`; one compiled scan serves all.

    Returns:
      The decompositions, and each run's mean metrics over its last `LATE` steps.
    """
    recipe = one_pass(method, steps)

    @jax.jit
    def run(truth: PyTree, key: PRNGKeyArray) -> tuple[PyTree, PyTree]:
        start_key, data_key = jax.random.split(key)

        def batch(step: Array, size: int) -> Batch:
            return make_batch(draw(truth, jax.random.fold_in(data_key, step), size), jnp.ones(size), sites, step=step)

        def body(state: PyTree, step: Array) -> tuple[PyTree, PyTree]:
            state, metrics = recipe.step(state, batch(step, batch_size), jax.random.fold_in(start_key, step), None)
            return state, {name: ratio.value() for name, ratio in metrics.items() if ratio.total.ndim == 0}

        state = recipe.init(start_key, batch(jnp.int32(steps), SAMPLE), None)
        state, history = jax.lax.scan(body, state, jnp.arange(steps))
        return state, jax.tree.map(lambda values: jnp.mean(values[-LATE:]), history)

    trained, metrics = [], []
    for number, truth in enumerate(planted):
        state, late = run(truth, jax.random.key(1000 + seed + number))
        trained.append(recipe.finish(state))
        metrics.append({name: float(value) for name, value in late.items()})
    return trained, metrics


def stability(dictionaries: Sequence[Float[Array | np.ndarray, "features d"]]) -> float:
    """The mean over pairs of seeds of the mean matched cosine of their rows: 1 where every seed finds the same.

    Raises:
      UserError: there are fewer than two.
    """
    return compare_seeds(dictionaries).cosine
