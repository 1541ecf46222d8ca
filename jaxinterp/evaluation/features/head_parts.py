"""Which attention heads make a feature fire that reads the residual stream or an MLP's input: the direct paths.

With g = ∂a_j / ∂z[l, :, h], a_j = the feature's pre-activation at one token, every norm's scale held constant, and no
attention and no MLP on the way:

    part of head (l, h)    sum_s z[l, s, h] . g[l, s, h]

The parts of all heads, of the embedding, of all MLPs and of the biases add up to a_j. What a head does through a later
head or MLP counts as that one's part: `causal.graphs.heads` follows such paths.

Source: direct feature attribution, Kissane et al. 2024, arXiv 2406.17759, here along the residual stream.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxinterp.core.decomposition import Normalised, Vectors
from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import Sites, several
from jaxinterp.models.edits import Add
from jaxinterp.models.rules import Rules
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites

ALONG_THE_STREAM = ("mlp/in", "attn/in", "resid/pre", "resid/mid", "resid/post")
"""What a feature may read: sums of what attention and MLPs write, normed or not."""


def head_parts(
    decomposition: Any, model: PyTree, tokens: Int[Array, "batch seq"], feature: int, positions: Int[Array, " batch"]
) -> Float[Array, "batch layers heads"]:
    """The module's equation for one token of each row.

    Args:
      decomposition: with read vectors, of one array.
      positions: the token of each row at which the feature is looked at.
    Returns:
      Parts in units of the pre-activation, of the layers up to the one that is read.
    Raises:
      UserError: it reads no sum along the residual stream, or the model names no heads (adapted ones).
    """
    why = why_no_parts(decomposition, model)
    if why is not None:
        raise UserError(why)
    return _parts(decomposition, model, tokens, jnp.asarray(feature), positions)


def why_no_parts(decomposition: Any, model: PyTree) -> str | None:
    """One line that says why heads have no parts; None if they have."""
    found: Sites = decomposition.sites
    reads = several(found.reads)
    if len(reads) != 1 or not reads[0].endswith(ALONG_THE_STREAM) or not isinstance(decomposition, Vectors):
        return f"the decomposition reads {', '.join(reads)}: heads have a part in {', '.join(ALONG_THE_STREAM)} alone."
    layers = _layers(reads[0])
    absent = [name for name in map(_z, layers) if name not in sites(model)]
    return f"the model does not name {absent[0]}: its heads have no parts." if absent else None


def _layers(reads: str) -> range:
    """The layers whose attention comes before an array."""
    _, layer, *rest = reads.split("/")
    before = rest in (["attn", "in"], ["resid", "pre"])
    return range(int(layer) + (not before))


def _z(layer: int) -> str:
    return f"blocks/{layer}/attn/z"


@eqx.filter_jit
def _parts(decomposition: Any, model: PyTree, tokens: Array, feature: Array, positions: Array) -> Array:
    (reads,) = several(decomposition.sites.reads)
    layers, rows = _layers(reads), jnp.arange(tokens.shape[0])
    if not layers:
        return jnp.zeros((tokens.shape[0], 0, 0), jnp.float32)
    inputs = (f"blocks/{layer}/{part}/in" for layer in layers for part in ("attn", "mlp"))
    stops: dict[str, Any] = {name: jax.lax.stop_gradient for name in inputs if name != reads}
    names = [_z(layer) for layer in layers]
    trace = run(model, tokens, keep=tuple(names))
    z = {name: trace[name] for name in names}

    def fires(moved: dict[str, Array]) -> Array:
        edits = stops | {name: Add(delta) for name, delta in moved.items()}
        x = run(model, tokens, edits=edits, keep=(reads,), rules=Rules(norm=True))[reads][rows, positions]
        x = decomposition.normalise(x) if isinstance(decomposition, Normalised) else x
        return jnp.sum(x.astype(jnp.float32) @ decomposition.encoder[feature].astype(jnp.float32))

    gradient = jax.grad(fires)(jax.tree.map(jnp.zeros_like, z))
    part = lambda z, g: jnp.einsum("bshd,bshd->bh", z.astype(jnp.float32), g.astype(jnp.float32))
    return jnp.stack([part(z[name], gradient[name]) for name in names], axis=1)
