"""The supported families: what each field of their config.json means, and where their files keep each weight.

Sources of the facts: the configuration and modelling files of Hugging Face transformers 4.57 and 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinterp.models.families import fields as rules
from jaxinterp.models.families.fields import Rule, activation, flag, number, optional
from jaxinterp.models.families.tensors import (
    BERT_TENSORS,
    GEMMA2_TENSORS,
    GPT2_TENSORS,
    GPT_NEOX_TENSORS,
    LLAMA_TENSORS,
    OLMO2_TENSORS,
    PHI3_TENSORS,
)
from jaxinterp.models.files.weights import LeafTable


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
      architectures: values of `architectures` that have this forward pass.
      copied: field of config.json -> field of TransformerConfig.
      rules: fields that need more than copying.
      constants: fields of TransformerConfig that are the same for the whole family.
      defaults: what a field means where the file does not have it.
      required: field -> the values that this implementation computes.
      no_effect: fields of this family without an effect on inference logits, beside `families.NO_EFFECT`.
      tensors: leaf of ours -> (tensor of theirs, layout); `*` is the layer.
      prefix: what older files leave out of tensor names.
      renamed: how a tensor's name ends in older files -> in newer ones.
      buffers: a regular expression for tensors that carry no weights, or those of a head that is not computed here.
    """

    architectures: tuple[str, ...]
    copied: Mapping[str, str]
    rules: tuple[Rule, ...]
    tensors: LeafTable
    constants: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    no_effect: tuple[str, ...] = ()
    prefix: str = "model."
    renamed: Mapping[str, str] = field(default_factory=dict)
    buffers: str = r".*\.rotary_emb\.inv_freq"


LLAMA_COPIED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "layers",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "context",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
}
LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False}
HEADS = Rule(("num_attention_heads", "num_key_value_heads", "head_dim"), rules.heads)
ROTARY = Rule(("rope_theta", "rope_scaling", "rope_parameters"), rules.rotary)
QWEN_WINDOWS = Rule(
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), rules.window_in_upper_layers
)
QWEN_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA_SCALE = Rule(("hidden_size",), lambda fields: {"embedding_scale": number(fields, "hidden_size") ** 0.5})
PADDING = Rule(("pad_token_id",), rules.padding)
PHI3_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
ALL_BIASES = {"norm_bias": True, "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
ATTENTION_BIAS = flag("attention_bias", "qkv_bias", "attention_out_bias")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        copied={
            "vocab_size": "vocab_size",
            "n_embd": "d_model",
            "n_layer": "layers",
            "n_positions": "context",
            "layer_norm_epsilon": "norm_epsilon",
            "tie_word_embeddings": "tied",
        },
        rules=(
            activation("activation_function"),
            Rule(
                ("n_head",),
                lambda fields: rules.heads(
                    {"num_attention_heads": number(fields, "n_head"), "hidden_size": number(fields, "n_embd")}
                ),
            ),
            Rule(
                ("n_inner",),
                lambda fields: {
                    "d_mlp": 4 * number(fields, "n_embd") if fields["n_inner"] is None else number(fields, "n_inner")
                },
            ),
        ),
        constants=ALL_BIASES | {"gated": False, "norm": "layer", "learned_positions": True},
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
        | {"tie_word_embeddings": True},
        required={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
        no_effect=(
            *("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_type"),
            *("summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
        ),
        tensors=GPT2_TENSORS,
        prefix="transformer.",
        buffers=r".*\.attn\.(bias|masked_bias)",
    ),
    "gpt_neox": Family(
        architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
        copied={name: ours for name, ours in LLAMA_COPIED.items() if name != "rms_norm_eps"}
        | {"layer_norm_eps": "norm_epsilon"},
        rules=(
            activation("hidden_act"),
            Rule(("num_attention_heads",), rules.heads),
            Rule((*ROTARY.reads, "rotary_emb_base", "rotary_pct", "partial_rotary_factor"), rules.partial_rotary(0.25)),
            flag("use_parallel_residual", "parallel"),
            ATTENTION_BIAS,
        ),
        constants={"gated": False, "norm": "layer", "norm_bias": True, "mlp_bias": True},
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        no_effect=("hidden_dropout", "classifier_dropout"),
        tensors=GPT_NEOX_TENSORS,
        prefix="gpt_neox.",
        renamed={"embed_out.weight": "lm_head.weight"},
        buffers=r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
    "llama": Family(
        architectures=("LlamaForCausalLM", "LlamaModel"),
        copied=LLAMA_COPIED,
        rules=(HEADS, ROTARY, activation("hidden_act"), ATTENTION_BIAS, flag("mlp_bias", "mlp_bias")),
        defaults=LLAMA_DEFAULTS | {"mlp_bias": False},
        tensors=LLAMA_TENSORS,
    ),
    "mistral": Family(
        architectures=("MistralForCausalLM", "MistralModel"),
        copied=LLAMA_COPIED,
        rules=(HEADS, ROTARY, activation("hidden_act"), Rule(("sliding_window",), rules.window_everywhere)),
        defaults=LLAMA_DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
        tensors=LLAMA_TENSORS,
    ),
    "qwen2": Family(
        architectures=("Qwen2ForCausalLM", "Qwen2Model"),
        copied=LLAMA_COPIED,
        rules=(HEADS, ROTARY, activation("hidden_act"), QWEN_WINDOWS),
        constants={"qkv_bias": True},
        defaults=QWEN_DEFAULTS,
        tensors=LLAMA_TENSORS,
    ),
    "qwen3": Family(
        architectures=("Qwen3ForCausalLM", "Qwen3Model"),
        copied=LLAMA_COPIED,
        rules=(HEADS, ROTARY, activation("hidden_act"), QWEN_WINDOWS, ATTENTION_BIAS),
        constants={"query_key_norm": True},
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
        tensors=LLAMA_TENSORS,
    ),
    "gemma": Family(
        architectures=("GemmaForCausalLM", "GemmaModel"),
        copied=LLAMA_COPIED,
        rules=(HEADS, ROTARY, GEMMA_SCALE, ATTENTION_BIAS),
        constants={"norm_offset": 1.0, "activation": "gelu_tanh"},
        defaults=GEMMA_DEFAULTS | {"num_key_value_heads": 16},
        # Early files say "gelu" and mean the tanh approximation.
        required={
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),
            "hidden_activation": ("gelu_pytorch_tanh", None),
        },
        tensors=LLAMA_TENSORS,
    ),
    "gemma2": Family(
        architectures=("Gemma2ForCausalLM", "Gemma2Model"),
        copied=LLAMA_COPIED,
        rules=(
            HEADS,
            ROTARY,
            GEMMA_SCALE,
            ATTENTION_BIAS,
            activation("hidden_activation"),
            Rule(("sliding_window", "layer_types"), rules.window_in_every_other_layer),
            optional("query_pre_attn_scalar", "attention_scale", lambda scalar: scalar**-0.5),
            optional("attn_logit_softcapping", "attention_cap"),
            optional("final_logit_softcapping", "logit_cap"),
        ),
        constants={"norm_offset": 1.0, "post_norms": True},
        defaults=GEMMA_DEFAULTS
        | {
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        no_effect=("hidden_act",),  # hidden_activation decides
        tensors=GEMMA2_TENSORS,
    ),
    "gemma3_text": Family(
        architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
        copied=LLAMA_COPIED,
        rules=(
            HEADS,
            Rule((*ROTARY.reads, "rope_local_base_freq"), rules.rotary_by_layer_type),
            GEMMA_SCALE,
            ATTENTION_BIAS,
            activation("hidden_activation"),
            Rule(
                ("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern"),
                rules.window_in_all_but_every_nth_layer,
            ),
            optional("query_pre_attn_scalar", "attention_scale", lambda scalar: scalar**-0.5),
            optional("final_logit_softcapping", "logit_cap"),
        ),
        constants={"norm_offset": 1.0, "post_norms": True, "query_key_norm": True},
        defaults=GEMMA_DEFAULTS
        | {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
        },
        # transformers has the field, but no code that would apply it.
        required={"attn_logit_softcapping": (None,)},
        tensors=GEMMA2_TENSORS,
    ),
    "olmo2": Family(
        architectures=("Olmo2ForCausalLM", "Olmo2Model"),
        copied=LLAMA_COPIED,
        rules=(HEADS, ROTARY, activation("hidden_act"), ATTENTION_BIAS),
        constants={"pre_norms": False, "post_norms": True, "query_key_norm": True, "query_key_norm_over": "projection"},
        defaults=LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5},
        tensors=OLMO2_TENSORS,
    ),
    "phi3": Family(
        architectures=("Phi3ForCausalLM", "Phi3Model"),
        copied=LLAMA_COPIED,
        rules=(
            HEADS,
            # "longrope" (the 128k models), which older files call "su", is refused by name.
            Rule((*ROTARY.reads, "partial_rotary_factor"), rules.partial_rotary(1.0)),
            activation("hidden_act"),
            Rule(("sliding_window",), rules.window_everywhere),
        ),
        defaults=LLAMA_DEFAULTS | {"rms_norm_eps": 1e-5, "sliding_window": None},
        # The first files name the code that has become transformers' own.
        required={"attention_bias": (False,), "auto_map": (None, PHI3_CODE)},
        # The context before stretching, which is for longrope alone.
        no_effect=("resid_pdrop", "embd_pdrop", "original_max_position_embeddings"),
        tensors=PHI3_TENSORS,
    ),
    "bert": Family(
        architectures=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
        copied={name: ours for name, ours in LLAMA_COPIED.items() if ours not in ("norm_epsilon", "tied")}
        | {"layer_norm_eps": "norm_epsilon", "type_vocab_size": "token_types"},
        rules=(Rule(("num_attention_heads",), rules.heads), activation("hidden_act"), PADDING),
        constants=ALL_BIASES
        | {"norm": "layer", "pre_norms": False, "sum_norms": True, "embedding_norm": True, "learned_positions": True}
        | {"gated": False, "causal": False, "tied": False, "head": False},
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2, "pad_token_id": 0},
        required={"is_decoder": (False,), "position_embedding_type": ("absolute",)},
        no_effect=(
            *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "directionality"),
            *("pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head"),
            "pooler_type",
        ),
        tensors=BERT_TENSORS,
        prefix="bert.",
        renamed={".gamma": ".weight", ".beta": ".bias"},
        buffers=r"bert\.embeddings\.position_ids|bert\.pooler\..*|cls\..*",
    ),
}
