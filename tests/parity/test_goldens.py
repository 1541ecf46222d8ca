"""Our logits equal those of transformers, for every family; the goldens come from make_goldens.py (no torch here).

An encoder has no logits: its last hidden state is compared, where there is no padding.

The second half shows that the test can fail: each control breaks one thing that a loader could get wrong in silence.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.models.delta_net import GatedDeltaNet
from jaxinterp.models.families.configs import FAMILIES
from jaxinterp.models.families.wrappers import WRAPPERS
from jaxinterp.models.files.weights import Layout
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
TOLERANCE = 1e-4


def errors(model: Transformer, name: str) -> dict[str, float]:
    """By array, the largest difference from what transformers gives, over the largest number."""
    golden = np.load(GOLDENS / name / "expected.npz", allow_pickle=False)
    trace = run(model, jnp.asarray(golden["tokens"]))  # not jitted: quicker for models this small
    padding = json.loads((GOLDENS / name / "config.json").read_text()).get("pad_token_id")
    counts = golden["tokens"] != (-1 if padding is None or "logits" in golden else padding)
    found = {}
    for kind in sorted(set(golden) - {"tokens"}):
        expected, actual = golden[kind], np.asarray(trace.logits if kind == "logits" else trace[kind])
        assert actual.dtype == np.float32
        found[kind] = float(np.abs(actual - expected)[counts].max() / np.abs(expected)[counts].max())
    return found


def relative_error(model: Transformer, name: str) -> float:
    """The error of the logits; of an encoder, that of its last hidden state."""
    found = errors(model, name)
    return found["logits"] if "logits" in found else found["final"]


def test_every_family_has_goldens() -> None:
    kinds = [json.loads((GOLDENS / name / "config.json").read_text())["model_type"] for name in NAMES]
    assert set(kinds) == {*FAMILIES, *WRAPPERS}
    assert min(kinds.count(kind) for kind in kinds) >= 3
    assert any((GOLDENS / name / "model.safetensors.index.json").is_file() for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_hidden_states_equal_those_of_transformers(name: str) -> None:
    found = errors(load(GOLDENS / name, dtype="float32").model, name)
    assert set(found) >= ({"logits", "embed"} if "logits" in found else {"final"})
    assert max(found.values()) < TOLERANCE, found


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 100.0}
YARN_SCALES = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
YARN_SCALES |= {"rope_theta": 50.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 2.0, "beta_slow": 0.2}
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 8}
LONG |= {"short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]}

# One config field changed in a copy of the golden: what would happen if the loader ignored the field.
IGNORED_FIELDS = [
    ("llama-llama3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),
    ("llama-linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("gpt-neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    ("gpt-neox", {"use_parallel_residual": False}),
    ("gpt-neox-sequential", {"use_parallel_residual": True}),
    ("gpt-neox-sequential", {"layer_norm_eps": 1e-5}),
    ("gpt2-untied", {"layer_norm_epsilon": 1e-5}),
    ("gpt2-untied", {"activation_function": "gelu_new"}),
    ("llama-tied", {"rms_norm_eps": 1e-6}),
    ("mistral-window", {"sliding_window": None}),
    ("mistral-window", {"sliding_window": 6}),
    ("qwen2-window", {"use_sliding_window": False, "layer_types": None}),
    ("qwen2-window", {"max_window_layers": 2, "layer_types": None}),
    ("qwen3-bias", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 6}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ("gemma3", {"rope_parameters": None, "rope_theta": 1e4, "rope_local_base_freq": 1e4}),
    ("gemma3", {"rope_parameters": None, "rope_theta": 1e2, "rope_local_base_freq": 1e2}),
    ("gemma3", {"layer_types": None, "_sliding_window_pattern": 7}),
    ("gemma3", {"sliding_window": 5}),
    ("gemma3", {"query_pre_attn_scalar": 6}),
    ("gemma3-linear", {"rope_parameters": None, "rope_theta": 1e3, "rope_local_base_freq": 50.0}),
    ("gemma3-linear", {"final_logit_softcapping": None}),
    ("olmo2-bias", {"rms_norm_eps": 1e-6}),
    ("phi3", {"sliding_window": None}),
    ("phi3-grouped", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    ("gpt2-replica", {"scale_attn_by_inverse_layer_idx": False}),
    ("llama-yarn", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
    ("llama-yarn", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    ("llama-yarn", {"rope_parameters": YARN | {"original_max_position_embeddings": 32}}),
    ("llama-yarn-mscale", {"rope_parameters": YARN_SCALES | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    ("llama-yarn-mscale", {"rope_parameters": YARN_SCALES | {"truncate": True}}),
    ("llama-yarn-mscale", {"rope_parameters": YARN_SCALES | {"beta_fast": 32.0}}),
    ("llama-dynamic", {"max_position_embeddings": 64}),
    ("llama-longrope", {"rope_parameters": LONG | {"original_max_position_embeddings": 64}}),
    ("llama-longrope", {"rope_parameters": LONG | {"factor": 1.0}}),
    ("gemma3-both-scaled", {"rope_parameters": None, "rope_theta": 1e3, "rope_local_base_freq": 50.0}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    ("smollm3-window", {"layer_types": ["full_attention", "full_attention"]}),
    ("olmo3", {"sliding_window": 12}),
    ("olmo3-yarn", {"rope_parameters": None, "rope_theta": 300.0}),
    ("gptj", {"rotary_dim": 2}),
    ("gpt-neo", {"window_size": 12}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 0.5}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("cohere", {"logit_scale": 0.0625}),
    ("cohere", {"layer_norm_eps": 0.1}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("olmoe-clipped", {"clip_qkv": None}),
    ("olmoe-clipped", {"norm_topk_prob": False}),
    ("qwen3-moe", {"norm_topk_prob": False}),
    ("gpt-oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}}),
    ("gpt-oss-clipped", {"swiglu_limit": 7.0}),
    ("gpt-oss-clipped", {"swiglu_alpha": 1.702}),
    ("llama4", {"attention_chunk_size": 64, "no_rope_layers": [1, 1, 1, 0]}),
    ("llama4-dense", {"floor_scale": 8192}),
    ("llama4-dense", {"use_qk_norm": True}),
    ("qwen3.5", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),  # a quarter of a head, not half
    ("qwen3.5-grouped", {"rms_norm_eps": 1e-6}),
    ("qwen3.5-gelu", {"hidden_act": "silu"}),
    ("qwen3.5-moe", {"num_experts_per_tok": 1}),
    ("gemma4", {"sliding_window": 9}),
    ("gemma4", {"rope_parameters": None}),
    ("gemma4", {"final_logit_softcapping": None}),
    ("gemma4-equal", {"rms_norm_eps": 1e-6}),
    ("bert", {"pad_token_id": None}),
    ("bert-masked-lm", {"layer_norm_eps": 1e-12}),
    ("bert-masked-lm", {"hidden_act": "gelu"}),
]


@pytest.mark.parametrize(("name", "change"), IGNORED_FIELDS, ids=lambda value: str(value)[:40])
def test_control_ignored_field_shows(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / name, tmp_path / name)
    config = tmp_path / name / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert relative_error(load(tmp_path / name, dtype="float32").model, name) > 1e-2


def permute_query_and_key(model: Transformer) -> Transformer:
    """Rows of every head in the order of GGUF files, without putting them back."""
    head_dim = model.config.head_dim

    def permute(weight: jax.Array) -> jax.Array:
        outputs = weight.shape[1]
        return weight[:, Layout(order="rotary_pairs").file_outputs(0, outputs, outputs, head_dim)]

    where = lambda model: [linear.weight for block in model.blocks for linear in (block.attn.q_proj, block.attn.k_proj)]
    return eqx.tree_at(where, model, replace_fn=permute)


def drop_query_key_norms(model: Transformer) -> Transformer:
    where = lambda model: [norm for block in model.blocks for norm in (block.attn.query_norm, block.attn.key_norm)]
    return eqx.tree_at(where, model, replace_fn=lambda norm: None)


def drop_attention_biases(model: Transformer) -> Transformer:
    where = lambda model: (
        [block.attn.k_proj.bias for block in model.blocks] + [b.attn.v_proj.bias for b in model.blocks]
    )
    return eqx.tree_at(where, model, replace_fn=jnp.zeros_like)


def swap_query_and_value(model: Transformer) -> Transformer:
    where = lambda model: [b.attn.q_proj for b in model.blocks] + [b.attn.v_proj for b in model.blocks]
    swapped = [b.attn.v_proj for b in model.blocks] + [b.attn.q_proj for b in model.blocks]
    return eqx.tree_at(where, model, swapped)


def drop_norm_offset(model: Transformer) -> Transformer:
    where = lambda model: [block.mlp_norm.weight for block in model.blocks]
    return eqx.tree_at(where, model, replace_fn=lambda weight: weight - 1)


def drop_post_norms(model: Transformer) -> Transformer:
    where = lambda model: [block.mlp_post_norm for block in model.blocks]
    return eqx.tree_at(where, model, replace_fn=lambda norm: None)


def norm_each_head(model: Transformer) -> Transformer:
    """Query and key norms over each head, with the first head's weights, instead of over the whole projection."""
    where = lambda model: [n.weight for b in model.blocks for n in (b.attn.query_norm, b.attn.key_norm)]
    return eqx.tree_at(where, model, replace_fn=lambda weight: weight[: model.config.head_dim])


def swap_gate_and_up(model: Transformer) -> Transformer:
    where = lambda model: [b.mlp.gate_proj for b in model.blocks] + [b.mlp.up_proj for b in model.blocks]
    return eqx.tree_at(where, model, [b.mlp.up_proj for b in model.blocks] + [b.mlp.gate_proj for b in model.blocks])


def norm_before(model: Transformer) -> Transformer:
    """The norms of the sums moved to what the sublayers read."""
    blocks = tuple(
        dataclasses.replace(
            b, attn_norm=b.attn_sum_norm, attn_sum_norm=None, mlp_norm=b.mlp_sum_norm, mlp_sum_norm=None
        )
        for b in model.blocks
    )
    return dataclasses.replace(model, blocks=blocks)


def look_ahead_forbidden(model: Transformer) -> Transformer:
    return dataclasses.replace(
        model,
        blocks=tuple(dataclasses.replace(b, attn=dataclasses.replace(b.attn, causal=True)) for b in model.blocks),
    )


def second_token_type(model: Transformer) -> Transformer:
    return eqx.tree_at(lambda model: model.embedding.token_type, model, replace_fn=lambda types: types[1:])


def pair_halves(model: Transformer) -> Transformer:
    """Rotated dimensions paired half a head apart where the family pairs neighbours."""
    attns = [dataclasses.replace(block.attn, interleaved=False) for block in model.blocks]
    return eqx.tree_at(lambda model: [block.attn for block in model.blocks], model, attns)


def drop_head_bias(model: Transformer) -> Transformer:
    return eqx.tree_at(lambda model: model.unembedding.bias, model, replace_fn=jnp.zeros_like)


def one_norm_for_all_heads(model: Transformer) -> Transformer:
    """Each head's query and key normed with the first head's weights."""
    where = lambda model: [n.weight for b in model.blocks for n in (b.attn.query_norm, b.attn.key_norm)]
    return eqx.tree_at(where, model, replace_fn=lambda weight: weight[0])


def root_mean_square(model: Transformer) -> Transformer:
    """Query and key norms without the mean."""
    norms = lambda model: [n for b in model.blocks for n in (b.attn.query_norm, b.attn.key_norm)]
    return eqx.tree_at(norms, model, replace_fn=lambda norm: dataclasses.replace(norm, kind="rms"))


def shifted_positions(model: Transformer) -> Transformer:
    return eqx.tree_at(lambda model: model.embedding.position, model, replace_fn=lambda rows: jnp.roll(rows, 1, 0))


def drop_sinks(model: Transformer) -> Transformer:
    return eqx.tree_at(lambda m: [b.attn.sinks for b in m.blocks], model, replace_fn=lambda sinks: None)


def drop_shared_expert(model: Transformer) -> Transformer:
    return eqx.tree_at(lambda m: [b.mlp.shared for b in m.blocks], model, replace_fn=lambda shared: None)


def swap_experts(model: Transformer) -> Transformer:
    where = lambda m: [leaf for block in m.blocks for leaf in jax.tree.leaves(block.mlp.experts)]
    return eqx.tree_at(where, model, replace_fn=lambda leaf: leaf[::-1])


def in_delta(change: Callable[[GatedDeltaNet], GatedDeltaNet], name: str) -> Callable[[Transformer], Transformer]:
    """Every Gated DeltaNet of a model changed."""

    def broken(model: Transformer) -> Transformer:
        nets = lambda model: [block.attn for block in model.blocks if isinstance(block.attn, GatedDeltaNet)]
        return eqx.tree_at(nets, model, replace_fn=change)

    broken.__name__ = name
    return broken


def with_gate_and_query_swapped(model: Transformer) -> Transformer:
    whole = lambda model: [block.attn for block in model.blocks if not isinstance(block.attn, GatedDeltaNet)]
    swap = lambda attn: dataclasses.replace(attn, q_proj=attn.gate_proj, gate_proj=attn.q_proj)
    return eqx.tree_at(whole, model, replace_fn=swap)


def drop_layer_scales(model: Transformer) -> Transformer:
    return eqx.tree_at(lambda m: [b.scale for b in m.blocks], model, replace_fn=jnp.ones_like)


def drop_own_vectors(model: Transformer) -> Transformer:
    return eqx.tree_at(lambda m: m.per_layer.token, model, replace_fn=jnp.zeros_like)


def drop_value_norms(model: Transformer) -> Transformer:
    norms = lambda m: [b.attn.value_norm for b in m.blocks if b.attn.value_norm is not None]
    return eqx.tree_at(norms, model, replace_fn=lambda norm: None)


def share_the_other_kind(model: Transformer) -> Transformer:
    """Keys of the layer before, whatever its kind."""
    attns = [dataclasses.replace(block.attn, shares="one") for block in model.blocks]
    return eqx.tree_at(lambda m: [b.attn for b in m.blocks], model, attns)


BROKEN_DELTA = {
    "newest_first": lambda net: dataclasses.replace(net, conv=net.conv[..., ::-1]),
    "no_decay": lambda net: dataclasses.replace(net, decay_log=net.decay_log - 20),
    "no_step_bias": lambda net: dataclasses.replace(net, step_bias=jnp.zeros_like(net.step_bias)),
    "norm_about_zero": lambda net: dataclasses.replace(net, norm=dataclasses.replace(net.norm, offset=1.0)),
    "decay_and_step_swapped": lambda net: dataclasses.replace(net, a_proj=net.b_proj, b_proj=net.a_proj),
    "values_first": lambda net: dataclasses.replace(
        net, qkv_proj=dataclasses.replace(net.qkv_proj, weight=net.qkv_proj.weight[:, ::-1])
    ),
}
BROKEN_WEIGHTS = [
    *[("qwen3.5", in_delta(change, name)) for name, change in BROKEN_DELTA.items()],
    ("qwen3.5", with_gate_and_query_swapped),
    *[("gemma4", change) for change in (drop_layer_scales, drop_own_vectors, drop_value_norms)],
    ("gemma4-plain", share_the_other_kind),
    ("qwen3.5-moe", drop_shared_expert),
    ("qwen3.5-moe", swap_experts),
    ("gpt-oss", drop_sinks),
    ("gpt-oss-mxfp4", swap_experts),
    *[(name, drop_shared_expert) for name in ("qwen2-moe", "llama4")],
    *[(name, swap_experts) for name in ("mixtral", "qwen3-moe", "gpt-oss", "llama4")],
    *[(name, pair_halves) for name in ("gptj", "cohere")],
    *[(name, drop_head_bias) for name in ("gptj", "gptj-tied", "phi")],
    *[(name, one_norm_for_all_heads) for name in ("cohere-normed", "stablelm-parallel")],
    *[(name, root_mean_square) for name in ("cohere-normed", "phi-normed")],
    ("opt", shifted_positions),
    ("llama", permute_query_and_key),
    ("qwen3", drop_query_key_norms),
    ("qwen2", drop_attention_biases),
    ("gpt2", swap_query_and_value),
    ("gpt-neox", swap_query_and_value),
    ("gemma", drop_norm_offset),
    ("gemma2", drop_post_norms),
    ("gemma3", drop_post_norms),
    ("gemma3", drop_query_key_norms),
    ("olmo2", drop_post_norms),
    ("olmo2", norm_each_head),
    ("phi3", swap_gate_and_up),
    ("phi3", swap_query_and_value),
    ("bert", norm_before),
    ("bert", look_ahead_forbidden),
    ("bert", second_token_type),
]


@pytest.mark.parametrize(("name", "break_it"), BROKEN_WEIGHTS, ids=lambda value: getattr(value, "__name__", value))
def test_control_broken_weights_show(name: str, break_it: Callable[[Transformer], Transformer]) -> None:
    assert relative_error(break_it(load(GOLDENS / name, dtype="float32").model), name) > 1e-2


@pytest.mark.parametrize(("name", "field"), [("gpt2-gelu", "activation_function"), ("bert", "hidden_act")])
def test_control_the_two_gelus_differ(name: str, field: str, tmp_path: Path) -> None:
    """Exact GELU and its tanh approximation differ by less than one percent, but by more than the tolerance."""
    shutil.copytree(GOLDENS / name, tmp_path / "golden")
    config = tmp_path / "golden" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: "gelu_new"}))
    assert relative_error(load(tmp_path / "golden", dtype="float32").model, name) > 1.5 * TOLERANCE
