"""Two planted layers of ReLU neurons; those of layer 0 write to outputs 0 and 1."""

import jax
import jax.numpy as jnp

from jaxinterp.core.batch import Sites
from jaxinterp.models.tiny import unit_rows

NEURONS, D, LAYERS = 24, 32, 2
SITES = Sites(("m0/in", "m1/in"), ("m0/out", "m1/out"))


def plant(seed):
    """Read vectors [layer, neuron, d], write vectors [layer, neuron, target, d]; layer 1 writes nothing to output 0."""
    keys = jax.random.split(jax.random.key(seed), 5)
    reads = jnp.stack([unit_rows(key, NEURONS, D) for key in keys[:2]])
    to = [unit_rows(key, NEURONS, D) for key in keys[2:]]
    return reads, jnp.stack([jnp.stack([to[0], to[1]], 1), jnp.stack([0 * to[2], to[2]], 1)])


def draw(planted, key, size):
    reads, writes = planted
    x = jax.random.normal(key, (LAYERS, size, D))
    hidden = jax.nn.relu(jnp.einsum("snd,std->stn", reads, x) - 1.5)
    y = jnp.einsum("stn,snld->ltd", hidden, writes)
    return dict(zip(SITES.reads + SITES.writes, [*x, *y], strict=True))
