"""Codes as sites: what a decomposition offers to `tap` where it replaces a leaf, or is put at an array by an edit.

    codes_pre, gate_pre   [..., features]  what its activation decides on, where codes can be made of it again
    codes                 [..., features]  dense, one value a feature
    error                 [..., d_out]     y - decode(codes), where what is missed is kept

An array is edited where `tap` returns another object. With c the codes, c' those that flow on, e = y - decode(c):

    nothing kept          decode(c')
    keep_error            y + (decode(c') - decode(c)); y itself where nothing is edited
                          decode(c') + e' where e' was put in the place of e

Without an edit, codes are decoded sparsely, and the dense arrays, which nobody reads, are not part of a compiled
program. The derivative is that of these equations: with the error kept, what is upstream acts through y and through the
change of the codes. To hold the error constant instead, as attribution graphs do, edit it with
`jax.lax.stop_gradient`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.decomposition import Codes
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.codes import DenseCodes
from jaxinterp.models.layers import Tap, no_tap, under, wants


@runtime_checkable
class FromPre(Protocol):
    """A decomposition or an activation whose codes can be made of pre-activations again.

    `pre` gives the arrays by the name under which they are offered ("codes_pre", "gate_pre"), one value a feature;
    none where its activation has none. `from_pre(pre(x), x)` are the codes of x. Called by `offered`, and only where
    somebody looks at one of these arrays.
    """

    def pre(self, x: PyTree) -> Mapping[str, Array]: ...
    def from_pre(self, pre: Mapping[str, Array], x: PyTree) -> Codes: ...


def offered(encode: Callable[[Any], Codes], x: PyTree, tap: Tap, source: object = None) -> tuple[Codes, Codes]:
    """The codes of x, and those that flow on after the edits at `codes_pre`, `gate_pre` and `codes`.

    Args:
      encode: x -> codes.
      source: offers pre-activations where it is a `FromPre`.
    Returns:
      (c, c'): the same object twice where nothing was edited.
    """
    codes = encode(x)
    flowing = codes
    if isinstance(source, FromPre) and (wants(tap, "codes_pre") or wants(tap, "gate_pre")):
        pre = source.pre(x)
        edited = {name: tap(name, value) for name, value in pre.items()}
        if any(edited[name] is not value for name, value in pre.items()):
            flowing = source.from_pre(edited, x)
    if wants(tap, "codes"):
        dense = flowing.dense()
        values = tap("codes", dense)
        if values is not dense:
            flowing = DenseCodes(values)
    return codes, flowing


def with_error(
    decode: Callable[[Any], Array], y: Float[Array, "*axes d"], codes: PyTree, flowing: PyTree, tap: Tap
) -> Float[Array, "*axes d"]:
    """What replaces y where the error is kept: the module's equations.

    Args:
      decode: codes -> what they say y is.
      y: the array as it was.
      codes, flowing: c and c' as `offered` returns them.
    """
    if wants(tap, "error"):
        error = y - decode(codes)
        edited = tap("error", error)
        if edited is not error:
            return (decode(flowing) + edited).astype(y.dtype)
    if flowing is codes:
        return y
    return (y + (decode(flowing) - decode(codes))).astype(y.dtype)


def replaced(decomposition: Any, x: PyTree, tap: Tap) -> Array:
    """decode(c') in the dtype of x: what a decomposition is in the place of its leaf."""
    _, flowing = offered(decomposition.encode, x, tap, decomposition)
    return decomposition.decode(flowing, x).astype(x.dtype)


class Through(eqx.Module):
    """The edit that sends an array through a decomposition of it: `edits={"blocks/1/resid/post": Through(sae)}`.

    `blocks/1/resid/post/{codes,codes_pre,error}` are sites then, in the same run:

        run(model, tokens, edits={site: Through(sae, keep_error=True), f"{site}/codes": At(SetTo(0.0), (3,))})

    `keep_error`: what the decomposition misses stays, so that nothing changes without an edit of the codes.
    """

    decomposition: Any
    keep_error: bool = eqx.field(static=True, default=False)

    def __call__(self, x: Float[Array, "..."], *, tap: Tap = no_tap, name: str | None = None) -> Float[Array, "..."]:
        own = self.decomposition.sites.without_gradients
        if own.reads != own.writes or (name is not None and own.reads != name):
            way_out = (
                f"put it at {own.reads!r}"
                if own.reads == own.writes
                else f"replace the leaf {own.leaf!r} by it instead"
            )
            raise UserError(
                f"the decomposition at {name!r} reads {own.reads!r} and writes {own.writes!r}, not this array: "
                f"{way_out}."
            )
        flat = x.reshape(*x.shape[:2], -1) if x.ndim > 3 else x  # heads beside each other
        below = tap if name is None else under(tap, name)
        codes, flowing = offered(self.decomposition.encode, flat, below, self.decomposition)
        decode = lambda codes: self.decomposition.decode(codes, flat)
        y = with_error(decode, flat, codes, flowing, below) if self.keep_error else decode(flowing)
        return y.astype(x.dtype).reshape(x.shape)
