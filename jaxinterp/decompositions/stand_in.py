"""A decomposition in the place of a whole leaf, with or without what it misses."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.offered import offered, with_error
from jaxinterp.models.layers import Tap, call_leaf, no_tap
from jaxinterp.models.rules import EXACT, Rules


class StandIn(eqx.Module):
    """A decomposition of a leaf or of something inside an MLP, as a callable that replaces the whole leaf.

    It reads the leaf's input; where the decomposition reads or writes an array further in, the original MLP computes
    the way there and the way on. One that can read a gradient beside its array does without it here. It offers the
    decomposition's codes to `tap`.

    `keep_error`: the leaf itself is computed too, and what the decomposition misses is added (the site `error`):
    nothing changes until codes are edited, and then by the change of what they write:

        model = replace(model, {leaf: StandIn(select(model, leaf).get(), transcoder, keep_error=True)})
        run(model, tokens, edits={f"{leaf}/codes": edit})
    """

    mlp: PyTree
    decomposition: Any
    keep_error: bool = eqx.field(static=True, default=False)

    @property
    def sites(self) -> Sites:
        """The input and output of the leaf that it replaces: `replace` puts it nowhere else."""
        leaf = self.decomposition.sites.leaf
        return Sites(f"{leaf}/in", f"{leaf}/out")

    def __call__(
        self,
        x: Float[Array, "*axes d_model"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        real: Bool[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "*axes d_model"]:
        """The leaf's output; `real` and `positions` are handed to a leaf that takes them."""
        own = self.decomposition.sites.without_gradients
        for name in (own.reads, own.writes):
            if not isinstance(name, str) or _port(name) not in ("in", "hidden", "out"):
                raise UserError(f"site {name!r} cannot be reached from an MLP's input: in, hidden and out can.")
        given: dict[str, PyTree] = {"rules": rules, "real": real, "positions": positions}
        value = self._reach(_port(own.reads), x, given)
        codes, flowing = offered(self.decomposition.encode, value, tap, self.decomposition)
        decode = lambda codes: self.decomposition.decode(codes, value)
        if self.keep_error:
            target = value if own.reads == own.writes else self._reach(_port(own.writes), x, given)
            written = with_error(decode, target, codes, flowing, tap)
        else:
            written = decode(flowing).astype(x.dtype)
        if _port(own.writes) == "out":
            return written
        return self.mlp.write(written) if _port(own.writes) == "hidden" else call_leaf(self.mlp, written, **given)

    def _reach(self, port: str, x: Array, given: dict[str, PyTree]) -> Array:
        """An array of the leaf, from its input."""
        if port == "in":
            return x
        return call_leaf(self.mlp.hidden if port == "hidden" else self.mlp, x, **given)


def _port(name: str) -> str:
    return name.rpartition("/")[2]
