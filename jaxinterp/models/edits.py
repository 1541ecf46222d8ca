"""Edits: callable pytrees that map a named array to the one that flows on, `run(model, tokens, edits={name: edit})`."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinterp.core.callables import takes
from jaxinterp.core.errors import UserError

Edit = Callable[..., Array]
"""A callable pytree that maps an array to the one that flows on: `edit(x)`, of the same shape and dtype.

An edit that takes `positions`, `tap` or `name` by keyword gets them from `run`:

    positions  Int [batch, seq]: the position of every token, -1 for padding
    tap        offers arrays of the edit's own by their whole name, `blocks/1/resid/post/codes`
    name       the name of the edited array
"""


def _as_array(value: object) -> object:
    """A number or a NumPy array as a JAX array; a number in JAX's default float."""
    if isinstance(value, bool | int | float):
        return jnp.asarray(value, jnp.result_type(float))
    return jnp.asarray(value) if isinstance(value, np.ndarray | np.generic) else value


def _places(positions: int | Sequence[int]) -> tuple[int, ...]:
    return (positions,) if isinstance(positions, int) else tuple(int(position) for position in positions)


class SetTo(eqx.Module):
    """The edit that puts `value` where the array was: ablate with 0, patch with another run's array.

    The value is broadcast; one with as many entries as the array is reshaped. `SetTo(0.0)` sets all to zero.

    Example:
      >>> ablated = run(subject.model, tokens, edits={"blocks/1/mlp/out": SetTo(0.0)})
      >>> float(jnp.abs(ablated["blocks/1/mlp/out"]).max())
      0.0
    """

    value: Float[Array, "..."] = eqx.field(converter=_as_array)

    def __call__(self, x: Array) -> Array:
        if self.value.size == x.size:
            return self.value.reshape(x.shape).astype(x.dtype)
        return jnp.broadcast_to(self.value, x.shape).astype(x.dtype)


class Add(eqx.Module):
    """The edit that adds `delta` (broadcast): steer with a direction, or differentiate by a zero.

    Example:
      >>> steered = run(subject.model, tokens, edits={"blocks/1/resid/post": Add(jnp.ones(64))})
    """

    delta: Float[Array, "..."] = eqx.field(converter=_as_array)

    def __call__(self, x: Array) -> Array:
        return (x + self.delta).astype(x.dtype)


class Apply(eqx.Module):
    """The edit `function(x)`: makes an edit that can be an argument of `jax.jit` of any function.

    `edits={name: lambda x: 2 * x}` works in a call of `run`; as an *argument* of a jitted function an edit must be a
    pytree, which a lambda is not: `{name: Apply(lambda x: 2 * x)}`.
    """

    function: Callable[..., Array] = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        return self.function(x)


class At(eqx.Module):
    """The edit `edit` at some positions only; the array is [batch, seq, ...].

    Positions are absolute: those of the prompt and of what is generated after it, without padding.
    """

    edit: Callable[..., Array]
    positions: tuple[int, ...] = eqx.field(static=True, converter=_places)

    def __check_init__(self) -> None:
        """Raises UserError if a position is negative: the end of a prompt is not known here, and padding has -1."""
        if any(position < 0 for position in self.positions):
            raise UserError(
                f"positions={self.positions}: positions are absolute, from 0; give the number of the last one, not -1."
            )

    def __call__(self, x: Array, *, positions: Int[Array, "batch seq"]) -> Array:
        if x.shape[:2] != positions.shape:
            raise UserError(f"At(...) edits arrays [batch, seq, ...], but this one is {x.shape} for {positions.shape}.")
        here = jnp.isin(positions, jnp.asarray(self.positions, jnp.int32))
        edited = self.edit(x, positions=positions) if takes(self.edit, "positions") else self.edit(x)
        return jnp.where(here.reshape(*here.shape, *[1] * (x.ndim - 2)), edited, x)
