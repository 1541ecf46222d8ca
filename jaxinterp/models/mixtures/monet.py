"""Monet: n^2 experts from the parameters of n, chosen by the product of two routers.

    y = sum_h sum_i sum_j g1_hi g2_hj E_ij(x)                          h: heads, i, j: sides, 1..n

    horizontal  E_ij(x) = f(x U_i + a_i) V_j + b_j                     U_i [d, m], V_j [m, d]
    vertical    E_ij(x) = [f(x U1_i + a1_i) V11_i + f(x U2_j + a2_j) V12_i + b1_i,
                           f(x U1_i + a1_i) V21_j + f(x U2_j + a2_j) V22_j + b2_j]     halves of d, and of m

The sums over i and j are factorised: no array of n^2 experts is built. (With A_ij = sum_h g1_hi g2_hj, the array
`experts/pairs`, they are explicit in the pairs; an edit of it masks single experts, and only then it is built.)

Router, for each side: z = x W, [heads, n], float32; z^ = (z - mean_h) / sqrt(var_h + 1e-5), with statistics over tokens
and sides of a head; kept where z^ >= min(max z^, Phi^-1(1 - k / n)); g = softmax of the kept z. So k of n are active on
average, one at least, without sorting. In training the statistics are the batch's (no gradient stops there);
afterwards those that `next_statistics` has followed, which are part of the model and not trained.

Source: Park et al. 2024 (arXiv 2412.04139) and the released inference code, whose BatchNorm this is: momentum 0.1,
unbiased running variance. The auxiliary losses are not in that code: their form here is recalled from the paper.
"""

from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Activation, Rules, activate

Kind = Literal["horizontal", "vertical"]
EPSILON = 1e-5
MASKED = -1e10


class Statistics(NamedTuple):
    """Of router logits: one mean and one variance a side and head."""

    mean: Float[Array, "sides heads"]
    variance: Float[Array, "sides heads"]


class Horizontal(eqx.Module):
    """E_ij = f(x U_i + a_i) V_j + b_j."""

    up: Float[Array, "n d m"]
    up_bias: Float[Array, "n m"]
    down: Float[Array, "n m d"]
    down_bias: Float[Array, "n d"]


class Vertical(eqx.Module):
    """The first half of the output is expert i's, the second j's; both read the neurons of both."""

    up: Float[Array, "sides n d half_m"]
    up_bias: Float[Array, "sides n half_m"]
    down: Float[Array, "sides sides n half_m half_d"]  # [whose output, whose neurons]: V11, V12; V21, V22
    down_bias: Float[Array, "sides n half_d"]


class Monet(eqx.Module):
    """A mixture of n^2 experts."""

    router: Float[Array, "sides d heads n"]
    mean: Float[Array, "sides heads"]
    variance: Float[Array, "sides heads"]
    experts: Horizontal | Vertical
    k: int = eqx.field(static=True)
    activation: Activation = eqx.field(static=True, default="relu_squared")
    training: bool = eqx.field(static=True, default=False)

    def cuts(self) -> dict[str, int | None]:
        """Matrices of the n sides are spread over devices; the router lies on each."""
        side = 0 if isinstance(self.experts, Horizontal) else 1
        whole: dict[str, int | None] = {"router": None, "mean": None, "variance": None}
        return whole | {
            "experts/up": side,
            "experts/up_bias": side,
            "experts/down": 2 * side,
            "experts/down_bias": side,
        }

    def writers(self) -> list[Array]:
        """What writes the output."""
        return [self.experts.down]

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d"]:
        logits = tap("router", router_logits(x, self.router))
        statistics = batch_statistics(logits) if self.training else Statistics(self.mean, self.variance)
        gates = tap("experts/weight", choose(logits, statistics, self.k))
        if tap is not no_tap:
            pairs = expert_pairs(gates)
            edited = tap("experts/pairs", pairs)
            if edited is not pairs:
                return from_pairs(x, edited, self.experts, self.activation, rules)
        return from_gates(x, gates, self.experts, self.activation, rules)


def router_logits(x: Float[Array, "*axes d"], router: Float[Array, "sides d heads n"]) -> Array:
    """z of both sides, `[*axes, sides, heads, n]`, in float32 (float64 for float64)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("...d,sdhn->...shn", x.astype(wide), router.astype(wide))


def batch_statistics(logits: Float[Array, "*axes sides heads n"]) -> Statistics:
    """Mean and (biased) variance of each side and head, over all tokens of the batch and all n."""
    axes = (*range(logits.ndim - 3), logits.ndim - 1)
    return Statistics(jnp.mean(logits, axis=axes), jnp.var(logits, axis=axes))


def next_statistics(old: Statistics, batch: Statistics, count: int, momentum: float = 0.1) -> Statistics:
    """The running statistics after a batch of `count` numbers a head: they follow, with the unbiased variance."""
    unbiased = batch.variance * (count / max(count - 1, 1))
    follow = lambda old, new: (1 - momentum) * old + momentum * new
    return Statistics(follow(old.mean, batch.mean), follow(old.variance, unbiased))


def choose(
    logits: Float[Array, "*axes sides heads n"], statistics: Statistics, k: int
) -> Float[Array, "*axes sides heads n"]:
    """g: softmax of the logits whose normalised value is among the expected k largest; 0 elsewhere."""
    scale = jax.lax.rsqrt(statistics.variance + EPSILON)
    normal = (logits - statistics.mean[..., None]) * scale[..., None]
    threshold = jax.scipy.special.ndtri(jnp.asarray(1 - k / logits.shape[-1], normal.dtype))
    lowest = jnp.minimum(jnp.max(normal, axis=-1, keepdims=True), threshold)
    return jax.nn.softmax(jnp.where(normal >= lowest, logits, MASKED), axis=-1)


def expert_pairs(gates: Float[Array, "*axes sides heads n"]) -> Float[Array, "*axes n n"]:
    """A_ij = sum_h g1_hi g2_hj: how much expert (i, j) counts for each token. They sum to the number of heads."""
    return jnp.einsum("...hi,...hj->...ij", gates[..., 0, :, :], gates[..., 1, :, :])


def from_gates(
    x: Float[Array, "*axes d"],
    gates: Float[Array, "*axes sides heads n"],
    experts: Horizontal | Vertical,
    activation: Activation,
    rules: Rules = EXACT,
) -> Float[Array, "*axes d"]:
    """The output, factorised over heads: O(heads n m) beside the products of x with U and V."""
    first, second = gates[..., 0, :, :].astype(x.dtype), gates[..., 1, :, :].astype(x.dtype)
    if isinstance(experts, Horizontal):
        neurons = _neurons(x, experts.up, experts.up_bias, activation, rules)
        mixed = jnp.einsum("...hm,...hj->...jm", jnp.einsum("...im,...hi->...hm", neurons, first), second)
        return jnp.einsum("...jm,jmd->...d", mixed, experts.down) + jnp.einsum(
            "...hj,jd->...d", second, experts.down_bias
        )
    one, two = (_neurons(x, experts.up[s], experts.up_bias[s], activation, rules) for s in (0, 1))
    of_one = jnp.einsum("...im,...hi->...hm", one, first)
    of_two = jnp.einsum("...jm,...hj->...hm", two, second)
    top = jnp.einsum("...im,...hi,imd->...d", one, first, experts.down[0, 0])
    top = top + jnp.einsum("...hm,...hi,imd->...d", of_two, first, experts.down[0, 1])
    bottom = jnp.einsum("...hm,...hj,jmd->...d", of_one, second, experts.down[1, 0])
    bottom = bottom + jnp.einsum("...jm,...hj,jmd->...d", two, second, experts.down[1, 1])
    top = top + jnp.einsum("...hi,id->...d", first, experts.down_bias[0])
    bottom = bottom + jnp.einsum("...hj,jd->...d", second, experts.down_bias[1])
    return jnp.concatenate([top, bottom], axis=-1)


def from_pairs(
    x: Float[Array, "*axes d"],
    pairs: Float[Array, "*axes n n"],
    experts: Horizontal | Vertical,
    activation: Activation,
    rules: Rules = EXACT,
) -> Float[Array, "*axes d"]:
    """The output for any weights of the n^2 experts (with some set to 0: masked), `[*axes, i, j]`."""
    pairs = pairs.astype(x.dtype)
    if isinstance(experts, Horizontal):
        neurons = _neurons(x, experts.up, experts.up_bias, activation, rules)
        mixed = jnp.einsum("...im,...ij->...jm", neurons, pairs)
        return jnp.einsum("...jm,jmd->...d", mixed, experts.down) + jnp.sum(pairs, axis=-2) @ experts.down_bias
    one, two = (_neurons(x, experts.up[s], experts.up_bias[s], activation, rules) for s in (0, 1))
    own_i, own_j = jnp.sum(pairs, axis=-1), jnp.sum(pairs, axis=-2)
    top = jnp.einsum("...im,...i,imd->...d", one, own_i, experts.down[0, 0])
    top = top + jnp.einsum("...im,imd->...d", jnp.einsum("...ij,...jm->...im", pairs, two), experts.down[0, 1])
    bottom = jnp.einsum("...jm,jmd->...d", jnp.einsum("...ij,...im->...jm", pairs, one), experts.down[1, 0])
    bottom = bottom + jnp.einsum("...jm,...j,jmd->...d", two, own_j, experts.down[1, 1])
    return jnp.concatenate([top + own_i @ experts.down_bias[0], bottom + own_j @ experts.down_bias[1]], axis=-1)


def uniformity(gates: Float[Array, "*axes sides heads n"], weight: Float[Array, "*axes"] | None = None) -> Array:
    """-mean over sides, heads and n of log(mean over tokens of g): least, log n, where all are used equally."""
    return -jnp.mean(jnp.log(_token_mean(gates, weight) + 1e-10))


def ambiguity(gates: Float[Array, "*axes sides heads n"], weight: Float[Array, "*axes"] | None = None) -> Array:
    """The mean over tokens, sides and heads of 1 - max g: 0 where every choice is sharp."""
    return jnp.mean(_token_mean(1 - jnp.max(gates, axis=-1, keepdims=True), weight))


def random_monet(key: PRNGKeyArray, d: int, n: int, m: int, heads: int, k: int, kind: Kind = "horizontal") -> Monet:
    """Normal start values of standard deviation 1/sqrt(what is read), biases 0, statistics 0 and 1."""
    keys = jax.random.split(key, 3)
    normal = lambda key, *shape, fan: jax.random.normal(key, shape, jnp.float32) / fan**0.5
    if kind == "horizontal":
        up, down = normal(keys[1], n, d, m, fan=d), normal(keys[2], n, m, d, fan=n * m)
        experts: Horizontal | Vertical = Horizontal(
            up, jnp.zeros((n, m), jnp.float32), down, jnp.zeros((n, d), jnp.float32)
        )
    else:
        up = normal(keys[1], 2, n, d, m // 2, fan=d)
        down = normal(keys[2], 2, 2, n, m // 2, d // 2, fan=n * m)
        experts = Vertical(up, jnp.zeros((2, n, m // 2), jnp.float32), down, jnp.zeros((2, n, d // 2), jnp.float32))
    router = normal(keys[0], 2, d, heads, n, fan=d)
    return Monet(router, jnp.zeros((2, heads), jnp.float32), jnp.ones((2, heads), jnp.float32), experts, k)


def _neurons(x: Array, up: Array, bias: Array, activation: Activation, rules: Rules) -> Array:
    return activate(activation, jnp.einsum("...d,ndm->...nm", x, up) + bias, rules)


def _token_mean(values: Array, weight: Array | None) -> Array:
    axes = tuple(range(values.ndim - 3))
    if weight is None:
        return jnp.mean(values, axis=axes)
    spread = weight[..., None, None, None]
    return jnp.sum(values * spread, axis=axes) / jnp.maximum(jnp.sum(weight), 1e-9)
