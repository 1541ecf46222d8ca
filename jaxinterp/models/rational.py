"""KAT: an MLP with group-rational activations, which are trained.

    y = W2 phi2(W1 phi1(x) + b1) + b2,     phi(x)_g = (a_0 + a_1 x + .. + a_5 x^5) / q_g(x)

One numerator a [6] for all groups of neighbouring channels, one denominator b [groups, 4] each. Three denominators are
in use, and they are not the same function:

    kernel    1 + sum_i |b_i| |x|^i     what the CUDA and Triton kernels compute: what is trained
    fitting   1 + |sum_i b_i x^i|       what start values are fitted with
    fallback  1 + sum_i |b_i| x^i       the CPU code, which can reach 0

Start values that were fitted with one are wrong in another: the shipped "gelu" is off by 1.46 on [-3, 3] in the kernel.
`fit_rational` fits with the denominator that is used. phi1 starts as the identity, phi2 as Swish.

Source: Yang and Wang 2024 (KAT, arXiv 2409.10594) and the code of rational_kat_cu.
"""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.optimize import least_squares

from jaxinterp.models.layers import Linear, Tap, no_tap, random_linear
from jaxinterp.models.rules import EXACT, Rules

Denominator = Literal["kernel", "fitting", "fallback"]
NUMERATORS, DENOMINATORS = 6, 4


class GroupRational(eqx.Module):
    """phi of the module's equation; the channels are cut into equal groups of neighbours."""

    numerator: Float[Array, " powers"]
    denominator: Float[Array, "groups powers_below"]
    form: Denominator = eqx.field(static=True, default="kernel")

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        grouped = x.reshape(*x.shape[:-1], self.denominator.shape[0], -1)
        return rational(grouped, self.numerator, self.denominator, self.form).reshape(x.shape)


class KATMLP(eqx.Module):
    """phi1, up projection, phi2, down projection: the activation comes before each matrix."""

    first: GroupRational
    up: Linear
    second: GroupRational
    down: Linear

    def cuts(self) -> dict[str, int | None]:
        """Groups share a numerator: all lies on every device."""
        names = ("up/weight", "up/bias", "down/weight", "down/bias")
        parts = ("first/numerator", "first/denominator", "second/numerator", "second/denominator")
        return dict.fromkeys((*names, *parts))

    def writers(self) -> list[Array]:
        """What writes the output."""
        return [self.down.weight]

    def __call__(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d"]:
        return self.write(self.hidden(x, tap=tap, rules=rules))

    def hidden(
        self, x: Float[Array, "*axes d"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "*axes d_mlp"]:
        """phi2(W1 phi1(x) + b1), what the down projection reads."""
        return tap("hidden", self.second(tap("pre", self.up(self.first(x)))))

    def write(self, hidden: Float[Array, "*axes d_mlp"]) -> Float[Array, "*axes d"]:
        """The down projection."""
        return self.down(hidden)


def rational(
    x: Float[Array, "*axes groups size"],
    numerator: Float[Array, " powers"],
    denominator: Float[Array, "groups powers_below"],
    form: Denominator = "kernel",
) -> Float[Array, "*axes groups size"]:
    """(sum_i a_i x^i) / q_g(x), with the denominator of that form."""
    above = jnp.polyval(numerator[::-1], x)
    coefficients = [denominator[:, power, None] for power in range(denominator.shape[1])]
    if form == "fitting":
        total = sum(b * x ** (power + 1) for power, b in enumerate(coefficients))
        return above / (1 + jnp.abs(total))
    base = jnp.abs(x) if form == "kernel" else x
    return above / (1 + sum(jnp.abs(b) * base ** (power + 1) for power, b in enumerate(coefficients)))


def fit_rational(
    target: Callable[[Any], Any], form: Denominator = "kernel", *, reach: float = 3.0, points: int = 1000
) -> tuple[np.ndarray, np.ndarray, float]:
    """(numerator [6], denominator [4], largest error) of the least-squares fit to `target` on [-reach, reach]."""
    x = np.linspace(-reach, reach, points)
    wanted = np.asarray(target(x), np.float64)

    def value(free: np.ndarray) -> np.ndarray:
        above = np.polyval(free[:NUMERATORS][::-1], x)
        powers = np.arange(1, DENOMINATORS + 1)[:, None]
        if form == "fitting":
            return above / (1 + np.abs(free[NUMERATORS:] @ x**powers))
        return above / (1 + np.abs(free[NUMERATORS:]) @ (np.abs(x) if form == "kernel" else x) ** powers)

    start = np.zeros(NUMERATORS + DENOMINATORS)
    start[1], start[NUMERATORS + 1] = 1.0, 0.1
    found = least_squares(lambda free: value(free) - wanted, start, method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14)
    return found.x[:NUMERATORS], found.x[NUMERATORS:], float(np.abs(value(found.x) - wanted).max())


def random_kat(key: PRNGKeyArray, d: int, d_mlp: int, groups: int = 8) -> KATMLP:
    """phi1 the identity, phi2 Swish fitted with the kernel's denominator; matrices scaled to keep variance.

    The gain of Swish on standard normal input is 2.8178: W2 has variance 2.8178 / d_mlp.
    """
    up_key, down_key = jax.random.split(key)
    identity = GroupRational(
        jnp.zeros(NUMERATORS, jnp.float32).at[1].set(1.0), jnp.zeros((groups, DENOMINATORS), jnp.float32)
    )
    above, below, _ = fit_rational(lambda x: x / (1 + np.exp(-x)))
    swish = GroupRational(jnp.asarray(above, jnp.float32), jnp.tile(jnp.asarray(below, jnp.float32), (groups, 1)))
    up = random_linear(up_key, d, d_mlp, bias=True)
    return KATMLP(identity, up, swish, random_linear(down_key, d_mlp, d, bias=True, scale=2.8178**0.5))
