"""Random parts, gates and sources of a toy model of superposition."""

import jax.numpy as jnp
import numpy as np

from jaxinterp.evaluation.planted.superposition import IN, OUT, Superposition
from jaxinterp.methods.factor import parameters as p


def problem(seed=0, samples=6, features=5, hidden=2, parts=4):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape))
    model = Superposition(normal(features, hidden), normal(hidden, features), normal(features))
    sizes = {IN: (features, hidden), OUT: (hidden, features)}
    made = {name: p.Parts(normal(parts, d_in), normal(parts, d_out)) for name, (d_in, d_out) in sizes.items()}
    gates = {name: p.Gates(normal(parts, 3), normal(parts, 3), normal(parts, 3), normal(parts)) for name in sizes}
    uniform = lambda *shape: jnp.asarray(draw.uniform(size=shape))
    sources = {name: p.Mask(uniform(samples, parts), uniform(samples)) for name in sizes}
    return model, made, gates, sources, uniform(samples, features)


def masked_by(model, parts, x):
    def masked(masks):
        def apply(name, x):
            weight = model.weights()[name]
            return p.masked_linear(x, weight, parts[name], masks[name]) if name in masks else x @ weight

        return model(x, apply)

    return masked
