"""The programs whose compiled form is looked at: the loss and the step of a TopK dictionary."""

import jax
import jax.numpy as jnp
import optax

from jaxinterp.kernels import encode_topk, sparse_decode


def parameters(features, d, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    encoder = jax.random.normal(keys[0], (features, d)) / d**0.5
    decoder = jax.random.normal(keys[1], (features, d)) / d**0.5
    return {
        "encoder": encoder,
        "encoder_bias": 0.1 * jax.random.normal(keys[2], (features,)),
        "decoder": decoder,
        "decoder_bias": jnp.zeros(d),
    }


def loss(parameters, x, k, implementation=None):
    """The squared error of a TopK dictionary."""
    rows, bias = parameters["encoder"], parameters["encoder_bias"]
    values, indices = encode_topk(x, rows, bias, k=k, implementation=implementation)
    y = sparse_decode(jax.nn.relu(values), indices, parameters["decoder"], implementation=implementation)
    return jnp.mean(jnp.sum((y + parameters["decoder_bias"] - x) ** 2, axis=-1))


def step(parameters, state, x, k, optimizer=None):
    """Forward, backward, Adam, decoder rows of unit norm."""
    optimizer = optimizer or optax.adam(1e-3)
    gradient = jax.grad(loss)(parameters, x, k)
    updates, state = optimizer.update(gradient, state)
    parameters = optax.apply_updates(parameters, updates)
    norms = jnp.linalg.norm(parameters["decoder"], axis=1, keepdims=True)
    return {**parameters, "decoder": parameters["decoder"] / norms}, state
