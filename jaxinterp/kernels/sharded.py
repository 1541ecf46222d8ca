"""The four sparse passes on a mesh: the only `shard_map` of the project.

Dictionary rows lie over the mesh axis `feature`, tokens over `data`. Where the current mesh lacks one of these axes, or
both have size 1, a pass is the single-device pass.

    select      local top-k, gather of tokens * k * shards candidates over `feature`, top-k of those
    gather_sum  each shard sums the rows that it owns, one psum of [tokens, d] over `feature`
    sampled_dot likewise, one psum of [tokens, k]
    outer_sum   local rows only; one psum of [features / shards, d] over `data`, nothing over `feature`

Every global winner is a winner of its shard, so the selection is exact; candidates arrive in the order of the shards,
so that ties still go to the lowest index. An explicit `shard_map` is needed even over `data` alone: XLA's CPU backend
gathers the whole array before a `top_k`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxinterp.errors import UserError
from jaxinterp.kernels import pieces


def select(
    x: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    allowed: Bool[Array, " features"] | None,
    k: int,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """`pieces.select` on the current mesh."""
    mesh = _mesh()
    if mesh is None:
        return pieces.select(x, rows, bias, allowed, k)
    _check_divides(mesh, x.shape[0], rows.shape[0])
    allowed = jnp.ones(rows.shape[0], bool) if allowed is None else allowed

    def local(x: Array, rows: Array, bias: Array, allowed: Array) -> tuple[Array, Array]:
        values, indices = pieces.select(x, rows, bias, allowed, min(k, rows.shape[0]))
        indices = indices + jax.lax.axis_index("feature") * rows.shape[0]
        values = jax.lax.all_gather(values, "feature", axis=1, tiled=True)
        indices = jax.lax.all_gather(indices, "feature", axis=1, tiled=True)
        values, winners = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(indices, winners, axis=1)

    specs = P("data"), P("feature"), P("feature"), P("feature")
    return _over(mesh, local, specs, (P("data"), P("data")))(x, rows, bias, allowed)


def gather_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], rows: Float[Array, "features d"]
) -> Float[Array, "tokens d"]:
    """`pieces.gather_sum` on the current mesh."""
    mesh = _mesh()
    if mesh is None:
        return pieces.gather_sum(values, indices, rows)

    def local(values: Array, indices: Array, rows: Array) -> Array:
        return jax.lax.psum(pieces.gather_sum(values, _own(indices, rows.shape[0]), rows), "feature")

    return _over(mesh, local, (P("data"), P("data"), P("feature")), P("data"))(values, indices, rows)


def sampled_dot(
    g: Float[Array, "tokens d"], rows: Float[Array, "features d"], indices: Int[Array, "tokens k"]
) -> Float[Array, "tokens k"]:
    """`pieces.sampled_dot` on the current mesh."""
    mesh = _mesh()
    if mesh is None:
        return pieces.sampled_dot(g, rows, indices)

    def local(g: Array, rows: Array, indices: Array) -> Array:
        return jax.lax.psum(pieces.sampled_dot(g, rows, _own(indices, rows.shape[0])), "feature")

    return _over(mesh, local, (P("data"), P("feature"), P("data")), P("data"))(g, rows, indices)


def outer_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], g: Float[Array, "tokens d"], features: int
) -> Float[Array, "features d"]:
    """`pieces.outer_sum` on the current mesh."""
    mesh = _mesh()
    if mesh is None:
        return pieces.outer_sum(values, indices, g, features)
    owned = features // mesh.shape["feature"]

    def local(values: Array, indices: Array, g: Array) -> Array:
        return jax.lax.psum(pieces.outer_sum(values, _own(indices, owned), g, owned), "data")

    return _over(mesh, local, (P("data"), P("data"), P("data")), P("feature"))(values, indices, g)


def _mesh() -> AbstractMesh | None:
    """The current mesh, if it has both axes and they spread something over more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {"data", "feature"} <= set(mesh.axis_names):
        return None
    return mesh if mesh.shape["data"] * mesh.shape["feature"] > 1 else None


def _over(mesh: AbstractMesh, local, in_specs, out_specs):
    # check_vma cannot prove that gathered candidates are the same on every shard.
    return partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(local)


def _own(indices: Array, owned: int) -> Array:
    """Indices into this shard's rows; those of other shards become `owned`, which stands for no row."""
    here = indices - jax.lax.axis_index("feature") * owned
    return jnp.where((here >= 0) & (here < owned), here, owned)


def _check_divides(mesh: AbstractMesh, tokens: int, features: int) -> None:
    for name, size, axis in (("batch_size", tokens, "data"), ("features", features, "feature")):
        if size % mesh.shape[axis]:
            raise UserError(
                f"{name}={size} cannot be spread evenly over the mesh axis {axis}={mesh.shape[axis]}: "
                f"take a multiple of {mesh.shape[axis]}."
            )
