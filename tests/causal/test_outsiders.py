"""What somebody calls who has not read the code: wrong shapes, names and numbers are one clear line, never a number."""

import dataclasses
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.attribute import attribute
from jaxinterp.causal.circuits import node_effects, select_nodes
from jaxinterp.causal.directions import difference_in_means
from jaxinterp.causal.edges import edge_scores
from jaxinterp.causal.graphs.build import attribution_graph
from jaxinterp.causal.graphs.capture import capture
from jaxinterp.causal.graphs.intervene import intervene, total_effects
from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.causal.layerwise import layer_patch_effects, stack_layers
from jaxinterp.causal.measure import LogitDifference, LogProbability
from jaxinterp.causal.patch import Patch, mean_fill, patch_effects, path_effect
from jaxinterp.causal.steer import steering_rows
from jaxinterp.causal.subspace import direction_report
from jaxinterp.causal.weights_circuits import strengths
from jaxinterp.core.errors import UserError
from jaxinterp.methods.causal.das import DAS
from jaxinterp.methods.causal.lineas import LinEAS
from jaxinterp.methods.causal.trained_vector import TrainedVector
from jaxinterp.models.edits import Add, At
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.generate import During, _stops, generate
from jaxinterp.models.run import run
from jaxinterp.models.sampling import Sampling, filtered, next_token
from jaxinterp.models.transformer import initialise
from jaxinterp.training.fit import fit
from tests.causal.small_models import LLAMA, PROMPT, weights, wide
from tests.causal.toys import TOKENS, small_transformer

METRIC = LogitDifference(jnp.asarray([1, 2]), jnp.asarray([3, 0]))
OUT = "blocks/0/mlp/out"
ZERO = {OUT: jnp.zeros(())}
ROWS = ((1, 2, 3), (4, 5, 6))


@pytest.fixture(scope="module")
def model():
    return small_transformer()


def patch(model, **changed):
    given = {"metric": METRIC, "fills": ZERO} | changed
    return patch_effects(model, TOKENS, given.pop("metric"), given.pop("fills"), **given)


def path(model, senders=OUT, receivers=("final",), frozen=()):
    return path_effect(
        model, TOKENS, METRIC, {senders: Patch(jnp.zeros(()), jnp.ones((), bool))}, receivers, frozen=frozen
    )


CALLS = {
    "the fill of 'blocks/0/mlp/out' has shape": lambda m: patch(m, fills={OUT: jnp.zeros((2, 3, 5))}),
    "fill of 'blocks/0/mlp/out' has shape ": lambda m: attribute(m, TOKENS, METRIC, {OUT: jnp.zeros((3, 3, 16))}),
    "one number a prompt": lambda m: patch(m, metric=lambda trace: trace.logits[0, -1, 0]),
    "metric gives shape": lambda m: attribute(m, TOKENS, lambda trace: trace.logits[:, -1], ZERO),
    "chunk=0 must be positive": lambda m: patch(m, chunk=0),
    "fills must name an array": lambda m: patch(m, fills={}),
    "fills is empty": lambda m: attribute(m, TOKENS, METRIC, {}, method="integrated"),
    "no array 'blocks/0/mlp/ouch'": lambda m: path(m, frozen=("blocks/0/mlp/ouch",)),
    "no array 'end'": lambda m: path(m, receivers=("end",)),
    "no array 'embe'": lambda m: path(m, senders="embe"),
    "matched position by position": lambda m: edge_scores(m, TOKENS, TOKENS[:, :2], METRIC),
    "top=-1": lambda m: select_nodes({"x": np.ones((2, 3))}, top=-1),
    "threshold=nan": lambda m: select_nodes({"x": np.ones((2, 3))}, threshold=float("nan")),
    r"each=\(1, 2\)": lambda m: node_effects({"x": jnp.ones((2, 3))}),
    "weight leaves no token": lambda m: mean_fill(jnp.ones((2, 3, 4)), weight=jnp.zeros((2, 3))),
    "at some position": lambda m: mean_fill(jnp.ones((2, 3, 4)), weight=jnp.eye(2, 3), per_position=True),
    "negative_weight leaves no row": lambda m: difference_in_means(
        jnp.ones((2, 3)), jnp.ones((2, 3)), negative_weight=jnp.zeros(2)
    ),
    "both classes among them": lambda m: direction_report(
        lambda edit: jnp.ones(2), jnp.ones(3), jnp.ones((3, 2)), jnp.ones(3), jnp.ones((4, 3)), jnp.ones(4, bool)
    ),
    "positions are absolute": lambda m: At(Add(1.0), (-1,)),
    "is for drawing": lambda m: filtered(jnp.ones((1, 3)), Sampling()),
    "unembed the last position only": lambda m: layer_patch_effects(
        stack_layers(m), TOKENS, LogProbability(METRIC.answer, METRIC.other), {"mlp/out": jnp.zeros((2, 2, 3, 16))},
        jnp.asarray([1]),
    ),
    "concept: token id 300": lambda m: steering_rows(
        Subject(m, byte_tokenizer(), "small"), {(OUT, "v"): np.ones(16)}, ["a"], [300]
    ),
    "position=7 is not a position": lambda m: fit(
        DAS(ROWS, ROWS, (1, 2), OUT, position=7), Subject(m, None, "m"), steps=1
    ),
    "answer: token id 999": lambda m: fit(DAS(ROWS, ROWS, (1, 999), OUT), Subject(m, None, "m"), steps=1),
    "k=17 directions": lambda m: fit(DAS(ROWS, ROWS, (1, 2), OUT, k=17), Subject(m, None, "m"), steps=1),
    r"lengths \[2, 3\]": lambda m: fit(DAS(ROWS, ((1, 2), (3, 4)), (1, 2), OUT), Subject(m, None, "m"), steps=1),
    "first=3 leaves no position": lambda m: fit(LinEAS(ROWS, ROWS, (OUT,), first=3), Subject(m, None, "m"), steps=1),
    "each once": lambda m: fit(LinEAS(ROWS, ROWS, (OUT, OUT)), Subject(m, None, "m"), steps=1),
    "source has 2 prompts of lengths": lambda m: fit(
        LinEAS(((1,), (2, 3)), ROWS, (OUT,)), Subject(m, None, "m"), steps=1
    ),
    "prompts has 2 prompts of lengths": lambda m: fit(
        TrainedVector(((1,), (2, 3)), (1, 2), OUT), Subject(m, None, "m"), steps=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", CALLS)
def test_a_call_that_cannot_be_right_is_one_clear_line(model, message):
    with pytest.raises(UserError, match=message) as error:
        CALLS[message](model)
    assert "\n" not in str(error.value)


def unchecked(kind, **fields):
    """An instance whose types nobody has checked, as outside the tests."""
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def sampling(**changed):
    return unchecked(Sampling, **{"temperature": 1.0, "top_k": None, "top_p": None} | changed).__post_init__()


UNTYPED = {
    "max_tokens=2.5 must be a whole number": lambda subject: inspect.unwrap(generate)(subject, "abc", max_tokens=2.5),
    "seed=1.5 must be a whole number": lambda subject: inspect.unwrap(generate)(subject, "abc", seed=1.5),
    "is a float: give a callable": lambda subject: inspect.unwrap(generate)(subject, "abc", edits={OUT: 1.0}),
    "mlp/out' is a float": lambda subject: inspect.unwrap(run)(subject.model, TOKENS, edits={OUT: 1.0}),
    "must be texts and token ids": lambda subject: inspect.unwrap(_stops)(subject, ["a", 1.5], False),
    "stop=1.5 must be": lambda subject: inspect.unwrap(_stops)(subject, 1.5, False),
    "top_k=2.5 must be a whole number": lambda subject: sampling(top_k=2.5),
    "temperature='1' must be a number": lambda subject: sampling(temperature="1"),
    "top_p=True must be a number": lambda subject: sampling(top_p=True),
    "'prompts'.: must be 'prompt' or": lambda subject: unchecked(During, when="prompts").__check_init__(),
}


@pytest.mark.parametrize("message", UNTYPED)
def test_values_of_another_type_are_refused_where_nothing_checks_types(model, message):
    with pytest.raises(UserError, match=message):
        UNTYPED[message](Subject(model, byte_tokenizer(), "small"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoders": []}, "encoders: give one"),
        ({"skips": [np.ones((8, 7))] * 3}, "skips has shape"),
        ({"decoder_biases": [np.ones(7)] * 3}, "decoder_biases has shape"),
        ({"thresholds": [np.ones(4)] * 3}, "thresholds has shape"),
        ({"k": 0}, "k=0 must be at least 1"),
    ],
)
def test_transcoders_of_wrong_shapes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_arrays(**(weights(LLAMA) | change))


def test_a_token_outside_the_vocabulary_has_no_logit(model):
    trace = run(model, TOKENS)
    for answer in ([1, 999], [1, -100]):
        for metric in (LogitDifference(jnp.asarray(answer), METRIC.other), LogProbability(jnp.asarray(answer))):
            assert np.isfinite(metric(trace)[0]) and np.isnan(metric(trace)[1])


def test_labels_of_numbers_are_classes_not_rows():
    data, label = jnp.asarray([[0.0, 1], [1, 1], [10, 1], [13, 1]]), jnp.asarray([0, 0, 1, 1])
    report = direction_report(lambda edit: jnp.ones(2), jnp.asarray([1.0, 0]), jnp.eye(2), jnp.ones(2), data, label)
    assert report.separation == pytest.approx((11.5 - 0.5) / np.sqrt((0.25 + 2.25) / 2))


def test_a_tiny_temperature_draws_the_most_probable_token():
    logits = jnp.asarray([[1.0, 3.0, 2.9, -2.0], [-5.0, -3.0, -4.0, -9.0]])
    for temperature in (1e-3, 1e-30, 1e-44):
        for top_p in (None, 1e-9, 1.0):
            token, log_p = next_token(logits, Sampling(temperature, top_p=top_p), jax.random.key(0))
            np.testing.assert_array_equal(token, [1, 1])
            np.testing.assert_allclose(log_p, jax.nn.log_softmax(logits)[:, 1], rtol=1e-6)
    assert Sampling(1.0, top_k=9) and bool(jnp.isfinite(filtered(logits, Sampling(1.0, top_k=9))).all())


def test_at_takes_one_position_and_the_edit_is_nowhere_else(model):
    here, there = (run(model, TOKENS, edits=edits)[OUT] for edits in ({}, {OUT: At(Add(1.0), 1)}))
    np.testing.assert_allclose(there - here, np.broadcast_to([[0.0], [1], [0]], (2, 3, 16)), atol=1e-6)


def test_a_feature_that_is_held_stays_in_the_prediction():
    """A change of 0 is an intervention: what comes in from features before it is cut off, as in `intervene`."""
    with jax.enable_x64(True):
        model = wide(initialise(LLAMA, jax.random.key(1)))
        transcoders = from_arrays(**weights(LLAMA))
        captured, graph = capture(model, PROMPT, transcoders), attribution_graph(model, PROMPT, transcoders)
        active = len(graph.features)
        t, s = max(np.ndindex(active, active), key=lambda pair: abs(graph.adjacency[pair]))
        source, held = (tuple(int(each) for each in graph.features[n]) for n in (s, t))
        moved = total_effects(graph, {source: 1e-4, held: 0.0})
        values = {source: float(graph.activation[s]) + 1e-4, held: float(graph.activation[t])}
        after = intervene(captured, values, mode="frozen")
        token = int(graph.target_tokens[0])
        change = np.asarray(after.logits - captured.seen.logits)[-1]
    np.testing.assert_allclose(moved[graph.targets.start], change[token] - change.mean(), rtol=1e-5)
    free = total_effects(graph, {source: 1e-4})
    assert moved[t] == 0 and abs(free[graph.targets.start] - moved[graph.targets.start]) > 1e-3 * abs(
        free[graph.targets.start]
    )


LINEAR = {
    "gate": {"attention_gate": True, "qkv_bias": True},
    "clip": {"attention_clip": 0.15},
    "scales": {"residual_scale": 0.4, "embedding_scale": 3.0, "logit_scale": 2.5, "tied": False, "head_bias": True},
    "table of another size": {"embedding_size": 6},
    "norms everywhere": {"post_norms": True, "query_key_norm": True, "embedding_norm": True, "norm_offset": 1.0},
    "parallel, sinks, caps": {"parallel": True, "attention_sinks": True, "logit_cap": 5.0, "attention_cap": 2.0},
    "a padding token": {"padding": 2},
}


@pytest.mark.parametrize("kind", LINEAR)
def test_the_sum_rule_holds_for_every_kind_of_model(kind):
    """Effects of all nodes and constants add up to every pre-activation and every logit minus the mean logit."""
    with jax.enable_x64(True):
        model = initialise(dataclasses.replace(LLAMA, **LINEAR[kind]), jax.random.key(1))
        draw = np.random.default_rng(0)
        model = jax.tree.map(
            lambda leaf: leaf + 0.2 * jnp.asarray(draw.normal(size=leaf.shape)), wide(model)
        )  # every bias, sink and norm's weight has a value of its own
        graph = attribution_graph(model, PROMPT, from_arrays(**weights(LLAMA, skip=True)), most_targets=4)
        logits = run(model, jnp.asarray(PROMPT)[None]).logits[0, -1]
        if model.config.logit_cap:
            logits = model.config.logit_cap * jnp.arctanh(logits / model.config.logit_cap)
        if model.config.head_bias:
            logits = logits - model.config.logit_scale * model.unembedding.bias
    assert len(graph.features) > 3
    assert np.abs(graph.sum_rule()).max() < 1e-6 * np.abs(graph.value).max()
    wanted = np.asarray(logits)[graph.target_tokens] - np.asarray(logits).mean()
    np.testing.assert_allclose(graph.value[graph.targets], wanted, rtol=1e-6)


def test_models_without_a_frozen_linear_map_are_refused():
    model, given = initialise(LLAMA, jax.random.key(1)), from_arrays(**weights(LLAMA), dtype=jnp.float32)
    replaced = eqx.tree_at(lambda model: model.blocks[1].attn, model, eqx.nn.Identity())
    with pytest.raises(UserError, match="has a Identity in attention's place"):
        attribution_graph(replaced, PROMPT, given)
    padded = initialise(dataclasses.replace(LLAMA, padding=7), jax.random.key(1))
    with pytest.raises(UserError, match="the prompt has the padding token 7"):
        attribution_graph(padded, PROMPT, given)
    for change in ({"residual_scale": 0.5}, {"attention_gate": True}, {"attention_clip": 1.0}):
        other = initialise(dataclasses.replace(LLAMA, **change), jax.random.key(1))
        with pytest.raises(UserError, match=r"move values as they are|residual_scale"):
            strengths(other, given, 0, 1, 0)
