"""The next token from logits: greedy, or drawn after temperature, top-k and top-p, in this order.

temperature t   softmax(logits / t); 0: the most probable token
top_k           the k most probable tokens only; equal logits at the end are all kept
top_p           the smallest set of most probable tokens with at least this much of the mass (Holtzman et al. 2019,
                arXiv 1904.09751)
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.core.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see the module's docstring.

    Raises:
      UserError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name, value, kinds in (
            ("temperature", self.temperature, int | float | np.number),
            ("top_k", self.top_k, int | np.integer | None),
            ("top_p", self.top_p, int | float | np.number | None),
        ):
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise UserError(f"{name}={value!r} must be a {'whole ' if name == 'top_k' else ''}number.")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be 0 (greedy) or positive.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1; None keeps all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1; None keeps all tokens.")


def filtered(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Float[Array, "batch vocab"]:
    """Logits over temperature, -inf for tokens that top_k and top_p leave out.

    Raises:
      UserError: the temperature is 0: nothing is drawn then.
    """
    if sampling.temperature == 0:
        raise UserError("temperature=0 is greedy: filtered(...) is for drawing, give a positive temperature.")
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p  # the mass before a token is not enough yet
        rows = jnp.arange(logits.shape[0])[:, None]
        logits = jnp.where(jnp.zeros(logits.shape, bool).at[rows, order].set(kept), logits, -jnp.inf)
    return logits


def next_token(
    logits: Float[Array, "batch vocab"], sampling: Sampling, key: PRNGKeyArray
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """The next token of every row, and its log probability under the logits as they are (temperature 1), nats."""
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1)
    else:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
        # The largest becomes 0 first: over a tiny temperature all positive ones would be infinite, and so equal.
        wide = logits.astype(jnp.float32)
        coldest = replace(sampling, temperature=max(sampling.temperature, 1e-30))  # below, float32 may have 0
        scaled = filtered(wide - jnp.max(wide, axis=-1, keepdims=True), coldest)
        token = jax.vmap(jax.random.categorical)(keys, scaled)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return token.astype(jnp.int32), jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]
