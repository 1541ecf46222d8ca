"""Directions to steer along, from activations of two kinds of text.

    difference in means    mean(a | positive) - mean(a | negative), length 1; between any two regimes of any array
    RepE PCA               first principal component of paired differences d_i = a_i+ - a_i-
                             centred: of d_i - mean(d): what differs between pairs, often *not* the concept
                             uncentred: of d_i itself: close to the difference in means
                           the sign is that of most pairs
    pair centres           the same uncentred component of both halves of each pair, less the pair's mean
    clusters               k-means of paired differences, a direction each; a probe chooses for every token (G-ACT)

Sources: RepE, Zou et al. 2023, arXiv 2310.01405; repeng's `pca_diff` (centred) and `pca_center`; G-ACT clusters prompt
differences and steers along the one that a per-layer probe predicts.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.core.errors import UserError


def unit(v: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
    """v over its length."""
    return v / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12)


def difference_in_means(
    positive: Float[Array, "n d"],
    negative: Float[Array, "m d"],
    positive_weight: Float[Array, " n"] | None = None,
    negative_weight: Float[Array, " m"] | None = None,
    *,
    normalise: bool = True,
) -> Float[Array, " d"]:
    """mean(positive) - mean(negative), over rows with their weights; of length 1 unless `normalise` is False.

    Raises:
      UserError: one side has no row that counts (weights are not seen under a jit of your own).
    """
    means = []
    for name, rows, weight in (("positive", positive, positive_weight), ("negative", negative, negative_weight)):
        weight = jnp.ones(rows.shape[0]) if weight is None else weight
        if rows.shape[0] == 0:
            raise UserError(f"{name} has no rows: give activations of both kinds.")
        total = jnp.sum(weight)
        if not isinstance(total, jax.core.Tracer) and not float(total) > 0:
            raise UserError(f"{name}_weight leaves no row that counts: its sum is {float(total):g}.")
        means.append(weight @ rows / total)
    return unit(means[0] - means[1]) if normalise else means[0] - means[1]


def paired_component(
    positive: Float[Array, "n d"], negative: Float[Array, "n d"], *, centred: bool
) -> Float[Array, " d"]:
    """The first principal direction of the differences of pairs, length 1, signed so that most pairs go along it.

    Args:
      centred: subtract the mean difference first, as `pca_diff` does. What all pairs share is then removed.
    """
    differences = positive - negative
    rows = differences - jnp.mean(differences, axis=0) if centred else differences
    _, _, right = jnp.linalg.svd(rows, full_matrices=False)
    along = jnp.sum(jnp.sign(differences @ right[0]))
    return right[0] * jnp.where(along < 0, -1.0, 1.0)


def pair_centre_component(positive: Float[Array, "n d"], negative: Float[Array, "n d"]) -> Float[Array, " d"]:
    """The first principal direction of both halves of every pair less the pair's mean (repeng's `pca_center`).

    The halves are +-d_i / 2, whose mean is zero: this is `paired_component(..., centred=False)`.
    """
    return paired_component(positive, negative, centred=False)


class Choice(eqx.Module):
    """The edit that adds, to every token, the direction that a probe predicts for it: strength * directions[k(x)].

    k(x) = argmax_k (x . probe_k + bias_k).
    """

    directions: Float[Array, "k d"]
    probe: Float[Array, "k d"]
    bias: Float[Array, " k"]
    strength: Float[Array, ""]

    def chosen(self, x: Float[Array, "*axes d"]) -> Int[Array, "*axes"]:
        """Which direction each token gets."""
        return jnp.argmax(x @ self.probe.T + self.bias, axis=-1)

    def __call__(self, x: Array) -> Array:
        return (x + self.strength * self.directions[self.chosen(x)]).astype(x.dtype)


def clustered_choice(
    positive: Float[Array, "n d"],
    negative: Float[Array, "n d"],
    clusters: int,
    *,
    strength: float = 1.0,
    seed: int = 0,
    sweeps: int = 50,
    probe_steps: int = 200,
    probe_rate: float = 0.5,
) -> Choice:
    """k-means over the differences of pairs, and a softmax probe from the negative side to the pair's cluster.

    Start values are rows drawn without replacement by `seed`. A cluster that loses all its rows keeps its centre.

    Raises:
      UserError: clusters is not between 1 and the number of pairs.
    """
    if not 1 <= clusters <= positive.shape[0]:
        raise UserError(f"clusters={clusters} must be from 1 to the number of pairs, {positive.shape[0]}.")
    differences = positive - negative
    start = np.random.default_rng(seed).choice(positive.shape[0], clusters, replace=False)
    centres, label = _k_means(differences, differences[jnp.asarray(start)], sweeps)
    scale = jnp.sqrt(jnp.mean(negative**2))

    def loss(weights: tuple[Array, Array]) -> Array:
        logits = negative / scale @ weights[0].T + weights[1]
        fit = jnp.mean(-jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1))
        return fit + 1e-3 * jnp.sum(weights[0] ** 2)

    def step(weights: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        return jax.tree.map(lambda w, g: w - probe_rate * g, weights, jax.grad(loss)(weights)), None

    (probe, bias), _ = jax.lax.scan(
        step, (jnp.zeros_like(centres), jnp.zeros(clusters, centres.dtype)), None, length=probe_steps
    )
    return Choice(unit(centres), probe / scale, bias, jnp.asarray(strength, centres.dtype))


def _k_means(rows: Array, centres: Array, sweeps: int) -> tuple[Array, Array]:
    def nearest(centres: Array) -> Array:
        return jnp.argmin(jnp.sum((rows[:, None] - centres[None]) ** 2, axis=-1), axis=1)

    def sweep(centres: Array, _: None) -> tuple[Array, None]:
        own = jax.nn.one_hot(nearest(centres), centres.shape[0], dtype=rows.dtype)
        count = jnp.sum(own, axis=0)[:, None]
        return jnp.where(count > 0, own.T @ rows / jnp.maximum(count, 1), centres), None

    centres, _ = jax.lax.scan(sweep, centres, None, length=sweeps)
    return centres, nearest(centres)
