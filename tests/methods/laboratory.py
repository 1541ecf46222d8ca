"""Planted problems, trained through the methods' own recipes in one compiled scan."""

import jax
import jax.numpy as jnp

from jaxinterp.data.batch import Sites, make_batch
from jaxinterp.models.tiny import unit_rows

FEATURES, D, ACTIVE = 48, 32, 3


def planted_dictionary(seed, samples=65_536):
    """V: 48 unit rows in 32 dimensions; samples h V with exactly 3 active h ~ U(0.5, 1.5)."""
    rows_key, choice_key, size_key = jax.random.split(jax.random.key(seed), 3)
    rows = unit_rows(rows_key, FEATURES, D)
    chosen = jax.lax.top_k(jax.random.uniform(choice_key, (samples, FEATURES)), ACTIVE)[1]
    sizes = jax.random.uniform(size_key, (samples, ACTIVE), minval=0.5, maxval=1.5)
    codes = jnp.zeros((samples, FEATURES)).at[jnp.arange(samples)[:, None], chosen].set(sizes)
    return rows, codes @ rows


def train(method, draw, sites, *, steps, batch_size, seed):
    """Train on fresh batches from `draw(key, size) -> arrays by site`; returns (decomposition, mean late metrics)."""
    recipe = method.recipe(steps)
    start_key, data_key = jax.random.split(jax.random.key(1000 + seed))

    @jax.jit
    def run():
        sample = make_batch(draw(jax.random.fold_in(data_key, steps), 4096), jnp.ones(4096), sites)

        def body(state, step):
            arrays = draw(jax.random.fold_in(data_key, step), batch_size)
            batch = make_batch(arrays, jnp.ones(batch_size), sites, step=step)
            state, metrics = recipe.step(state, batch, start_key, None)
            return state, {name: metrics[name].value() for name in ("fvu", "l0")}

        return jax.lax.scan(body, recipe.init(start_key, sample, None), jnp.arange(steps))

    state, history = run()
    return recipe.finish(state), {name: float(values[-200:].mean()) for name, values in history.items()}


def train_on_samples(method, samples, seed, *, steps=6000, batch_size=256):
    """`train` with batches drawn from fixed samples."""

    def draw(key, size):
        return {"x": samples[jax.random.randint(key, (size,), 0, len(samples))]}

    return train(method, draw, Sites("x", "x"), steps=steps, batch_size=batch_size, seed=seed)
