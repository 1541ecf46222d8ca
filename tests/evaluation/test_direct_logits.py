"""The direct path to the logits, against a derivative of the model in which all else is held; and what graphs take."""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.graphs.build import choose_targets
from jaxinterp.causal.graphs.capture import Captured, capture
from jaxinterp.causal.graphs.transcoders import Transcoders, from_arrays
from jaxinterp.causal.weights_circuits import head_read_vectors
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.features.vectors import direct_logits
from jaxinterp.models.edits import Add, SetTo
from jaxinterp.models.load import load
from jaxinterp.models.rules import Rules
from jaxinterp.models.run import run

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
TOKENS = jnp.asarray([[3, 1, 4, 1]])
D = 16
PLACES = [
    ("granite", "blocks/1/mlp/out"),  # what is added is multiplied, logits are divided
    ("granite", "blocks/0/attn/out"),
    ("granite", "blocks/0/mlp/added"),
    ("granite-bias", "blocks/0/resid/mid"),
    ("cohere", "blocks/0/mlp/out"),  # logits are multiplied
    ("gemma4-equal", "blocks/0/mlp/added"),  # each layer ends with a factor
    ("gemma4-equal", "blocks/1/resid/pre"),
    ("gemma4-equal", "blocks/0/resid/post"),
    ("llama", "blocks/0/mlp/out"),
]


def slope(name: str, site: str, vector: np.ndarray) -> np.ndarray:
    """How the last logits move with the array, sublayers behind it switched off, the final norm's scale held at 1."""
    model = load(GOLDENS / name, dtype="float32").model
    layer, part = int(site.split("/")[1]), site.split("/")[2]
    parts = [(after, each) for after in range(layer, len(model.blocks)) for each in ("attn", "mlp")]
    first = {
        "attn": 1,
        "mlp": 2,
        "resid": {"pre": 0, "mid": 1, "post": 2}[site.split("/")[3]] if part == "resid" else 0,
    }
    off = {f"blocks/{after}/{each}/out": SetTo(0.0) for after, each in parts[first[part] :]}

    def logits(size: jax.Array) -> tuple[jax.Array, jax.Array]:
        edits = {**off, site: Add(size * jnp.asarray(vector))}
        trace = run(model, TOKENS, edits=edits, rules=Rules(norm=True, attention=True), keep=("blocks/*/resid/post",))
        return trace.logits, trace[f"blocks/{len(model.blocks) - 1}/resid/post"]

    (_, stream), (moved, _) = jax.jvp(logits, (jnp.zeros(()),), (jnp.ones(()),))
    stream = np.asarray(stream[0, -1], np.float64)
    stream = stream - stream.mean() if model.final_norm.kind == "layer" else stream
    found = np.asarray(moved[0, -1]) * np.sqrt(np.mean(stream**2) + model.final_norm.epsilon)
    return found - found.mean()


@pytest.mark.parametrize(("name", "site"), PLACES)
def test_it_is_the_derivative(name: str, site: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(1, D)).astype(np.float32)
    found = direct_logits(load(GOLDENS / name, dtype="float32").model, site, vectors)
    wanted = slope(name, site, vectors[0])
    np.testing.assert_allclose(found[0], wanted, atol=2e-5 * np.abs(wanted).max())


def test_a_factor_left_out_would_show() -> None:
    vectors = np.random.default_rng(0).normal(size=(1, D)).astype(np.float32)
    model = load(GOLDENS / "gemma4-equal", dtype="float32").model
    plain = eqx.tree_at(lambda m: [block.scale for block in m.blocks], model, replace_fn=jnp.ones_like)
    found, without = (direct_logits(each, "blocks/0/mlp/added", vectors) for each in (model, plain))
    assert np.abs(found - without).max() > 0.05 * np.abs(found).max()


@pytest.mark.parametrize("name", ["opt-350m", "granite", "cohere", "llama", "gpt2"])
def test_the_output_matrix_gives_the_logits(name: str) -> None:
    """Also where token vectors are of another size (OPT-350M), and where logits are scaled."""
    model = load(GOLDENS / name, dtype="float32").model
    trace = run(model, TOKENS)
    np.testing.assert_allclose(trace["final"] @ model.output_matrix(), trace.logits, atol=2e-5)


def test_a_graph_reads_the_logits_of_a_model_that_scales_them() -> None:
    """A target's effects add up to what the model says of it."""
    captured = captured_from("granite")
    targets = choose_targets(captured)
    logits = captured.seen.logits[-1]
    np.testing.assert_allclose(targets.value, (logits - logits.mean())[targets.tokens], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gemma4", "vectors of a token for every layer"),
        ("qwen3.5", "a Gated DeltaNet: with"),
    ],
)
def test_a_graph_refuses_what_is_not_linear(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        captured_from(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("granite", "residual_scale=0.22"),
        ("qwen3.5", "does not move values as they are"),
        ("olmoe-clipped", "does not move values as they are"),
    ],
)
def test_strengths_from_weights_refuse_what_they_leave_out(name: str, words: str) -> None:
    model = load(GOLDENS / name, dtype="float32").model
    with pytest.raises(UserError, match=words):
        head_read_vectors(model, one_transcoder(), 0, 0)


def test_a_block_without_its_tokens_vectors_is_refused() -> None:
    """Blocks that are stacked and run by themselves would leave them out."""
    model = load(GOLDENS / "gemma4", dtype="float32").model
    with pytest.raises(UserError, match="vectors of its tokens' own"):
        model.blocks[0](jnp.ones((1, 2, D)))


def captured_from(name: str) -> Captured:
    return capture(load(GOLDENS / name, dtype="float32").model, TOKENS[0], one_transcoder())


def one_transcoder() -> Transcoders:
    rng = np.random.default_rng(0)
    shapes = {"encoders": (6, D), "encoder_biases": (6,), "decoders": (6, D), "decoder_biases": (D,)}
    given = {name: [rng.normal(size=shape).astype(np.float32)] for name, shape in shapes.items()}
    return from_arrays(**given, layers=[0])
