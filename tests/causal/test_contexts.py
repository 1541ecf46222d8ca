"""What features of a graph are about: firing counts, peaks and logits against direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.graphs.contexts import about_features
from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.core.errors import UserError
from jaxinterp.models.run import run
from jaxinterp.models.transformer import initialise
from tests.causal.small_models import LLAMA, weights


def test_contexts_and_logits_equal_their_definition():
    model = initialise(LLAMA, jax.random.key(1))
    transcoders = from_arrays(**weights(LLAMA, cross=True), thresholds=[np.full(5, 1.0)] * 3, dtype=jnp.float32)
    rng = np.random.default_rng(0)
    windows = [{"tokens": rng.integers(0, 12, 9), "weight": (np.arange(9) > 0).astype(np.float32)} for _ in range(5)]
    chosen = [(0, 3), (2, 1), (0, 1)]
    found = about_features(model, transcoders, chosen, windows, count=2, radius=2, logits=3, batch=2)
    assert set(found) == set(chosen)

    tokens = np.stack([window["tokens"] for window in windows])
    trace = run(model, jnp.asarray(tokens))
    for layer, index in chosen:
        reader = transcoders.readers[layer]
        pre = np.asarray(trace[f"blocks/{layer}/mlp/in"] @ reader.encoder[index] + reader.encoder_bias[index])
        codes = np.where(pre > 1.0, pre, 0)
        codes[:, 0] = 0
        about = found[layer, index]
        assert about.density == pytest.approx((codes > 0).mean() * 9 / 8)
        windows_by_height = np.argsort(-codes.max(axis=1))[:2]
        assert len(about.contexts) == 2
        for context, window in zip(about.contexts, windows_by_height, strict=True):
            place = codes[window].argmax()
            assert context.activations[context.peak] == pytest.approx(codes[window, place], rel=1e-5)
            assert context.tokens == tuple(tokens[window, max(0, place - 2) : place + 3])
        write = np.asarray(reader.decoder[index]).sum(axis=0)
        logits = (write * np.asarray(model.final_norm.weight)) @ np.asarray(model.embedding.token).T
        logits -= logits.mean()
        assert [id for id, _ in about.raised] == list(np.argsort(-logits)[:3])
        assert about.lowered[0][1] == pytest.approx(logits.min(), rel=1e-4)
    assert found[0, 3].label(lambda id: f" t{id}").startswith("on “t")


def test_no_text_is_refused():
    model = initialise(LLAMA, jax.random.key(1))
    with pytest.raises(UserError, match="no text"):
        about_features(model, from_arrays(**weights(LLAMA), dtype=jnp.float32), [(0, 1)], [])
