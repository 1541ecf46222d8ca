"""Gated DeltaNet: the chunked rule equals one token after another; padding, caches, sites, files, derivatives."""

import dataclasses
import json
import shutil
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinterp.core.errors import UserError
from jaxinterp.models.cache import can_cache, empty_caches
from jaxinterp.models.delta_net import DeltaConfig, DeltaState, gated_delta_rule
from jaxinterp.models.edits import Add, SetTo
from jaxinterp.models.files.subject import Subject, save_subject
from jaxinterp.models.generate import generate
from jaxinterp.models.layers import cut_axes
from jaxinterp.models.load import load
from jaxinterp.models.rules import Rules
from jaxinterp.models.run import run as one_pass
from jaxinterp.models.sites import check_site, replace, select, sites

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 7)))


run = eqx.filter_jit(one_pass)  # one program, not one for each operation
advance = eqx.filter_jit(lambda net, x, state: net.advance(x, state, None))


@pytest.fixture(scope="module")
def model():
    return load(GOLDENS / "qwen3.5", dtype="float32").model


def one_after_another(query, key, value, decay, beta, memory, *, late_decay=False):
    """The module's equations in float64, token by token; `late_decay` forgets behind the correction."""
    memory, out = memory.copy(), np.zeros_like(value)
    for b, t, h in np.ndindex(decay.shape):
        state = memory[b, h] if late_decay else decay[b, t, h] * memory[b, h]
        wrong = value[b, t, h] - state.T @ key[b, t, h]
        state = (decay[b, t, h] if late_decay else 1.0) * state + np.outer(key[b, t, h], beta[b, t, h] * wrong)
        memory[b, h], out[b, t, h] = state, state.T @ query[b, t, h]
    return out, memory


def parts(seq: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, 2, seq, 3, 4))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value, memory = rng.normal(size=(2, seq, 3, 5)), rng.normal(size=(2, 3, 4, 5))
    return query, key, value, rng.uniform(0.3, 1, (2, seq, 3)), rng.uniform(0, 1, (2, seq, 3)), memory


@pytest.mark.parametrize(("seq", "chunk"), [(11, 4), (8, 4), (5, 64), (1, 64), (9, 1)])
def test_chunks_equal_one_token_after_another(seq: int, chunk: int) -> None:
    given = parts(seq)
    out, memory = gated_delta_rule(*(jnp.asarray(each, jnp.float32) for each in given), chunk=chunk)
    for found, expected in zip((out, memory), one_after_another(*given), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    late, _ = one_after_another(*given, late_decay=True)
    assert np.abs(np.asarray(out) - late).max() > 1e-2


def test_decay_of_zero_forgets_and_has_derivatives() -> None:
    query, key, value, decay, beta, memory = (jnp.asarray(each, jnp.float32) for each in parts(6))
    decay = decay.at[:, 3].set(0.0)
    out, _ = gated_delta_rule(query, key, value, decay, beta, memory)
    later, _ = gated_delta_rule(*(each[:, 3:] for each in (query, key, value, decay, beta)), jnp.zeros_like(memory))
    np.testing.assert_allclose(out[:, 3:], later, atol=1e-5)
    slope = jax.grad(lambda value: gated_delta_rule(query, key, value, decay, beta, memory)[0].sum())(value)
    assert np.isfinite(np.asarray(slope)).all()


@eqx.filter_jit
def logits(model, tokens, mask=None):
    return one_pass(model, tokens, mask=mask).logits


@pytest.mark.parametrize("places", [[0, 1, 2], [7, 8, 9], [0, 3, 9], [2, 5, 6]], ids=str)
def test_padding_anywhere_is_not_noticed(model, places: list[int]) -> None:
    """Before the text, behind it, in its midst, where a convolution over neighbours would see it."""
    mask = jnp.ones((2, 10), bool).at[0, jnp.asarray(places)].set(False).at[1, :3].set(False)
    padded = jnp.full((2, 10), 5).at[mask].set(TOKENS.reshape(-1))
    found, alone = logits(model, padded, mask), logits(model, TOKENS)
    np.testing.assert_allclose(found[mask], alone.reshape(-1, 48), atol=2e-5)
    assert np.abs(np.asarray(logits(model, padded)[mask] - alone.reshape(-1, 48))).max() > 1e-2


def test_generation_with_its_state_equals_passes_over_everything(model) -> None:
    small = load(GOLDENS / "qwen3.5-gelu", dtype="float32").model
    subject, prompts = Subject(small, None, "tiny"), [[3, 1, 4, 1, 5, 9], [9]]
    edits = {"blocks/0/attn/recalled": Add(0.1), "blocks/0/attn/out": Add(0.05)}
    kept, anew = (generate(subject, prompts, max_tokens=5, cache=cache, edits=edits) for cache in (True, False))
    assert kept.tokens == anew.tokens
    np.testing.assert_allclose(kept.log_probabilities, anew.log_probabilities, atol=1e-4)
    assert can_cache(model) == ""
    states = [cache for cache in empty_caches(model, 1, 500) if isinstance(cache, DeltaState)]
    assert len(states) == 3 and {state.memory.shape for state in states} == {(1, 4, 4, 6)}  # whatever the text's length


@pytest.mark.parametrize("lost", [None, "memory", "recent"])
def test_a_state_that_is_forgotten_would_be_seen(model, lost: str | None) -> None:
    """The layer's output of a text's second half, from the state behind the first."""
    net, x = model.blocks[0].attn, jax.random.normal(jax.random.key(0), (2, 6, 16))
    _, state = advance(net, x[:, :4], net.empty(2, x.dtype))
    if lost:
        state = dataclasses.replace(state, **{lost: jnp.zeros_like(getattr(state, lost))})
    error = jnp.abs(advance(net, x[:, 4:], state)[0] - eqx.filter_jit(net)(x)[:, 4:]).max()
    assert float(error) > 1e-2 if lost else float(error) < 1e-5


def test_sites_and_edits(model) -> None:
    names, trace = sites(model), run(model, TOKENS)
    delta = {f"blocks/0/attn/{name}" for name in ("in", "conv", "decay", "beta", "recalled", "gate", "z", "out")}
    maps = {f"blocks/0/attn/{name}_proj" for name in ("qkv", "z", "b", "a", "out")}
    assert delta | maps <= set(names) and delta <= set(trace)
    assert "blocks/0/attn/pattern" not in names and "blocks/3/attn/pattern" in names
    assert check_site(model, "model.layers.0.linear_attn") == "blocks/0/attn"
    assert check_site(model, "model.layers.0.linear_attn.in_proj_qkv") == "blocks/0/attn/qkv_proj"
    assert trace["blocks/0/attn/z"].shape == (2, 7, 4, 6) and trace["blocks/0/attn/decay"].shape == (2, 7, 4)
    blank = run(model, TOKENS, edits={"blocks/0/attn/z": SetTo(0.0)})
    assert float(jnp.abs(blank["blocks/0/attn/out"]).max()) == 0
    still = run(model, TOKENS, edits={"blocks/0/attn/beta": SetTo(0.0)})
    assert float(jnp.abs(still["blocks/0/attn/recalled"]).max()) == 0  # nothing is written
    doubled = replace(model, {"blocks/0/attn/out_proj": lambda x: 2 * select(model, "blocks/0/attn/out_proj").get()(x)})
    found = run(doubled, TOKENS)["blocks/0/attn/out"]
    np.testing.assert_allclose(found, 2 * trace["blocks/0/attn/out"], rtol=1e-5)
    with pytest.raises(UserError, match=r"no site 'blocks\.0\.attn\.hook_pattern'"):
        check_site(model, "blocks.0.attn.hook_pattern")


def test_constant_scores_have_no_derivative(model) -> None:
    """With q, k, g and b held, what is recalled depends on the values alone, and linearly."""
    net, x = model.blocks[0].attn, jax.random.normal(jax.random.key(0), (1, 5, 16))
    is_value = jnp.arange(net.config.channels) >= 2 * 2 * 4

    def slope(rules: Rules, values: bool) -> tuple[jax.Array, jax.Array]:
        def recalled(step):
            found = {}

            def tap(name, value):
                if name == "conv":
                    value = value + step * jnp.where(is_value == values, value if values else value**2, 0)
                found[name] = value
                return value

            net(x, tap=tap, rules=rules)
            return found["recalled"]

        return jax.jit(lambda: jax.jvp(recalled, (0.0,), (1.0,)))()

    held = Rules(attention=True)
    np.testing.assert_allclose(*slope(held, values=True), atol=1e-6)
    assert float(jnp.abs(slope(held, values=False)[1]).max()) == 0
    assert float(jnp.abs(slope(Rules(), values=False)[1]).max()) > 1e-2


def test_every_matrix_is_placed(model) -> None:
    axes = cut_axes(model)
    assert axes["blocks/0/attn/qkv_proj/weight"] == 1 and axes["blocks/0/attn/out_proj/weight"] == 0
    assert axes["blocks/0/attn/conv"] == 0 and axes["blocks/3/attn/gate_proj/weight"] == 1


def test_own_form_and_bad_configurations(model, tmp_path: Path) -> None:
    save_subject(Subject(model, None, "hybrid"), tmp_path / "own")
    again = load(tmp_path / "own", dtype="float32").model
    assert again.config == model.config and eqx.tree_equal(again, model)
    with pytest.raises(UserError, match=r"value_heads=3 is not a multiple of key_heads=2"):
        DeltaConfig(2, 3, 4, 4)
    with pytest.raises(UserError, match=r"delta_layers=\(0,\) need delta="):
        dataclasses.replace(model.config, delta=None, delta_layers=(0,))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attn_output_gate": False}, "attn_output_gate=False"),
        ({"layer_types": ["linear_attention"]}, "one type for each of 4 layers"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types='sliding_attention'"),
        ({"linear_num_value_heads": 3}, "value_heads=3 is not a multiple"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0"),
        ({"layer_types": None, "full_attention_interval": 2}, "missing tensor|unknown tensor"),
        ({"surprise": 1}, "unknown config field surprise"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_configurations_are_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "qwen3.5", tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=words):
        load(tmp_path / "m")


def test_experts_in_one_tensor_are_the_same(tmp_path: Path) -> None:
    """As published: `mlp.experts.gate_up_proj` [experts, 2 hidden, d] instead of two matrices an expert."""
    shutil.copytree(GOLDENS / "qwen3.5-moe", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    layers = json.loads((tmp_path / "m" / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        where = f"model.layers.{layer}.mlp.experts"
        each = {
            kind: np.stack([tensors.pop(f"{where}.{expert}.{kind}_proj.weight") for expert in range(5)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{where}.gate_up_proj"] = np.concatenate([each["gate"], each["up"]], axis=1)
        tensors[f"{where}.down_proj"] = each["down"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    one, other = (load(path, dtype="float32").model for path in (GOLDENS / "qwen3.5-moe", tmp_path / "m"))
    assert eqx.tree_equal(one, other)
