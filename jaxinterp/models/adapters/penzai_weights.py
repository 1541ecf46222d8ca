"""Our model's weights in Penzai's layers: for tools that take a Penzai model.

    penzai_model = to_penzai(load("path/to/llama").model)

Penzai's builders give the layers, our loader gave the weights, and each parameter is put in by its label. Penzai's own
converters are not used: they ignore what they do not know (RoPE scaling, biases, query and key norms, the epsilon of
the final LayerNorm). What Penzai's layers cannot compute is refused here by its field.

Weights of ours are (d_in, d_out); Penzai splits them by heads and names the axes. A norm's weight is Penzai's scale
with our offset added (Gemma stores weight - 1).

Facts: Penzai 0.2.5, penzai/models/transformer/variants/llamalike_common.py and gpt_neox.py.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array
from penzai import pz
from penzai.models.transformer.model_parts import TransformerLM
from penzai.models.transformer.variants import gpt_neox, llamalike_common

from jaxinterp.core.errors import UserError
from jaxinterp.models.attention import Attention
from jaxinterp.models.layers import Linear, Norm
from jaxinterp.models.mlp import MLP
from jaxinterp.models.transformer import Transformer, TransformerConfig

GATED = {"silu": "swiglu", "gelu_tanh": "geglu_approx"}
DENSE = {"gelu": "gelu_exact", "gelu_tanh": "gelu_approx", "relu": "relu", "silu": "silu"}
"""Penzai's names of activation functions."""

SHARED = {
    *("vocab_size", "d_model", "layers", "heads", "kv_heads", "head_dim", "d_mlp", "context", "activation", "gated"),
    *("norm", "norm_epsilon", "norm_offset", "rotary_dimensions", "rotary_base", "tied"),
}
LLAMALIKE = SHARED | {"post_norms", "windows", "attention_scale", "attention_cap", "logit_cap", "embedding_scale"}
GPT_NEOX = SHARED | {"parallel", "norm_bias", "qkv_bias", "attention_out_bias", "mlp_bias"}
"""The fields of a configuration that are taken over or looked at; every other must have its default."""

Arrays = dict[str, pz.nx.NamedArray]


def to_penzai(model: Transformer) -> TransformerLM:
    """The model built from Penzai's llama-like or GPT-NeoX layers, with the same weights.

    Llama-like are Llama, Mistral, and Gemma 1 and 2. A tied embedding is shared where Penzai can share it, with
    Gemma's scale, and is otherwise given to the head as a matrix of its own.

    Raises:
      UserError: Penzai's layers cannot compute this configuration, or a leaf was replaced.
    """
    config = model.config
    for index, block in enumerate(model.blocks):
        for name, kind in (("mlp", MLP), ("attn", Attention)):
            if not isinstance(getattr(block, name), kind):
                raise UserError(f"blocks/{index}/{name} was replaced: convert the model first, then replace.")
    build, arrays = _llamalike(model) if config.norm == "rms" else _gpt_neox(model)
    parameters = [pz.Parameter(value=value, label=f"transformer/{label}") for label, value in arrays.items()]
    return pz.bind_variables(build, parameters)


def _llamalike(model: Transformer) -> tuple[TransformerLM, Arrays]:
    config = model.config
    _require_defaults(config, LLAMALIKE)
    _require(config, gated=True, rotary_dimensions=config.head_dim)
    scaled = config.embedding_scale != 1.0
    if scaled and not (config.tied and abs(config.embedding_scale - config.d_model**0.5) < 1e-3):
        _require(config, embedding_scale=1.0)
    dtype = model.embedding.token.dtype
    windows = config.windows or (None,) * config.layers
    build = llamalike_common.build_llamalike_transformer(
        llamalike_common.LlamalikeTransformerConfig(
            num_kv_heads=config.kv_heads,
            query_head_multiplier=config.heads // config.kv_heads,
            embedding_dim=config.d_model,
            projection_dim=config.head_dim,
            mlp_hidden_dim=config.d_mlp,
            num_decoder_blocks=config.layers,
            vocab_size=config.vocab_size,
            mlp_variant=_activation(config, GATED),
            tie_embedder_and_logits=scaled,
            rope_wavelength=config.rotary_base,
            rms_norm_eps=config.norm_epsilon,
            attention_type=[
                llamalike_common.AttentionTypeGlobalCausal()
                if window is None
                else llamalike_common.AttentionTypeSlidingWindowCausal(window)
                for window in windows
            ],
            use_post_attn_norm=config.post_norms,
            use_post_ffw_norm=config.post_norms,
            final_logit_softcap=config.logit_cap,
            attn_logits_soft_cap=config.attention_cap,
            query_scaling_factor="default" if config.attention_scale is None else config.attention_scale,
            parameter_dtype=dtype,
            activation_dtype=dtype,
        )
    )
    arrays = _around(model, with_head=not scaled)
    for index, block in enumerate(model.blocks):
        norms = {"pre_attention_norm": block.attn_norm, "pre_ffw_norm": block.mlp_norm}
        if block.attn_post_norm is not None and block.mlp_post_norm is not None:
            norms |= {"post_attention_norm": block.attn_post_norm, "post_ffw_norm": block.mlp_post_norm}
        mlps = {
            "gating_linear": block.mlp.gate_proj,
            "value_linear": block.mlp.up_proj,
            "out_linear": block.mlp.down_proj,
        }
        part = {f"{name}/scale.weights": _scale(norm) for name, norm in norms.items()}
        part |= {f"mlp/{name}.weights": _matrix(linear, name == "out_linear") for name, linear in mlps.items()}
        part |= {f"attention/{name}.weights": weight for name, (weight, _) in _attention(block.attn, config).items()}
        arrays |= {f"block_{index}/{label}": value for label, value in part.items()}
    return build, arrays


def _gpt_neox(model: Transformer) -> tuple[TransformerLM, Arrays]:
    config = model.config
    _require_defaults(config, GPT_NEOX)
    _require(config, parallel=True, gated=False, norm_bias=True, kv_heads=config.heads)
    _require(config, qkv_bias=True, attention_out_bias=True, mlp_bias=True)
    dtype = model.embedding.token.dtype
    build = gpt_neox.build_gpt_neox_transformer(
        gpt_neox.GPTNeoXTransformerConfig(
            num_attention_heads=config.heads,
            embedding_dim=config.d_model,
            projection_dim=config.head_dim,
            mlp_hidden_dim=config.d_mlp,
            num_decoder_blocks=config.layers,
            vocab_size=config.vocab_size,
            activation_fn=_activation(config, DENSE),
            rope_subset_size=config.rotary_dimensions,
            rope_wavelength=config.rotary_base,
            layernorm_epsilon=config.norm_epsilon,
            parameter_dtype=dtype,
            activation_dtype=dtype,
        )
    )
    # The builder leaves the final norm at an epsilon of its own.
    norms = pz.select(build).at_instances_of(pz.nn.Standardize)
    build = norms.apply(lambda norm: pz.nn.Standardize(across=norm.across, epsilon=config.norm_epsilon))
    arrays = _around(model, with_head=True) | {"final_norm/shift.bias": _shift(model.final_norm)}
    for index, block in enumerate(model.blocks):
        part: Arrays = {}
        for name, norm in {"pre_attention_norm": block.attn_norm, "pre_ffw_norm": block.mlp_norm}.items():
            part |= {f"{name}/scale.weights": _scale(norm), f"{name}/shift.bias": _shift(norm)}
        for name, linear in {"in": block.mlp.up_proj, "out": block.mlp.down_proj}.items():
            axis = "embedding" if name == "out" else "neurons"
            part[f"mlp/{name}/Linear.weights"] = _matrix(linear, name == "out")
            part[f"mlp/{name}/AddBias.bias"] = _tag(linear.bias, axis)
        for name, (weight, bias) in _attention(block.attn, config).items():
            part |= {f"attention/{name}/Linear.weights": weight, f"attention/{name}/AddBias.bias": bias}
        arrays |= {f"block_{index}/{label}": value for label, value in part.items()}
    return build, arrays


def _around(model: Transformer, with_head: bool) -> Arrays:
    """Embedding, final norm and head."""
    arrays = {
        "embedder.embeddings": _tag(model.embedding.token, "vocabulary", "embedding"),
        "final_norm/scale.weights": _scale(model.final_norm),
    }
    if with_head:
        weight = model.embedding.token.T if model.unembedding is None else model.unembedding.weight
        arrays["lm_head.weights"] = _tag(weight, "embedding", "vocabulary")
    return arrays


def _attention(attention: Any, config: TransformerConfig) -> dict[str, tuple[pz.nx.NamedArray, Any]]:
    """Weight and bias (None where there is none) of the four projections, split by heads."""
    groups, multiplier = config.kv_heads, config.heads // config.kv_heads
    if multiplier == 1:
        query = key = {"heads": groups}
    elif groups == 1:
        query, key = {"query_heads": multiplier}, {}
    else:
        query, key = {"head_groups": groups, "query_heads": multiplier}, {"head_groups": groups}

    def split(linear: Linear, heads: dict[str, int]) -> tuple[pz.nx.NamedArray, Any]:
        sizes, names = (*heads.values(), config.head_dim), (*heads, "projection")
        bias = None if linear.bias is None else _tag(linear.bias.reshape(sizes), *names)
        return _tag(linear.weight.reshape(config.d_model, *sizes), "embedding", *names), bias

    out = attention.o_proj.weight.reshape(*query.values(), config.head_dim, config.d_model)
    out_bias = None if attention.o_proj.bias is None else _tag(attention.o_proj.bias, "embedding")
    return {
        "query": split(attention.q_proj, query),
        "key": split(attention.k_proj, key),
        "value": split(attention.v_proj, key),
        "output": (_tag(out, *query, "projection", "embedding"), out_bias),
    }


def _matrix(linear: Linear, down: bool) -> pz.nx.NamedArray:
    return _tag(linear.weight, *(("neurons", "embedding") if down else ("embedding", "neurons")))


def _scale(norm: Norm | None) -> pz.nx.NamedArray:
    assert norm is not None  # the configuration says that it is there
    return _tag(norm.weight + jnp.asarray(norm.offset, norm.weight.dtype), "embedding")


def _shift(norm: Norm | None) -> pz.nx.NamedArray:
    assert norm is not None
    return _tag(norm.bias, "embedding")


def _tag(array: Array | None, *names: str) -> pz.nx.NamedArray:
    assert array is not None  # the configuration says that it is there
    return pz.nx.wrap(array).tag(*names)


def _activation(config: TransformerConfig, names: dict[str, str]) -> Any:
    if config.activation not in names:
        raise UserError(
            f"activation={config.activation!r} (gated={config.gated}) is none of Penzai's: it has {', '.join(names)}."
        )
    return names[config.activation]


def _require_defaults(config: TransformerConfig, understood: set[str]) -> None:
    """Raises UserError if a field that is not understood here has another value than its default."""
    for field in dataclasses.fields(config):
        if field.name not in understood:
            _require(config, **{field.name: field.default})


def _require(config: TransformerConfig, **values: Any) -> None:
    """Raises UserError if a field of the configuration is not as Penzai's layers have it."""
    for name, value in values.items():
        if getattr(config, name) != value:
            raise UserError(
                f"{name}={getattr(config, name)!r} cannot be built from Penzai's layers, which have {name}={value!r}: "
                "use the model as it is."
            )
