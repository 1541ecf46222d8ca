"""Single neurons as experts, found by product keys: sgatlin (linear neurons) and PEER.

For every channel c, the `knn` best of n^2 neurons (i, j) by the score s1_i + s2_j. The best pairs are among the knn
best i and the knn best j, so that n^2 scores are never computed.

    linear (sgatlin)  y = sum_c sum_(i,j) s_cij (x . u_cij) v_cij         a neuron pool for each channel
    peer              y = sum_c sum_(i,j) softmax(s_c)_ij gelu(x . u_ij) v_ij    one pool for all channels

    scores   dense   s = x A B                A [d, d_key], B [d_key, 2, channels, n]
             keys    s = q . key / sqrt(2 d_key),  q = x Q, Q [2, channels, d, d_key], keys [2, channels, n, d_key]

The authors use dense scores for linear neurons and keys for PEER; either goes with either here. The softmax of PEER is
over the knn that are kept; its GELU is the tanh form, JAX's default, which both authors use.

Source: Schug 2026 (arXiv 2606.07414) and its code; He 2024 (PEER, arXiv 2407.04153); product keys: Lample et al. 2019
(arXiv 1907.05242).
"""

from functools import partial
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.kernels import sampled_dot, sparse_decode, sparse_outer
from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Rules

Kind = Literal["linear", "peer"]


class DenseScores(eqx.Module):
    """s = x A B."""

    down: Float[Array, "d d_key"]
    up: Float[Array, "d_key sides channels n"]

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes sides channels n"]:
        return jnp.einsum("...k,kscn->...scn", x @ self.down, self.up)


class KeyScores(eqx.Module):
    """s = q . key / sqrt(2 d_key)."""

    queries: Float[Array, "sides channels d d_key"]
    keys: Float[Array, "sides channels n d_key"]

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes sides channels n"]:
        queries = jnp.einsum("...d,scdk->...sck", x, self.queries)
        return jnp.einsum("...sck,scnk->...scn", queries, self.keys) / (2 * self.keys.shape[-1]) ** 0.5


class Chosen(NamedTuple):
    """Neuron i * n + j of every channel, best first."""

    scores: Float[Array, "*axes channels knn"]
    neurons: Int[Array, "*axes channels knn"]


class ProductKeyMLP(eqx.Module):
    """An MLP sublayer of single neurons. `read` and `write` have one row a neuron, channel after channel."""

    scores: DenseScores | KeyScores
    read: Float[Array, "neurons d"]
    write: Float[Array, "neurons d_out"]
    knn: int = eqx.field(static=True)
    kind: Kind = eqx.field(static=True, default="linear")

    def cuts(self) -> dict[str, int | None]:
        """Neurons are spread over devices; the router lies on each."""
        router = {f"scores/{name}": None for name in ("down", "up", "queries", "keys")}
        return router | {"read": 0, "write": 0}

    def writers(self) -> list[Array]:
        """What writes the output."""
        return [self.write]

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_out"]:
        scores = tap("router", self.scores(x))
        weight, index = weigh(choose(scores, self.knn), self.kind, scores.shape[-1])
        index, weight = tap("experts/index", index), tap("experts/weight", weight)
        values = neuron_values(x, weight, index, self.read, self.kind)
        return sparse_decode(values, index, self.write).astype(x.dtype)


def choose(scores: Float[Array, "*axes sides channels n"], knn: int) -> Chosen:
    """The knn pairs (i, j) of each channel with the largest s1_i + s2_j."""
    n = scores.shape[-1]
    best, places = jax.lax.top_k(scores, knn)
    sums = best[..., 0, :, :, None] + best[..., 1, :, None, :]
    index = places[..., 0, :, :, None] * n + places[..., 1, :, None, :]
    flat = sums.reshape(*sums.shape[:-2], knn * knn)
    chosen, at = jax.lax.top_k(flat, knn)
    return Chosen(chosen, jnp.take_along_axis(index.reshape(flat.shape), at, axis=-1))


def weigh(chosen: Chosen, kind: Kind, n: int) -> tuple[Float[Array, "*axes k"], Int[Array, "*axes k"]]:
    """How much each chosen neuron counts, and its row, k = channels * knn; pools of linear neurons do not overlap."""
    weight, index = chosen.scores, chosen.neurons
    if kind == "peer":
        weight = jax.nn.softmax(weight, axis=-1)
    else:
        index = index + n * n * jnp.arange(index.shape[-2])[:, None]
    return weight.reshape(*weight.shape[:-2], -1), index.reshape(*index.shape[:-2], -1)


def neuron_values(
    x: Float[Array, "*axes d"],
    weight: Float[Array, "*axes k"],
    index: Int[Array, "*axes k"],
    read: Float[Array, "neurons d"],
    kind: Kind,
) -> Float[Array, "*axes k"]:
    """What each chosen neuron writes with: s (x . u), or softmax(s) gelu(x . u)."""
    inner = selected_dot(x, read, index)
    return weight * (jax.nn.gelu(inner) if kind == "peer" else inner)


@jax.custom_vjp
def selected_dot(
    x: Float[Array, "*axes d"], rows: Float[Array, "rows d"], index: Int[Array, "*axes k"]
) -> Float[Array, "*axes k"]:
    """x . rows[index], differentiable in x and rows: no array of tokens x k x d is built. float32."""
    return sampled_dot(x, rows, index)


def _dot_forward(x: Array, rows: Array, index: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return sampled_dot(x, rows, index), (x, rows, index)


def _dot_backward(kept: tuple[Array, Array, Array], cotangent: Array) -> tuple[Array, Array, None]:
    x, rows, index = kept
    to_x = sparse_decode(cotangent, index, rows).astype(x.dtype)
    return to_x, sparse_outer(cotangent, index, x, rows.shape[0]).astype(rows.dtype), None


selected_dot.defvjp(_dot_forward, _dot_backward)


def random_product_keys(
    key: PRNGKeyArray, d: int, d_out: int, n: int, channels: int, knn: int, d_key: int, kind: Kind = "linear"
) -> ProductKeyMLP:
    """Normal start values of standard deviation 1/sqrt(what is read), keys 1; scores as the authors pair them."""
    keys = jax.random.split(key, 4)
    normal = partial(jax.random.normal, dtype=jnp.float32)
    scores: DenseScores | KeyScores
    if kind == "linear":
        down = normal(keys[0], (d, d_key)) / d**0.5
        scores = DenseScores(down, normal(keys[1], (d_key, 2, channels, n)) / d_key**0.5)
    else:
        scores = KeyScores(normal(keys[0], (2, channels, d, d_key)) / d**0.5, normal(keys[1], (2, channels, n, d_key)))
    neurons = n * n * (channels if kind == "linear" else 1)
    read, write = normal(keys[2], (neurons, d)) / d**0.5, normal(keys[3], (neurons, d_out)) / d_out**0.5
    return ProductKeyMLP(scores, read, write, knn, kind)
