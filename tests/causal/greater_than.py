"""A hand-made model of the greater-than task, whose circuit is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.models.layers import Linear
from jaxinterp.models.mlp import MLP
from jaxinterp.models.transformer import TransformerConfig, initialise

DIGITS, TO = 6, 6


DIGIT, SEEN, MOVED, OUT = 0, 7, 13, 19  # where the residual stream holds what


WIDTH = 25


def greater_than(turn=0):
    """A digit, then `to`: every later digit is raised. MLP 0 sees the digit, head 0 of layer 1 moves it to the end.

    Feature j of MLP 1 is active where a digit below j was moved, and raises j. Head 1 and four more neurons of each MLP
    are random and small. `turn`: the head moves digit k as k + turn (the broken variant).
    """
    config = TransformerConfig(
        vocab_size=7, d_model=WIDTH, layers=2, heads=2, kv_heads=2, head_dim=8, d_mlp=DIGITS + 4, context=8,
        activation="relu", gated=False, tied=False, norm_epsilon=1e-9,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    small = lambda *shape: 0.02 * rng.normal(size=shape).astype(np.float32)
    model = initialise(config, jax.random.key(0))
    q, k, v, o = (small(*shape) for shape in ((WIDTH, 16), (WIDTH, 16), (WIDTH, 16), (16, WIDTH)))
    quiet = [Linear(jnp.asarray(small(*w.shape)), None) for w in (q, k, v, o)]
    q[TO, 0], k[SEEN : SEEN + DIGITS, 0] = 10, 10
    for digit in range(DIGITS):
        v[SEEN + digit, digit] = 1
        o[digit] = 0
        o[digit, MOVED + (digit + turn) % DIGITS] = np.sqrt(2) / 5
    moving = [Linear(jnp.asarray(weight), None) for weight in (q, k, v, o)]
    mlps, ups, downs = [], [], []
    for layer in range(2):
        up, down = small(WIDTH, DIGITS + 4), small(DIGITS + 4, WIDTH)
        for j in range(DIGITS):
            up[:, j], down[j] = 0, 0
            up[DIGIT + j if layer == 0 else slice(MOVED, MOVED + j), j] = 1
            down[j, (SEEN if layer == 0 else OUT) + j] = 0.2
        mlps.append(MLP(None, Linear(jnp.asarray(up), None), Linear(jnp.asarray(down), None), "relu"))
        ups.append(up.T)
        downs.append(down)
    embedding = np.eye(7, WIDTH, dtype=np.float32)
    unembedding = np.zeros((WIDTH, 7), np.float32)
    unembedding[OUT : OUT + DIGITS, :DIGITS] = np.eye(DIGITS)
    attention = lambda m: [getattr(b.attn, name) for b in m.blocks for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    model = eqx.tree_at(
        lambda m: [m.embedding.token, m.unembedding.weight, *(b.mlp for b in m.blocks), *attention(m)],
        model,
        [jnp.asarray(embedding), jnp.asarray(unembedding), *mlps, *quiet, *moving],
    )
    zero = [np.zeros(n, np.float32) for n in (DIGITS + 4, WIDTH)]
    return model, from_arrays(ups, [zero[0]] * 2, downs, [zero[1]] * 2)
