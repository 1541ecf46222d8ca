"""What JAX is asked to do with mixed types and ranks, whatever the process is set to.

Another library of the process may have set `jax_numpy_dtype_promotion=strict` or `jax_numpy_rank_promotion=raise`. Our
own functions say their dtypes (weights and sums float32, codes in the activations' dtype) and rely on broadcasting from
the right; `ordinary` is how an entry point says so. It lasts for the call and its tracing, and for this thread only.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def ordinary() -> Iterator[None]:
    """Standard promotion of dtypes, silent promotion of ranks: as a decorator, `@ordinary()`."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
