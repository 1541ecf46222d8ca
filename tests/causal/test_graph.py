"""Attribution graphs against an independent dense computation, a graph made by hand, and their own sum rule."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.causal.graphs.build import attribution_graph, choose_targets, graph_of
from jaxinterp.causal.graphs.capture import capture
from jaxinterp.causal.graphs.influence import completeness_score, node_influence, replacement_score
from jaxinterp.causal.graphs.linear import HELD
from jaxinterp.causal.graphs.prune import prune
from jaxinterp.causal.graphs.transcoders import from_arrays
from jaxinterp.core.errors import UserError
from jaxinterp.models.layers import Linear
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import EXACT
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.mesh import make_mesh
from tests.causal import dense
from tests.causal.small_models import FEATURES, GPT2, LLAMA, PROMPT, weights, wide, with_random_biases

CASES = {
    "skip, ReLU, LayerNorm": (GPT2, {"skip": True}, {}),
    "cross-layer, JumpReLU": (LLAMA, {"cross": True}, {"thresholds": [np.full(FEATURES, 0.4)] * 3}),
    "per layer, TopK": (LLAMA, {}, {"k": 2}),
}


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """A graph, and the same graph by the independent computation; float64."""
    config, options, more = CASES[request.param]
    with jax.enable_x64(True):
        model = with_random_biases(wide(initialise(config, jax.random.key(1))))
        given = weights(config, **options)
        captured = capture(model, PROMPT, from_arrays(**given, **more))
        graph = graph_of(captured, choose_targets(captured))
    thresholds = more.get("thresholds", [np.zeros(FEATURES)] * config.layers)
    independent = dense.Dense(model, PROMPT, **given, thresholds=thresholds, k=more.get("k"))
    return graph, independent, captured


def test_edges_equal_an_independent_dense_computation(both):
    graph, independent, _ = both
    adjacency, bias, chosen, probabilities = independent.graph()
    assert [tuple(row) for row in graph.features] == [feature[:3] for feature in independent.features]
    assert len(graph.features) > 5 and 1 <= len(chosen) <= 10
    np.testing.assert_array_equal(graph.target_tokens, chosen)
    # Logits and attention scores are summed in float32 by the model itself.
    np.testing.assert_allclose(graph.weight, probabilities, rtol=1e-5)
    np.testing.assert_allclose(graph.activation, [feature[3] for feature in independent.features], rtol=1e-5)
    np.testing.assert_allclose(graph.adjacency, adjacency, atol=2e-6)
    np.testing.assert_allclose(graph.bias, bias, atol=2e-6)
    assert np.abs(graph.bias[: len(graph.features)]).max() > 0.05


def test_influence_and_the_pruned_set_equal_an_independent_computation(both):
    graph, _, _ = both
    scores, share = dense.influence(graph.adjacency, graph.weights())
    np.testing.assert_allclose(node_influence(graph), scores, atol=1e-9)
    for thresholds in ((0.8, 0.98), (0.5, 0.8)):
        kept = prune(graph, node_threshold=thresholds[0], edge_threshold=thresholds[1])
        nodes, edges = dense.pruned(
            graph.adjacency, graph.weights(), len(graph.features), graph.token_nodes.start, *thresholds
        )
        assert set(np.flatnonzero(kept.nodes)) == nodes
        assert set(zip(*np.nonzero(kept.edges), strict=True)) == edges
    tokens, errors = scores[graph.token_nodes].sum(), scores[graph.errors].sum()
    assert replacement_score(graph) == pytest.approx(tokens / (tokens + errors))
    importance = scores + graph.weights()
    explained = sum((1 - share[n, graph.errors].sum()) * importance[n] for n in range(graph.size))
    assert completeness_score(graph) == pytest.approx(explained / importance.sum())


def test_effects_and_constants_sum_to_every_pre_activation(both):
    graph, _, _ = both
    assert np.abs(graph.sum_rule()).max() < 1e-10
    assert np.abs(graph.value).max() > 0.5
    # Broken: without what constants add, and without the errors.
    assert np.abs(dataclasses.replace(graph, bias=0 * graph.bias).sum_rule()).max() > 0.05
    blind = graph.adjacency.copy()
    blind[:, graph.errors] = 0
    assert np.abs(dataclasses.replace(graph, adjacency=blind).sum_rule()).max() > 0.05


def test_the_map_is_linear_only_with_patterns_and_scales_held(both):
    """J x gives back what was read, x = all sources at once; the exact derivative does not."""
    _, _, captured = both
    with jax.enable_x64(True):

        @eqx.filter_jit
        def at_itself(rules):
            return jax.jvp(lambda sources: captured.frozen(sources, rules), (captured.sources,), (captured.sources,))

        def missed(rules):
            reads, change = at_itself(rules)
            np.testing.assert_allclose(reads.mlp, captured.seen.mlp_in, atol=1e-6)
            return float(jnp.abs(change.final - captured.seen.final).max())

        assert missed(HELD) < 1e-10
        assert missed(EXACT) > 0.05


def test_a_graph_made_by_hand():
    """Two layers, no norms but the last; every number below is worked out on paper.

    Dimensions a, b, c, e. Tokens write a (position 0) and b (position 1). MLP 0 writes relu(b) (2 c + 0.25 e), its
    transcoder knows the 2 c only. Attention of layer 1 looks half at each position and moves a to e. MLP 1 writes
    relu(c + 2 e - 1) a, and so does its transcoder. At position 1: b = 1, feature 0 is 1, c = 2, e = 0.25 + 0.5 = 0.75,
    feature 1 is 2 + 1.5 - 1 = 2.5, and the end is (2.5, 1, 2, 0.75).
    """
    config = TransformerConfig(
        vocab_size=3, d_model=4, layers=2, heads=1, kv_heads=1, head_dim=4, d_mlp=1, context=4, activation="relu",
        gated=False, pre_norms=False, mlp_bias=True, tied=False, norm_epsilon=0.0,
    )  # fmt: skip
    unit, zero = np.eye(4), np.zeros((4, 4))
    a_to_e = np.outer(unit[0], unit[3])
    with jax.enable_x64(True):
        model = wide(initialise(config, jax.random.key(0)))

        def linear(weight, bias=None):
            return Linear(jnp.asarray(weight), None if bias is None else jnp.asarray(bias))

        def mlp(read, bias, write):
            up, down = linear(read[:, None], [bias]), linear(np.asarray(write)[None, :], np.zeros(4))
            return MLP(None, up, down, "relu")

        places = lambda m: [
            m.embedding.token, m.unembedding.weight, *(block.mlp for block in m.blocks),
            *(getattr(block.attn, name) for block in m.blocks for name in block.attn.projections()),
        ]  # fmt: skip
        values = [
            jnp.asarray(unit[:3]), jnp.asarray(unit[:, :3]),
            mlp(unit[1], 0.0, 2 * unit[2] + 0.25 * unit[3]), mlp(unit[2] + 2 * unit[3], -1.0, unit[0]),
            *(linear(zero) for _ in range(4)), linear(zero), linear(zero), linear(a_to_e), linear(unit),
        ]  # fmt: skip
        model = eqx.tree_at(places, model, values)
        transcoders = from_arrays(
            [unit[1][None], (unit[2] + 2 * unit[3])[None]], [np.zeros(1), -np.ones(1)],
            [2 * unit[2][None], unit[0][None]], [np.zeros(4)] * 2,
        )  # fmt: skip
        graph = attribution_graph(model, np.array([0, 1]), transcoders, targets=[0, 1])

    scale = 1 / np.sqrt((2.5**2 + 1 + 4 + 0.75**2) / 4)  # of the last norm
    np.testing.assert_array_equal(graph.features, [[0, 1, 0], [1, 1, 0]])
    np.testing.assert_allclose(graph.activation, [1.0, 2.5])
    # features 0 and 1; errors (0, 0), (0, 1), (1, 0), (1, 1); tokens 0 and 1; targets 0 and 1
    expected = np.zeros((10, 10))
    expected[0, 7] = 1.0  # feature 0 reads b of its own token
    expected[1, 0] = 2.0  # c
    expected[1, 3] = 0.5  # the error 0.25 e, read twice
    expected[1, 6] = 1.0  # half of a of position 0, moved to e and read twice
    third = 1 / 3  # a column of the unembedding minus the mean of all three
    expected[8, [0, 1, 7]] = scale * np.array([-2 * third, 2.5 * (1 - third), -third])
    expected[9, [0, 1, 7]] = scale * np.array([-2 * third, -2.5 * third, 1 - third])
    np.testing.assert_allclose(graph.adjacency, expected, atol=1e-12)
    np.testing.assert_allclose(graph.bias, 0, atol=1e-12)
    assert np.abs(graph.sum_rule()).max() < 1e-12


@pytest.fixture(scope="module")
def single():
    """A float32 graph with all features, of per-layer TopK transcoders."""
    model = initialise(LLAMA, jax.random.key(1))
    transcoders = from_arrays(**weights(LLAMA), k=2, dtype=jnp.float32)
    return model, transcoders, attribution_graph(model, PROMPT, transcoders, batch=8)


def test_float32_keeps_the_sum_rule(single):
    _, _, graph = single
    assert np.abs(graph.sum_rule()).max() < 1e-5 * np.abs(graph.value).max()


def test_eight_devices_give_the_same_graph(single):
    model, transcoders, graph = single
    spread = attribution_graph(model, PROMPT, transcoders, batch=8, mesh=make_mesh(data=4, model=2))
    np.testing.assert_array_equal(spread.features, graph.features)
    np.testing.assert_allclose(spread.adjacency, graph.adjacency, atol=1e-4)
    np.testing.assert_allclose(spread.bias, graph.bias, atol=1e-4)


def test_features_left_out_are_the_least_influential_and_are_counted(single):
    model, transcoders, graph = single
    part = attribution_graph(model, PROMPT, transcoders, max_features=6, batch=8, update_every=1)
    assert len(part.features) == 6 < len(graph.features)
    assert np.abs(part.sum_rule()).max() < 1e-5 * np.abs(graph.value).max()
    assert np.abs(part.left_out).max() > 0.01
    places = [graph.find(*feature) for feature in part.features.tolist()]
    np.testing.assert_allclose(part.adjacency[:6, :6], graph.adjacency[np.ix_(places, places)], atol=1e-6)
    influence = node_influence(graph)[: len(graph.features)]
    assert influence[places].sum() > 0.8 * np.sort(influence)[::-1][:6].sum()


def test_layers_without_a_transcoder_are_errors(single):
    model, _, _ = single
    given = {name: values[1:2] for name, values in weights(LLAMA).items()}
    graph = attribution_graph(model, PROMPT, from_arrays(**given, layers=[1], dtype=jnp.float32), batch=8)
    assert set(graph.features[:, 0]) == {1}
    assert np.abs(graph.sum_rule()).max() < 1e-5 * np.abs(graph.value).max()
    onwards = np.abs(graph.adjacency[graph.targets][:, graph.errors].reshape(-1, 3, 4)).sum(axis=(0, 2))
    assert (onwards > 0.01).all()


def test_refusals(single):
    model, transcoders, graph = single
    for options, message in [
        ({"targets": [99]}, "token ids from 0 to 11"),
        ({"vectors": np.ones((2, 8))}, "with a weight for each"),
        ({"probability": 0.0}, "probability=0.0"),
        ({"batch": 0}, "batch=0"),
        ({"first": 4}, "leaves no position"),
    ]:
        with pytest.raises(UserError, match=message):
            attribution_graph(model, PROMPT, transcoders, **options)
    with pytest.raises(UserError, match="token id 50"):
        attribution_graph(model, np.array([50]), transcoders)
    with pytest.raises(UserError, match="is not a node"):
        graph.find(0, 0, 0)
    with pytest.raises(UserError, match="node_threshold=2"):
        prune(graph, node_threshold=2.0)
    with pytest.raises(UserError, match="4 layers, but 3 follow"):
        from_arrays(**(weights(LLAMA) | {"decoders": [np.ones((FEATURES, 4, 8))] * 3}))
    with pytest.raises(UserError, match="skips has 1 entries"):
        from_arrays(**(weights(LLAMA) | {"skips": [None]}))
