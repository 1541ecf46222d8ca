"""Where the files of each family keep each weight: our leaf -> (tensor name, layout); `*` is the number of the layer.

PyTorch's linear layers are stored `(d_out, d_in)` and so TRANSPOSED; GPT-2 uses a `Conv1D` stored `(d_in, d_out)`. A
table lists every leaf that the family can have; the configuration says which ones a model does have. GPT-2 and Phi-3
keep several linear maps in one tensor, one after the other.
"""

import dataclasses
from collections.abc import Mapping

from jaxinterp.models.files.weights import PLAIN, TRANSPOSED, Layout, LeafTable


def linear(ours: str, theirs: str, layout: Layout = TRANSPOSED) -> LeafTable:
    """Weight and bias of a linear map or a norm."""
    bias = dataclasses.replace(layout, transposed=False)
    return {f"{ours}/weight": (f"{theirs}.weight", layout), f"{ours}/bias": (f"{theirs}.bias", bias)}


def block(entries: Mapping[str, tuple[str, Layout]], theirs: str) -> LeafTable:
    """Weights and biases of one block's parts: ours -> (theirs, layout)."""
    table: dict[str, tuple[str, Layout]] = {}
    for ours, (name, layout) in entries.items():
        table |= linear(f"blocks/*/{ours}", f"{theirs}.*.{name}", layout)
    return table


def stacked(sublayer: str, maps: tuple[str, ...], name: str, layout: Layout) -> dict[str, tuple[str, Layout]]:
    """Linear maps of one sublayer that are kept in one tensor."""
    return {
        f"{sublayer}/{ours}": (name, dataclasses.replace(layout, order="stacked", part=part, stack=maps))
        for part, ours in enumerate(maps)
    }


QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")

LLAMA_TENSORS: LeafTable = {
    "embedding/token": ("model.embed_tokens.weight", PLAIN),
    **linear("unembedding", "lm_head"),
    **linear("final_norm", "model.norm", PLAIN),
    **block(
        {
            "attn_norm": ("input_layernorm", PLAIN),
            "attn/q_proj": ("self_attn.q_proj", TRANSPOSED),
            "attn/k_proj": ("self_attn.k_proj", TRANSPOSED),
            "attn/v_proj": ("self_attn.v_proj", TRANSPOSED),
            "attn/o_proj": ("self_attn.o_proj", TRANSPOSED),
            "attn/query_norm": ("self_attn.q_norm", PLAIN),
            "attn/key_norm": ("self_attn.k_norm", PLAIN),
            "mlp_norm": ("post_attention_layernorm", PLAIN),
            "mlp/gate_proj": ("mlp.gate_proj", TRANSPOSED),
            "mlp/up_proj": ("mlp.up_proj", TRANSPOSED),
            "mlp/down_proj": ("mlp.down_proj", TRANSPOSED),
        },
        "model.layers",
    ),
}

GEMMA2_TENSORS: LeafTable = {
    **LLAMA_TENSORS,
    **block(
        {
            "attn_post_norm": ("post_attention_layernorm", PLAIN),
            "mlp_norm": ("pre_feedforward_layernorm", PLAIN),
            "mlp_post_norm": ("post_feedforward_layernorm", PLAIN),
        },
        "model.layers",
    ),
}

OLMO2_TENSORS: LeafTable = {
    **LLAMA_TENSORS,
    **block(
        {
            "attn_post_norm": ("post_attention_layernorm", PLAIN),
            "mlp_post_norm": ("post_feedforward_layernorm", PLAIN),
        },
        "model.layers",
    ),
}

PHI3_TENSORS: LeafTable = {
    **LLAMA_TENSORS,
    **block(
        {
            **stacked("attn", QUERY_KEY_VALUE, "self_attn.qkv_proj", TRANSPOSED),
            **stacked("mlp", ("gate_proj", "up_proj"), "mlp.gate_up_proj", TRANSPOSED),
        },
        "model.layers",
    ),
}

GPT2_TENSORS: LeafTable = {
    "embedding/token": ("transformer.wte.weight", PLAIN),
    "embedding/position": ("transformer.wpe.weight", PLAIN),
    **linear("unembedding", "lm_head"),
    **linear("final_norm", "transformer.ln_f", PLAIN),
    **block(
        {
            "attn_norm": ("ln_1", PLAIN),
            **stacked("attn", QUERY_KEY_VALUE, "attn.c_attn", PLAIN),
            "attn/o_proj": ("attn.c_proj", PLAIN),
            "mlp_norm": ("ln_2", PLAIN),
            "mlp/up_proj": ("mlp.c_fc", PLAIN),
            "mlp/down_proj": ("mlp.c_proj", PLAIN),
        },
        "transformer.h",
    ),
}

GPT_NEOX_TENSORS: LeafTable = {
    "embedding/token": ("gpt_neox.embed_in.weight", PLAIN),
    **linear("unembedding", "lm_head"),
    **linear("final_norm", "gpt_neox.final_layer_norm", PLAIN),
    **block(
        {
            "attn_norm": ("input_layernorm", PLAIN),
            "attn/q_proj": ("attention.query_key_value", Layout(transposed=True, order="interleaved", part=0)),
            "attn/k_proj": ("attention.query_key_value", Layout(transposed=True, order="interleaved", part=1)),
            "attn/v_proj": ("attention.query_key_value", Layout(transposed=True, order="interleaved", part=2)),
            "attn/o_proj": ("attention.dense", TRANSPOSED),
            "mlp_norm": ("post_attention_layernorm", PLAIN),
            "mlp/up_proj": ("mlp.dense_h_to_4h", TRANSPOSED),
            "mlp/down_proj": ("mlp.dense_4h_to_h", TRANSPOSED),
        },
        "gpt_neox.layers",
    ),
}

BERT_TENSORS: LeafTable = {
    "embedding/token": ("bert.embeddings.word_embeddings.weight", PLAIN),
    "embedding/position": ("bert.embeddings.position_embeddings.weight", PLAIN),
    "embedding/token_type": ("bert.embeddings.token_type_embeddings.weight", PLAIN),
    **linear("embedding/norm", "bert.embeddings.LayerNorm", PLAIN),
    **block(
        {
            "attn/q_proj": ("attention.self.query", TRANSPOSED),
            "attn/k_proj": ("attention.self.key", TRANSPOSED),
            "attn/v_proj": ("attention.self.value", TRANSPOSED),
            "attn/o_proj": ("attention.output.dense", TRANSPOSED),
            "attn_sum_norm": ("attention.output.LayerNorm", PLAIN),
            "mlp/up_proj": ("intermediate.dense", TRANSPOSED),
            "mlp/down_proj": ("output.dense", TRANSPOSED),
            "mlp_sum_norm": ("output.LayerNorm", PLAIN),
        },
        "bert.encoder.layer",
    ),
}
