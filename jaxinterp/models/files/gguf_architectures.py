"""Architectures of GGUF files as tables: metadata to configuration, tensor names to leaves.

    llama    Llama, Mistral, SmolLM2: query and key rows permuted by the converter (rotation of neighbours)
    qwen2    biases on query, key and value
    qwen3    norms on query and key
    gemma, gemma2, gemma3: the converter adds 1 to every norm's weight, so that it is used as it is
    phi3     query, key and value in one tensor; gate and up projection in one
    gpt2     the same for query, key and value, all biases, learned positions; matrices transposed by the converter
    olmo2    norms on what sublayers write; OLMo 3 with windows in three layers of four

No other converter permutes. What llama.cpp does not write into the file, because its own code knows it, is here: the
activation, Gemma's scale of embeddings, the base 10,000 of Gemma 3's layers with a window, which layers have one.

Source: llama.cpp (convert_hf_to_gguf.py, src/llama-model.cpp); gguf 0.19 (constants.py, tensor_mapping.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.tensors import QUERY_KEY_VALUE, block, linear, stacked
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED, Layout, LeafTable, StoredTensor
from jaxinterp.models.rotary import RopeScaling, longrope_attention_factor

Metadata = Mapping[str, Any]

FIELDS = {
    "block_count": "layers",
    "context_length": "context",
    "embedding_length": "d_model",
    "feed_forward_length": "d_mlp",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_epsilon",
    "rope.freq_base": "rotary_base",
    "rope.dimension_count": "rotary_dimensions",
}
"""Metadata below the architecture's name and where it goes."""

SCALING = ("rope.scaling.type", "rope.scaling.factor")
CAPS = {"attn_logit_softcapping": "attention_cap", "final_logit_softcapping": "logit_cap"}
WINDOW, PATTERN, LOCAL_BASE = "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"
"""Newer files say which layers have a window (every n-th has none, or one truth value a layer), and their base."""


def _blocks(**renamed: tuple[str, Layout]) -> LeafTable:
    """Llama's tensors, without a permutation; `renamed` replaces or adds parts of a block."""
    parts = {
        "attn_norm": ("attn_norm", PLAIN),
        "attn/q_proj": ("attn_q", TRANSPOSED),
        "attn/k_proj": ("attn_k", TRANSPOSED),
        "attn/v_proj": ("attn_v", TRANSPOSED),
        "attn/o_proj": ("attn_output", TRANSPOSED),
        "attn/query_norm": ("attn_q_norm", PLAIN),
        "attn/key_norm": ("attn_k_norm", PLAIN),
        "attn_post_norm": ("post_attention_norm", PLAIN),
        "mlp_norm": ("ffn_norm", PLAIN),
        "mlp_post_norm": ("post_ffw_norm", PLAIN),
        "mlp/gate_proj": ("ffn_gate", TRANSPOSED),
        "mlp/up_proj": ("ffn_up", TRANSPOSED),
        "mlp/down_proj": ("ffn_down", TRANSPOSED),
    }
    return {
        "embedding/token": ("token_embd.weight", PLAIN),
        "embedding/position": ("position_embd.weight", PLAIN),
        **linear("final_norm", "output_norm", PLAIN),
        **linear("unembedding", "output"),
        **block(parts | renamed, "blk"),
    }


PAIRS = Layout(transposed=True, order="rotary_pairs")
STACKED: dict[str, tuple[str, Layout]] = stacked("attn", QUERY_KEY_VALUE, "attn_qkv", TRANSPOSED)
TENSORS = _blocks(**{"attn/q_proj": ("attn_q", PAIRS), "attn/k_proj": ("attn_k", PAIRS)})
"""Of Llama files."""


def _no_more(metadata: Metadata, config: dict[str, PyTree]) -> dict[str, PyTree]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """What the files of one architecture hold.

    Attributes:
      tensors: our leaves, and where they are.
      fields: metadata that is copied, beside FIELDS.
      reads: metadata that `more` reads.
      constants: fields of the configuration that every model of it has.
      more: further fields, from the metadata and the fields so far.
    """

    tensors: LeafTable
    fields: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    constants: Mapping[str, PyTree] = field(default_factory=dict)
    more: Callable[[Metadata, dict[str, PyTree]], dict[str, PyTree]] = _no_more


def _embedding_scale(metadata: Metadata, config: dict[str, PyTree]) -> dict[str, PyTree]:
    return {"embedding_scale": config["d_model"] ** 0.5}


def _windows(metadata: Metadata, config: dict[str, PyTree], slides: Callable[[int], bool]) -> dict[str, PyTree]:
    """Windows of the layers that have one; none where the file names none."""
    window = metadata.get(WINDOW)
    if not window:
        return {}
    if type(window) is not int or window < 1:
        raise UserError(f"metadata {WINDOW}={window!r} should be a positive whole number.")
    pattern, layers = metadata.get(PATTERN), config["layers"]
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(value in (0, 1, False, True) for value in pattern):
            raise UserError(f"metadata {PATTERN} has {len(pattern)} entries for {layers} layers: one truth value each.")
        slides = lambda layer: bool(pattern[layer])
    elif pattern is not None:
        if type(pattern) is not int or pattern < 1:
            raise UserError(f"metadata {PATTERN}={pattern!r} should be a positive whole number.")
        slides = lambda layer: (layer + 1) % pattern != 0
    return {"windows": tuple(window if slides(layer) else None for layer in range(config["layers"]))}


def _gemma2(metadata: Metadata, config: dict[str, PyTree]) -> dict[str, PyTree]:
    defaults = {"attention_cap": 50.0, "logit_cap": 30.0}  # as llama.cpp has them, where the file does not say
    caps = {ours: float(metadata[theirs]) for theirs, ours in CAPS.items() if metadata.get(theirs)}
    windows = _windows({WINDOW: 4096} | dict(metadata), config, lambda layer: layer % 2 == 0)
    return _embedding_scale(metadata, config) | defaults | caps | windows | _query_scale(config, layers=46)


def _gemma3(metadata: Metadata, config: dict[str, PyTree]) -> dict[str, PyTree]:
    if not metadata.get(WINDOW):
        raise UserError(f"metadata {WINDOW} is missing: Gemma 3 has windows in five layers of six.")
    cap = metadata.get("final_logit_softcapping")
    return (
        _embedding_scale(metadata, config)
        | _windows(metadata, config, lambda layer: (layer + 1) % 6 != 0)
        | ({"logit_cap": float(cap)} if cap else {})
        | {
            "local_rotary_base": float(metadata.get(LOCAL_BASE) or 10_000.0),
            "rotary_base": config.get("rotary_base", 1_000_000.0),
        }
        | _query_scale(config, layers=62)
    )


def _query_scale(config: dict[str, PyTree], layers: int) -> dict[str, PyTree]:
    """The 27B models, which llama.cpp knows by their number of layers, divide by d_model / heads."""
    divided = config["d_model"] / config["heads"] if config["layers"] == layers else config["head_dim"]
    return {"attention_scale": float(divided) ** -0.5}


def _phi3(metadata: Metadata, config: dict[str, PyTree]) -> dict[str, PyTree]:
    before = metadata.get("rope.scaling.original_context_length", config["context"])
    if before != config["context"] and config.get("rotary_scaling") is None:
        raise UserError(
            f"metadata phi3.rope.scaling.original_context_length={before} is not context_length={config['context']}: "
            "positions are stretched (longrope), and the tensors that say how, rope_factors_*, are missing."
        )
    return _windows(metadata, config, lambda layer: True)


def _olmo2(metadata: Metadata, config: dict[str, PyTree]) -> dict[str, PyTree]:
    return _windows(metadata, config, lambda layer: (layer + 1) % 4 != 0)


GEMMA = {"activation": "gelu_tanh"}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(TENSORS),
    "qwen2": Architecture(_blocks(), constants={"qkv_bias": True}),
    "qwen3": Architecture(_blocks(), constants={"query_key_norm": True}),
    "gemma": Architecture(_blocks(), constants=GEMMA, more=_embedding_scale),
    "gemma2": Architecture(
        _blocks(), reads=(WINDOW, PATTERN, *CAPS), constants=GEMMA | {"post_norms": True}, more=_gemma2
    ),
    "gemma3": Architecture(
        _blocks(),
        reads=(WINDOW, PATTERN, LOCAL_BASE, "final_logit_softcapping"),
        constants=GEMMA | {"post_norms": True, "query_key_norm": True},
        more=_gemma3,
    ),
    "phi3": Architecture(
        _blocks(**STACKED, **stacked("mlp", ("gate_proj", "up_proj"), "ffn_up", TRANSPOSED)),
        reads=(WINDOW, "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
        more=_phi3,
    ),
    "gpt2": Architecture(
        _blocks(**STACKED),
        fields={"attention.layer_norm_epsilon": "norm_epsilon"},
        constants={
            **{"norm": "layer", "norm_bias": True, "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
            **{"gated": False, "activation": "gelu_tanh", "learned_positions": True, "rotary_dimensions": 0},
        },
    ),
    "olmo2": Architecture(
        _blocks(),
        reads=(WINDOW, PATTERN),
        constants={
            **{"pre_norms": False, "post_norms": True, "query_key_norm": True, "query_key_norm_over": "projection"},
        },
        more=_olmo2,
    ),
}
"""By `general.architecture`."""


def scaling_of(metadata: Metadata, architecture: str) -> RopeScaling | None:
    """Scaled rotary positions: linear, by a factor.

    Raises:
      UserError: they are scaled in another way.
    """
    kind, factor = metadata.get("rope.scaling.type", "none"), metadata.get("rope.scaling.factor")
    if kind == "linear" and isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0:
        return None if factor == 1 else RopeScaling("linear", float(factor))
    if kind == "none" and factor is None:
        return None
    raise UserError(
        f"metadata {architecture}.rope.scaling.type={kind!r} with factor {factor!r}: scaled rotary positions other "
        "than 'linear' are not supported in GGUF files; load the model's Hugging Face directory instead."
    )


FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors of one factor a pair of dimensions, by which its frequency is divided: of Llama 3, and of longrope."""


def factors_of(
    metadata: Metadata, tensors: Mapping[str, StoredTensor], config: Mapping[str, PyTree], where: Path
) -> RopeScaling | None:
    """The scaling that such tensors say; None without them.

    Raises:
      UserError: a tensor is missing, of another length, or not positive.
    """
    if not tensors:
        return None
    names = FACTORS[:1] * 2 if FACTORS[0] in tensors else FACTORS[1:]
    found = []
    for name in names:
        if name not in tensors:
            raise UserError(f"{where}: missing tensor {name!r}, beside {', '.join(tensors)}.")
        half = config["rotary_dimensions"] // 2
        if tensors[name].shape != (half,) or tensors[name].refusal is not None:
            raise UserError(
                f"{where}: tensor {name!r} of shape {list(tensors[name].shape)} should have {half} numbers."
            )
        values = tensors[name].read(slice(None), None)
        if not np.all((values > 0) & np.isfinite(values)):
            raise UserError(f"{where}: tensor {name!r} has factors that are not positive numbers.")
        found.append(tuple(float(value) for value in values))
    before = metadata.get("rope.scaling.original_context_length", config["context"])
    if type(before) is not int or before < 1:
        raise UserError(
            f"{where}: metadata rope.scaling.original_context_length={before!r} should be a number of tokens."
        )
    stretched = longrope_attention_factor(config["context"] / before, before)
    amplitude = 1.0 if FACTORS[0] in tensors else metadata.get("rope.scaling.attn_factor", stretched)
    return RopeScaling(
        "longrope",
        original_context=before,
        attention_factor=float(amplitude),
        short_factors=found[0],
        long_factors=found[1],
    )
