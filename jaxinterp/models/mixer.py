"""MLP-Mixer as a wide sparse MLP, and its relatives with permuted Kronecker products.

An input of S * C numbers is a matrix X [S, C] (row s, column c at place s * C + c). Mixing is a Kronecker product:

    W X  =  (W (x) I_C) vec(X)          token mixing, W [S', S]
    X V  =  (I_S (x) V^T) vec(X)        channel mixing, V [C, C']

with (x) the Kronecker product and vec by rows. So a mixer block is an MLP with S * C wide layers whose matrices are
sparse: a share 1/C (token mixing), 1/S (channel mixing) of their entries is not 0.

    mixer block   H = X + W2 f(W1 X),  Y = H + f(H V1) V2;   as a sublayer it writes Y - X
    PK            y = J2 (I (x) W) J1 x   with fixed permutations J: the same sparsity, no grid

Source: Hayase and Karakida 2024 (arXiv 2306.01470).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.models.layers import Tap, no_tap
from jaxinterp.models.rules import EXACT, Activation, Rules, activate


class MixerMLP(eqx.Module):
    """A mixer block over the d = S * C numbers of each token."""

    token_up: Float[Array, "tokens_hidden tokens"]
    token_down: Float[Array, "tokens tokens_hidden"]
    channel_up: Float[Array, "channels channels_hidden"]
    channel_down: Float[Array, "channels_hidden channels"]
    activation: Activation = eqx.field(static=True, default="gelu")

    def cuts(self) -> dict[str, int | None]:
        """Small matrices: they lie on every device."""
        return dict.fromkeys(("token_up", "token_down", "channel_up", "channel_down"))

    def writers(self) -> list[Array]:
        """What writes the output."""
        return [self.token_down, self.channel_down]

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d"]:
        grid = x.reshape(*x.shape[:-1], self.token_up.shape[1], self.channel_up.shape[0])
        tokens = activate(self.activation, mix_tokens(grid, self.token_up), rules)
        middle = grid + mix_tokens(tokens, self.token_down)
        channels = activate(self.activation, mix_channels(middle, self.channel_up), rules)
        return (middle - grid + mix_channels(channels, self.channel_down)).reshape(x.shape)


class PermutedMLP(eqx.Module):
    """y = K2 f(K1 x), K = J (I (x) W) with fixed permutations before and after: no grid, the same sparsity.

    The permutations are those of `orders(seed, ...)`.
    """

    up: Float[Array, "size wide"]
    down: Float[Array, "wide size"]
    seed: int = eqx.field(static=True, default=0)
    activation: Activation = eqx.field(static=True, default="gelu")

    def cuts(self) -> dict[str, int | None]:
        """Small matrices: they lie on every device."""
        return {"up": None, "down": None}

    def writers(self) -> list[Array]:
        """What writes the output."""
        return [self.down]

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d"]:
        hidden = x.shape[-1] * self.up.shape[1] // self.up.shape[0]
        before, between, after = orders(self.seed, x.shape[-1], hidden)
        pre = tap("pre", permuted_kronecker(x, self.up, before, between))
        active = tap("hidden", activate(self.activation, pre, rules))
        return permuted_kronecker(active, self.down, np.argsort(between), after)


def mix_tokens(x: Float[Array, "*axes tokens channels"], weight: Float[Array, "out tokens"]) -> Array:
    """W X."""
    return jnp.einsum("os,...sc->...oc", weight, x)


def mix_channels(x: Float[Array, "*axes tokens channels"], weight: Float[Array, "channels out"]) -> Array:
    """X V."""
    return x @ weight


def token_matrix(weight: Float[Array, "out tokens"], channels: int) -> Float[Array, "wide_out wide_in"]:
    """W (x) I_C: the wide matrix that token mixing is."""
    return jnp.kron(weight, jnp.eye(channels, dtype=weight.dtype))


def channel_matrix(weight: Float[Array, "channels out"], tokens: int) -> Float[Array, "wide_out wide_in"]:
    """I_S (x) V^T: the wide matrix that channel mixing is."""
    return jnp.kron(jnp.eye(tokens, dtype=weight.dtype), weight.T)


def permuted_kronecker(
    x: Float[Array, "*axes d"],
    weight: Float[Array, "size out"],
    before: Int[np.ndarray, " d"],
    after: Int[np.ndarray, " wide"],
) -> Float[Array, "*axes wide"]:
    """J2 (I (x) W^T) J1 x: x in the order `before`, cut into pieces of `size`, each times W, in the order `after`."""
    pieces = x[..., before].reshape(*x.shape[:-1], -1, weight.shape[0])
    return (pieces @ weight).reshape(*x.shape[:-1], -1)[..., after]


def random_mixer(key: PRNGKeyArray, tokens: int, channels: int, expansion: int = 4) -> MixerMLP:
    """Normal start values of standard deviation 1/sqrt(what is read)."""
    keys = jax.random.split(key, 4)
    shapes = [(expansion * tokens, tokens), (tokens, expansion * tokens)]
    token = [
        jax.random.normal(k, shape, jnp.float32) / shape[1] ** 0.5 for k, shape in zip(keys[:2], shapes, strict=True)
    ]
    shapes = [(channels, expansion * channels), (expansion * channels, channels)]
    channel = [
        jax.random.normal(k, shape, jnp.float32) / shape[0] ** 0.5 for k, shape in zip(keys[2:], shapes, strict=True)
    ]
    return MixerMLP(token[0], token[1], channel[0], channel[1])


def random_permuted(key: PRNGKeyArray, size: int, expansion: int = 4) -> PermutedMLP:
    """Normal start values of standard deviation 1/sqrt(what is read)."""
    keys = jax.random.split(key, 2)
    up = jax.random.normal(keys[0], (size, expansion * size), jnp.float32) / size**0.5
    down = jax.random.normal(keys[1], (expansion * size, size), jnp.float32) / (expansion * size) ** 0.5
    return PermutedMLP(up, down)


def orders(seed: int, d: int, hidden: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The permutations before, between and after the two matrices: NumPy's, of this seed."""
    draw = np.random.default_rng(seed)
    return draw.permutation(d), draw.permutation(hidden), draw.permutation(d)
