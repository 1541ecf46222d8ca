"""The entries of all tokens in the order of their features: runs that GPU kernels walk, cut where they are long."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int

CHUNK = 256  # sorted entries that one program walks at most


def order(
    indices: Int[Array, "tokens k"], features: int
) -> tuple[Int[Array, " entries"], Int[Array, " features"], Int[Array, " features"]]:
    """The entries n k + j in the order of their features, and where the run of each feature starts and stops.

    A feature without an entry starts and stops at 0; entries of no row come last, in no run. Two calls with the same
    indices compile to one sort. Its keys are unsigned: XLA has a radix sort on a GPU for those and not for signed ones.
    """
    keys = indices.reshape(-1).astype(jnp.uint32)
    places = jnp.arange(indices.size, dtype=jnp.int32)
    keys, entries = jax.lax.sort((keys, places), num_keys=1, is_stable=True)
    sorted_features = keys.astype(jnp.int32)
    changes = sorted_features[1:] != sorted_features[:-1]
    edge = jnp.ones(1, bool)
    nowhere = features + places  # dropped, and each of them another: a scatter of unique indices needs no order

    def at_ends(ends: Array, position: Array) -> Array:
        target = jnp.where(ends, sorted_features, nowhere)
        return jnp.zeros(features, jnp.int32).at[target].set(position, mode="drop", unique_indices=True)

    starts = at_ends(jnp.concatenate([edge, changes]), places)
    stops = at_ends(jnp.concatenate([changes, edge]), places + 1)
    return entries, starts, stops


def cuts_of(indices: Array, entries: Array, stops: Array) -> tuple[Array, Array]:
    """The multiples of CHUNK among the sorted entries, and how far the run cut by each goes on in that chunk."""
    cuts = jnp.arange(1, max(2, pl.cdiv(indices.size, CHUNK)), dtype=jnp.int32) * CHUNK
    before = entries[jnp.minimum(cuts, indices.size) - 1]
    feature = indices.reshape(-1)[before].astype(jnp.int32)
    # Nothing goes on from one run to the next, past the last entry, or among entries of no row.
    run_stops = stops.at[feature].get(mode="fill", fill_value=0)
    return cuts, jnp.clip(run_stops, cuts, cuts + CHUNK)
