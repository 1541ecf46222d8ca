"""The supported families: what each field of their config.json means, and where their files keep each weight.

Every family is a table. A field is copied, read by a rule, required to have a certain value, or known to have no effect
on inference logits; any other field is refused by name. A weight is found under the name that the table gives for
our leaf; any other tensor in a file is refused by name, too.

Sources of the facts: the configuration and modelling files of Hugging Face transformers 4.57 and 5.23.
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxinterp.errors import UserError, suggest
from jaxinterp.models import family_fields as rules
from jaxinterp.models.family_fields import Rule, activation, flag, number, optional, refused
from jaxinterp.models.family_tensors import GEMMA2_TENSORS, GPT2_TENSORS, GPT_NEOX_TENSORS, LLAMA_TENSORS
from jaxinterp.models.transformer import TransformerConfig
from jaxinterp.models.weights import LeafTable, StoredTensor


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
      no_effect: fields of this family without an effect on inference logits, beside `NO_EFFECT`.
      tensors: leaf of ours -> (tensor of theirs, layout); `*` is the layer.
      prefix: what older files leave out of tensor names.
      renamed: older tensor name -> newer.
      buffers: a regular expression for tensors that carry no weights.
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


NO_EFFECT = {
    name
    for group in (
        # bookkeeping
        "architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash",
        "tokenizer_class task_specific_params id2label label2id num_labels problem_type finetuning_task prefix",
        # training
        "initializer_range attention_dropout gradient_checkpointing",
        # how it is computed, not what
        "use_cache cache_implementation attn_implementation _attn_implementation _attn_implementation_autoset",
        "pretraining_tp chunk_size_feed_forward torchscript use_bfloat16 tf_legacy_loss return_dict use_return_dict",
        "output_attentions output_hidden_states",
        # special tokens and generation
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length min_length do_sample",
        "early_stopping num_beams temperature top_k top_p typical_p repetition_penalty length_penalty bad_words_ids",
        "no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences output_scores num_beam_groups",
        "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens",
        "exponential_decay_length_penalty begin_suppress_tokens diversity_penalty",
    )
    for name in group.split()
}
"""Fields that any config.json may have and that leave inference logits as they are."""

REQUIRED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "auto_map": (None,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "tie_encoder_decoder": (False,),
    "tie_word_embeddings": (False, True),
    "use_bidirectional_attention": (None, False),
}
"""Fields that any config.json may have, and the values that are computed here."""


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
        constants={
            "gated": False,
            "norm": "layer",
            "norm_bias": True,
            "learned_positions": True,
            "qkv_bias": True,
            "attention_out_bias": True,
            "mlp_bias": True,
        },
        defaults={
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "n_inner": None,
            "tie_word_embeddings": True,
        },
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
            Rule((*ROTARY.reads, "rotary_emb_base", "rotary_pct", "partial_rotary_factor"), rules.partial_rotary),
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
}

MOST_LAYERS = 10_000
"""More than any model has: a damaged file must not make lists of every layer's window that fill the memory."""


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family that a config.json names in `model_type` and `architectures`.

    Raises:
      UserError: it is not supported.
    """
    name = fields.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"model_type={name!r} is not supported; supported: {', '.join(FAMILIES)}.{suggest(str(name), FAMILIES)}"
        )
    family = FAMILIES[name]
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list):
        raise refused("architectures", architectures, "a list of names")
    for architecture in architectures:
        if architecture not in family.architectures:
            raise refused("architectures", architecture, f"{', '.join(family.architectures)} for model_type {name!r}")
    return family


def family_config(family: Family, fields: Mapping[str, Any]) -> TransformerConfig:
    """The configuration that the fields of a config.json describe.

    Raises:
      UserError: a field is unknown, missing, malformed, or has a value that is not supported.
    """
    required = REQUIRED | dict(family.required)
    ruled = {name for rule in family.rules for name in rule.reads}
    known = {*family.copied, *ruled, *required, *NO_EFFECT, *family.no_effect}
    for name, value in fields.items():
        if name not in known:
            raise UserError(
                f"unknown config field {name}={value!r}: this family is supported with "
                f"{', '.join(sorted({*family.copied, *ruled, *family.required}))}; a field that changes the "
                f"computation must not be ignored.{suggest(name, known)}"
            )
        if name in required and value not in required[name]:
            raise refused(name, value, ", ".join(repr(allowed) for allowed in required[name]))
    filled = dict(family.defaults) | dict(fields)
    ours = dict(family.constants)
    for name, copy in family.copied.items():
        kind = typing.get_type_hints(TransformerConfig)[copy]
        if kind is bool:
            ours[copy] = bool(filled[name])  # one of REQUIRED's truth values
        else:
            ours[copy] = number(filled, name, kind, *([MOST_LAYERS] if copy == "layers" else []))
    for rule in family.rules:
        ours |= rule.make(filled)
    return TransformerConfig(**ours)


def canonical_names(family: Family, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under the names that the family's table uses, whichever version wrote the file.

    Raises:
      UserError: a file has the same weight under two names.
    """
    bare = not any(name.startswith(family.prefix) for name in tensors)
    named: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        newer = family.renamed.get(name, name)
        newer = family.prefix + newer if bare and not newer.startswith("lm_head.") else newer
        if newer in named:
            raise UserError(f"{tensor.file}: tensors {named[newer].name!r} and {name!r} are two names of one weight.")
        named[newer] = tensor
    return named
