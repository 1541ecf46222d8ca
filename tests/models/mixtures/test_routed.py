"""Published mixtures: dispatch equals every expert in turn, memory follows active experts, edits, sites."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import SetTo
from jaxinterp.models.load import load
from jaxinterp.models.mixtures.grouped import grouped_matmul
from jaxinterp.models.mixtures.routed import Replaced, RoutedConfig, RoutedMLP, SwitchOff, random_routed
from jaxinterp.models.run import run
from jaxinterp.models.sites import open_experts, replace, sites

GOLDENS = Path(__file__).parents[2] / "parity" / "goldens"
CONFIGS = {
    "qwen": RoutedConfig(5, 2, 6, renormalise=True, shared=4, shared_gate=True),
    "plain": RoutedConfig(5, 3, 6),
    "oss": RoutedConfig(4, 2, 6, "chosen", router_bias=True, bias=True, limit=0.5),
    "llama4": RoutedConfig(4, 2, 6, "sigmoid", shared=3),
}


def mixture(name: str, d: int = 8) -> RoutedMLP:
    made = random_routed(jax.random.key(0), d, CONFIGS[name])
    biased = lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    return jax.tree.map(lambda leaf: biased(leaf) if leaf.ndim <= 2 else leaf, made)


def every_expert(mlp: RoutedMLP, x: np.ndarray) -> np.ndarray:
    """The module's equations, one token and one expert after the other."""
    config, out = mlp.config, np.zeros_like(x)
    numbers = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    router, silu = numbers(mlp.router), lambda z: z / (1 + np.exp(-z))
    softmax = lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    for row, token in enumerate(x):
        z = token @ router.weight + (0 if router.bias is None else router.bias)
        chosen = np.argsort(-z, kind="stable")[: config.active]
        weight = {"softmax": softmax(z)[chosen], "chosen": softmax(z[chosen]), "sigmoid": 1 / (1 + np.exp(-z[chosen]))}
        w = weight[config.scores] / (weight[config.scores].sum() if config.renormalise else 1)
        for expert, counts in zip(chosen, w, strict=True):
            maps = numbers(mlp.expert(int(expert)))
            read = token * counts if config.scores == "sigmoid" else token
            affine = lambda linear, v: v @ linear.weight + (0 if linear.bias is None else linear.bias)
            pre, up = affine(maps.gate_proj, read), affine(maps.up_proj, read)
            if config.limit is None:
                hidden = silu(pre) * up
            else:
                pre, up = np.minimum(pre, config.limit), np.clip(up, -config.limit, config.limit)
                hidden = (up + 1) * pre / (1 + np.exp(-config.alpha * pre))
            y = affine(maps.down_proj, hidden)
            out[row] += y if config.scores == "sigmoid" else counts * y
        if mlp.shared is not None:
            shared = numbers(mlp.shared)
            y = (silu(token @ shared.gate_proj.weight) * (token @ shared.up_proj.weight)) @ shared.down_proj.weight
            gate = mlp.shared_gate
            out[row] += y if gate is None else y / (1 + np.exp(-(token @ np.asarray(gate.weight, np.float64))))
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_dispatch_equals_every_expert_in_turn(name: str) -> None:
    mlp, x = mixture(name), np.random.default_rng(1).normal(size=(11, 8))
    expected = every_expert(mlp, x)
    np.testing.assert_allclose(mlp(jnp.asarray(x, jnp.float32)[None])[0], expected, atol=2e-5)
    broken = dataclasses.replace(mlp, config=dataclasses.replace(mlp.config, active=1))
    assert np.abs(np.asarray(broken(jnp.asarray(x, jnp.float32))) - expected).max() > 1e-2


@pytest.mark.parametrize("sizes", [(3, 0, 70, 4), (0, 0, 0, 5), (1, 1, 1, 1)])
def test_groups_and_their_derivatives_are_those_of_a_dense_sum(sizes: tuple[int, ...]) -> None:
    rows = sum(sizes)
    keys = jax.random.split(jax.random.key(rows), 3)
    x, weight = jax.random.normal(keys[0], (rows, 6)), jax.random.normal(keys[1], (len(sizes), 6, 5))
    toward = jax.random.normal(keys[2], (rows, 5))
    group = np.repeat(np.arange(len(sizes)), sizes)
    dense = lambda x, weight: jnp.sum(toward * jnp.einsum("rd,rdo->ro", x, weight[group]))
    ours = lambda x, weight: jnp.sum(toward * grouped_matmul(x, weight, jnp.asarray(sizes, jnp.int32)))
    for found, expected in zip(
        jax.value_and_grad(ours, (0, 1))(x, weight), jax.value_and_grad(dense, (0, 1))(x, weight), strict=True
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


def temporary_bytes(experts: int, active: int, *, dense: bool = False) -> int:
    """What the compiled forward pass of 256 tokens needs beside its arguments and its result."""
    mlp = jax.eval_shape(lambda: random_routed(jax.random.key(0), 32, RoutedConfig(experts, active, 48)))

    def every(mlp: RoutedMLP, x: jax.Array) -> jax.Array:
        hidden = jnp.einsum("td,edm->etm", x, mlp.experts.up_proj.weight)
        return jnp.einsum("etm,emd->td", hidden, mlp.experts.down_proj.weight)

    run_it = every if dense else (lambda mlp, x: mlp(x))
    compiled = jax.jit(run_it).lower(mlp, jax.ShapeDtypeStruct((256, 32), jnp.float32)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def test_memory_follows_active_experts_and_not_all() -> None:
    """Four times the experts: as much memory but for router logits; four times the active ones: about four times."""
    few, many, busy = temporary_bytes(8, 2), temporary_bytes(32, 2), temporary_bytes(32, 8)
    logits = 256 * (32 - 8) * 4  # router logits of the further experts, in a few copies
    assert many - few <= 4 * logits, (few, many)
    assert 2.5 < busy / many < 4.5, (many, busy)
    assert temporary_bytes(32, 2, dense=True) > 3.5 * temporary_bytes(8, 2, dense=True)  # the control grows


def test_no_array_of_tokens_times_experts_times_neurons() -> None:
    """In the whole program of a forward and backward pass, 40 tokens, 7 experts, 2 active, 48 neurons, d 24."""
    mlp = random_routed(jax.random.key(0), 24, RoutedConfig(7, 2, 48))
    program = jax.make_jaxpr(jax.grad(lambda mlp, x: jnp.sum(mlp(x) ** 2)))(mlp, jnp.ones((40, 24)))
    assert str(program).count("f32[7,24,48]") > 0  # the weights are there
    largest = max(
        int(np.prod(var.aval.shape)) for eqn in program.jaxpr.eqns for var in eqn.outvars if hasattr(var.aval, "shape")
    )
    assert largest < 40 * 7 * 48


def test_opening_an_expert_changes_no_value_and_replacing_it_does() -> None:
    model = load(GOLDENS / "qwen3-moe", dtype="float32").model
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 9)))
    clean = run(model, tokens)
    opened = open_experts(model, "blocks/1/mlp", 3)
    trace = run(opened, tokens)
    np.testing.assert_allclose(trace.logits, clean.logits, atol=2e-6)
    index, weight = clean["blocks/1/mlp/experts/index"], clean["blocks/1/mlp/experts/weight"]
    np.testing.assert_array_equal(trace["blocks/1/mlp/experts/3/routed"][..., 0], jnp.any(index == 3, -1))
    names = sites(opened, "blocks/1/mlp/experts/3**")
    assert names[:2] == ["blocks/1/mlp/experts/3", "blocks/1/mlp/experts/3/in"] and names[-1].endswith("3/out")
    assert "blocks/1/mlp/experts/3/hidden" in names

    silent = run(opened, tokens, edits={"blocks/1/mlp/experts/3/out": SetTo(0.0)})
    gone = run(replace(model, {"blocks/1/mlp/experts/3": lambda x: 0 * x}), tokens)
    np.testing.assert_allclose(silent.logits, gone.logits, atol=2e-6)
    share = jnp.sum(jnp.where(index == 3, weight, 0), -1, keepdims=True)
    expected = clean["blocks/1/mlp/out"] - share * trace["blocks/1/mlp/experts/3/out"]
    np.testing.assert_allclose(silent["blocks/1/mlp/out"], expected, atol=2e-6)
    assert float(jnp.abs(silent.logits - clean.logits).max()) > 1e-2


def test_switching_experts_off_renormalises_or_replaces() -> None:
    """A token loses one of three: the two others take its weight (renormalise), or the fourth best comes (replace)."""
    mlp, x = mixture("plain"), jax.random.normal(jax.random.key(2), (1, 30, 8))
    seen: dict[str, jax.Array] = {}

    def tapped(edits: dict[str, object]) -> dict[str, jax.Array]:
        def tap(name: str, value: jax.Array) -> jax.Array:
            seen[name] = edits[name](value) if name in edits else value  # type: ignore[operator]
            return seen[name]

        mlp(x, tap=tap)
        return dict(seen)

    clean = tapped({})
    off = tapped({"experts/index": SwitchOff((1,))})
    instead = tapped({"router": Replaced((1,))})
    probability = np.asarray(jax.nn.softmax(clean["router"], -1))[0]
    used = np.asarray(jnp.any(clean["experts/index"] == 1, -1))[0]
    assert used.any() and not used.all()
    for token in np.flatnonzero(used):
        chosen = [int(each) for each in clean["experts/index"][0, token]]
        kept = [each for each in chosen if each != 1]
        total = probability[token, chosen].sum()
        expected = {e: probability[token, e] * total / probability[token, kept].sum() for e in kept}
        found = dict(
            zip(np.asarray(off["experts/index"])[0, token], np.asarray(off["experts/weight"])[0, token], strict=True)
        )
        assert set(found) == {*kept, -1} and found[-1] == 0
        np.testing.assert_allclose([found[e] for e in kept], [expected[e] for e in kept], rtol=1e-5)
        recruited = {int(each) for each in instead["experts/index"][0, token]} - set(chosen)
        order = [int(e) for e in np.argsort(-probability[token]) if e != 1]
        assert recruited == {order[2]}
    unused = np.flatnonzero(~used)
    np.testing.assert_allclose(off["experts/weight"][0, unused], clean["experts/weight"][0, unused], rtol=1e-6)


def test_what_is_not_an_expert_is_refused() -> None:
    model = load(GOLDENS / "qwen3-moe-dense", dtype="float32").model
    with pytest.raises(UserError, match=r"'blocks/0/mlp' is a MLP: it has no experts"):
        open_experts(model, "blocks/0/mlp", 0)
    with pytest.raises(UserError, match="expert 9 does not exist: there are 6, from 0"):
        open_experts(model, "blocks/1/mlp", 9)
    with pytest.raises(UserError, match=r"open the expert first, open_experts\(model, 'blocks/1/mlp', 2\)"):
        run(model, jnp.zeros((1, 3), jnp.int32))["blocks/1/mlp/experts/2/out"]
    with pytest.raises(UserError, match=r"active=3 must be from 1 to experts=2"):
        RoutedConfig(2, 3, 4)
