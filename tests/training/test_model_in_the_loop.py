"""An objective with the model in the loop is an objective like any other: a function, passed by value."""

import jax
import jax.numpy as jnp

from jaxinterp.methods import Transcoder
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.objectives import Ratio
from jaxinterp.training.fit import fit


def end_to_end(decomposition, batch, key, *, model=None):
    """KL(clean || with the transcoder in the MLP's place), on this step's windows."""
    tokens = batch.windows["tokens"]
    clean = jax.nn.log_softmax(run(model, tokens).logits)
    spliced = jax.nn.log_softmax(run(replace(model, {batch.sites.leaf: decomposition}), tokens).logits)
    kl = jnp.mean(jnp.sum(jnp.exp(clean) * (clean - spliced), axis=-1))
    return kl, {"loss": Ratio(kl, jnp.ones(())), "kl": Ratio(kl, jnp.ones(()))}


def test_a_transcoder_learns_from_the_model_s_own_loss(subject, text):
    method = Transcoder(features=64, k=8, learning_rate=3e-2, objective=end_to_end, activation="relu")
    sizes = {"site": "blocks/1/mlp", "batch_size": 256, "buffer_batches": 2, "log_every": 5}
    result = fit(method, subject, text, steps=30, **sizes)
    assert result.history[-1]["kl"] < 0.85 * result.history[0]["kl"]
    assert "fired" not in result.history[-1]
