"""The sparse passes on a mesh: the only `shard_map` of the project.

Dictionary rows lie over the mesh axis `feature`, tokens over `data`. Where the current mesh lacks one of these axes, or
both have size 1, a pass is the single-device pass that `dispatch` names; on a mesh each shard runs that on its part.

    encode      local top-k, gather of tokens * k * shards candidates over `feature`, top-k of those
    gather_sum  each shard sums the rows that it owns, one psum of [tokens, d] over `feature`
    sampled_dot likewise, one psum of [tokens, k]
    outer_sum   local rows only; one sum of [features / shards, d] over `data`, nothing over `feature`; every data
                shard keeps its part of the sum (a reduce-scatter), where an optimizer's moments lie too

Every global winner is a winner of its shard, so the selection is exact; candidates arrive in the order of the shards,
so that ties still go to the lowest index. An explicit `shard_map` is needed even over `data` alone: XLA's CPU backend
gathers the whole array before a `top_k`. A shard's matmul may round otherwise than the whole's: where pre-activations
differ in their last bits only, another of them may be chosen.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxinterp.core.errors import UserError
from jaxinterp.kernels import dispatch, xla
from jaxinterp.kernels.rank import Rank

TOKENS, FEATURES, SPREAD = P("data"), P("feature"), P(("feature", "data"))


def encode(
    x: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    bias: Float[Array, " features"],
    k: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"]]:
    """The k largest of x W^T + b per token."""

    def local(x: Array, rows: Array, bias: Array) -> tuple[Array, Array]:
        of_shard = min(k, rows.shape[0])
        run = _find(implementation, "encode", x.shape[0], rows, of_shard)
        values, indices = run(x, rows, bias, of_shard)
        return _merge(values, (values, indices), rows.shape[0], k)

    return _spread(local, (TOKENS, FEATURES, FEATURES), (TOKENS, TOKENS), x.shape[0], rows.shape[0])(x, rows, bias)


def encode_ranked(
    x: Float[Array, "tokens d"], rows: Float[Array, "features d"], bias: Float[Array, " features"], k: int, rank: Rank
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"], Int[Array, " tokens"]]:
    """Values and features of the k best by `rank`, and how many features were not forbidden."""

    def local(x: Array, rows: Array, bias: Array, tokens: Any, features: Any) -> tuple[Array, Array, Array]:
        here = rank._replace(tokens=tokens, features=features)
        scores, values, indices, count = xla.encode_ranked(x, rows, bias, min(k, rows.shape[0]), here)
        return *_merge(scores, (values, indices), rows.shape[0], k), _summed(count)

    specs = TOKENS, FEATURES, FEATURES, TOKENS, FEATURES
    spread = _spread(local, specs, (TOKENS, TOKENS, TOKENS), x.shape[0], rows.shape[0])
    return spread(x, rows, bias, rank.tokens, rank.features)


def encode_groups(
    x: Float[Array, "tokens d"], rows: Float[Array, "features d"], bias: Float[Array, " features"], groups: int
) -> tuple[Float[Array, "tokens groups"], Int[Array, "tokens groups"]]:
    """The largest of x W^T + b in each of `groups` groups of neighbouring features; each group lies on one shard."""

    def local(x: Array, rows: Array, bias: Array) -> tuple[Array, Array]:
        shards = _shards()
        if groups % shards:
            raise UserError(f"groups={groups} cannot be spread evenly over the mesh axis feature={shards}.")
        values, indices = xla.encode_groups(x, rows, bias, groups // shards)
        return _gathered((values, _global(indices, rows.shape[0])))

    return _spread(local, (TOKENS, FEATURES, FEATURES), (TOKENS, TOKENS), x.shape[0], rows.shape[0])(x, rows, bias)


def select(
    pre: Float[Array, "tokens features"], k: int, rank: Rank | None
) -> tuple[Float[Array, "tokens k"], Int[Array, "tokens k"], Int[Array, " tokens"]]:
    """`encode_ranked` of pre-activations that are there already; on one shard where they cannot be spread evenly.

    What is selected from may also be windows of text or the k values of a code: an axis of any size.
    """

    def local(pre: Array, tokens: Any, features: Any) -> tuple[Array, Array, Array]:
        here = Rank(_itself) if rank is None else rank._replace(tokens=tokens, features=features)
        scores, values, indices, count = xla.ranked(pre, here, min(k, pre.shape[1]))
        return *_merge(scores, (values, indices), pre.shape[1], k), _summed(count)

    tokens, features = ((), ()) if rank is None else (rank.tokens, rank.features)
    mesh = _mesh()
    if mesh is not None and (pre.shape[0] % mesh.shape["data"] or pre.shape[1] % mesh.shape["feature"]):
        return xla.ranked(pre, Rank(_itself) if rank is None else rank, k)[1:]
    specs = P("data", "feature"), TOKENS, FEATURES
    return _spread(local, specs, (TOKENS, TOKENS, TOKENS), *pre.shape)(pre, tokens, features)


def gather_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    rows: Float[Array, "features d"],
    implementation: str | None = None,
) -> Float[Array, "tokens d"]:
    """Per token, the sum of the rows at its indices, weighted by its values."""

    def local(values: Array, indices: Array, rows: Array) -> Array:
        run = _find(implementation, "gather_sum", values.shape[0], rows, values.shape[1])
        return _summed(run(values, _own(indices, rows.shape[0]), rows))

    return _spread(local, (TOKENS, TOKENS, FEATURES), TOKENS, values.shape[0], rows.shape[0])(values, indices, rows)


def sampled_dot(
    g: Float[Array, "tokens d"],
    rows: Float[Array, "features d"],
    indices: Int[Array, "tokens k"],
    implementation: str | None = None,
) -> Float[Array, "tokens k"]:
    """Per token, the inner products of g with the rows at its indices."""

    def local(g: Array, rows: Array, indices: Array) -> Array:
        run = _find(implementation, "sampled_dot", g.shape[0], rows, indices.shape[1])
        return _summed(run(g, rows, _own(indices, rows.shape[0])))

    return _spread(local, (TOKENS, FEATURES, TOKENS), TOKENS, g.shape[0], rows.shape[0])(g, rows, indices)


def outer_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    g: Float[Array, "tokens d"],
    features: int,
    implementation: str | None = None,
) -> Float[Array, "features d"]:
    """The gradient of `gather_sum` in its rows."""

    def local(values: Array, indices: Array, g: Array) -> Array:
        owned = features // _shards()
        where = {"tokens": g.shape[0], "features": owned, "k": values.shape[1], "width": g.shape[1]}
        run = dispatch.find(implementation, "outer_sum", **where)
        return _over_data(run(values, _own(indices, owned), g, owned), owned)

    return _spread(local, (TOKENS, TOKENS, TOKENS), _summed_rows(features), g.shape[0], features)(values, indices, g)


def outer_and_value_sum(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    g: Float[Array, "tokens d"],
    features: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "features d"], Float[Array, " features"]]:
    """`outer_sum`, and per feature the sum of its values: the gradients of an encoder's rows and biases."""

    def local(values: Array, indices: Array, g: Array) -> tuple[Array, Array]:
        owned = features // _shards()
        where = {"tokens": g.shape[0], "features": owned, "k": values.shape[1], "width": g.shape[1]}
        run = dispatch.find(implementation, "outer_and_value_sum", **where)
        return run(values, _own(indices, owned), g, owned, over_data=partial(_over_data, owned=owned))

    lies = _summed_rows(features)
    return _spread(local, (TOKENS, TOKENS, TOKENS), (lies, lies), g.shape[0], features)(values, indices, g)


def value_sum(
    values: Float[Array, "tokens k"], indices: Int[Array, "tokens k"], features: int
) -> Float[Array, " features"]:
    """Per feature, the sum of its values."""

    def local(values: Array, indices: Array) -> Array:
        owned = features // _shards()
        return _over_data(xla.value_sum(values, _own(indices, owned), owned), owned)

    return _spread(local, (TOKENS, TOKENS), _summed_rows(features), values.shape[0], features)(values, indices)


def _mesh() -> AbstractMesh | None:
    """The current mesh, if it has both axes and they spread something over more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not {"data", "feature"} <= set(mesh.axis_names):
        return None
    return mesh if mesh.shape["data"] * mesh.shape["feature"] > 1 else None


def _shards() -> int:
    mesh = _mesh()
    return 1 if mesh is None else mesh.shape["feature"]


def _spread(local: Callable[..., Any], in_specs: Any, out_specs: Any, tokens: int, features: int) -> Callable[..., Any]:
    """`local` on every shard of the current mesh, or as it is where there is none."""
    mesh = _mesh()
    if mesh is None:
        return local
    for name, size, axis in (("tokens", tokens, "data"), ("features", features, "feature")):
        if size % mesh.shape[axis]:
            raise UserError(
                f"{name}={size} cannot be spread evenly over the mesh axis {axis}={mesh.shape[axis]}: "
                f"take a multiple of {mesh.shape[axis]}."
            )
    # check_vma cannot prove that gathered candidates are the same on every shard.
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _find(implementation: str | None, of: str, tokens: int, rows: Array, k: int) -> Callable[..., Any]:
    shape = {"tokens": tokens, "features": rows.shape[0], "k": k, "width": rows.shape[1]}
    return dispatch.find(implementation, of, **shape, itemsize=rows.dtype.itemsize)


def _merge(scores: Array, of_shard: tuple[Array, Array], owned: int, k: int) -> tuple[Array, Array]:
    """The k best of all shards by score: values and features."""
    values, indices = of_shard
    if _shards() == 1:
        return values, indices
    plain = scores is values
    indices = _global(indices, owned)
    scores, values, indices = _gathered((scores, None if plain else values, indices))
    scores, winners = jax.lax.top_k(scores, k)
    chosen = scores if plain else jnp.take_along_axis(values, winners, axis=1)
    return chosen, jnp.take_along_axis(indices, winners, axis=1)


def _gathered(of_shard: Any) -> Any:
    """The columns of all shards, in the order of the shards."""
    return jax.lax.all_gather(of_shard, "feature", axis=1, tiled=True) if _shards() > 1 else of_shard


def _summed(of_shard: Array) -> Array:
    return jax.lax.psum(of_shard, "feature") if _shards() > 1 else of_shard


def spread_evenly(rows: int, mesh: AbstractMesh | Mesh) -> bool:
    """Whether the rows of every feature shard can be spread over `data` as well."""
    return rows % (mesh.shape["feature"] * mesh.shape["data"]) == 0


def _summed_rows(features: int) -> P:
    mesh = _mesh()
    return SPREAD if mesh is not None and spread_evenly(features, mesh) else FEATURES


def _over_data(of_shard: Any, owned: int) -> Any:
    """Sums of rows over `data`; each shard keeps its part where they can be cut evenly."""
    mesh = _mesh()
    if mesh is None:
        return of_shard
    if owned % mesh.shape["data"]:
        return jax.lax.psum(of_shard, "data")
    return jax.lax.psum_scatter(of_shard, "data", tiled=True)


def _global(indices: Array, owned: int) -> Array:
    """This shard's indices as indices into all rows."""
    return indices + jax.lax.axis_index("feature") * owned if _shards() > 1 else indices


def _own(indices: Array, owned: int) -> Array:
    """Indices into this shard's rows; those of other shards become `owned`, which names no row."""
    if _shards() == 1:
        return indices
    here = indices - jax.lax.axis_index("feature") * owned
    return jnp.where((here >= 0) & (here < owned), here, owned)


def _itself(pre: Array, tokens: Any, features: Any) -> Array:
    return pre
