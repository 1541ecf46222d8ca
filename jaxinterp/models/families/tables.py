"""The supported families: what each field of their config.json means, and where their files keep each weight.

A family that shares its tensors with no other here has a file of its own.
"""

from jaxinterp.models.families import fields as rules
from jaxinterp.models.families.base import (
    ALL_BIASES,
    ATTENTION_BIAS,
    BERT_COPIED,
    GEMMA_DEFAULTS,
    GEMMA_SCALE,
    GPT_COPIED,
    GPT_HEADS,
    HEADS,
    LLAMA_COPIED,
    LLAMA_DEFAULTS,
    QWEN_DEFAULTS,
    QWEN_WINDOWS,
    SUMMARY,
    Family,
    mlp_width,
)
from jaxinterp.models.families.cohere import COHERE
from jaxinterp.models.families.fields import Rule, activation, flag, optional
from jaxinterp.models.families.gemma4 import GEMMA4
from jaxinterp.models.families.gpt_neo import GPT_NEO
from jaxinterp.models.families.gpt_oss import GPT_OSS
from jaxinterp.models.families.gptj import GPTJ
from jaxinterp.models.families.granite import GRANITE
from jaxinterp.models.families.llama4 import LLAMA4
from jaxinterp.models.families.mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from jaxinterp.models.families.olmo3 import OLMO3
from jaxinterp.models.families.opt import OPT
from jaxinterp.models.families.phi import PHI
from jaxinterp.models.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE
from jaxinterp.models.families.rope import ROPE_FIELDS, ROTARY, partial_rotary, rotary_by_layer_type
from jaxinterp.models.families.smollm3 import SMOLLM3
from jaxinterp.models.families.stablelm import STABLELM
from jaxinterp.models.families.tensors import (
    BERT_TENSORS,
    GEMMA2_TENSORS,
    GPT2_TENSORS,
    GPT_NEOX_TENSORS,
    LLAMA_TENSORS,
    OLMO2_TENSORS,
    PHI3_TENSORS,
)

PADDING = Rule(("pad_token_id",), rules.padding)
PHI3_CODE = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        copied=GPT_COPIED,
        rules=(
            activation("activation_function"),
            GPT_HEADS,
            mlp_width("n_inner", "n_embd"),
            flag("scale_attn_by_inverse_layer_idx", "scale_by_layer"),
            Rule(
                ("scale_attn_weights",), lambda fields: {} if fields["scale_attn_weights"] else {"attention_scale": 1.0}
            ),
        ),
        constants=ALL_BIASES | {"gated": False, "norm": "layer", "learned_positions": True},
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
        | {"tie_word_embeddings": True, "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True},
        required={"scale_attn_weights": (True, False)},
        # Upcasting is a matter of precision: scores are float32 here in any case.
        no_effect=(*SUMMARY, "reorder_and_upcast_attn"),
        tensors=GPT2_TENSORS,
        prefix="transformer.",
        buffers=r".*\.attn\.(bias|masked_bias)",
    ),
    "gpt_neox": Family(
        architectures=("GPTNeoXForCausalLM", "GPTNeoXModel"),
        copied=BERT_COPIED,
        rules=(
            activation("hidden_act"),
            Rule(("num_attention_heads",), rules.heads),
            Rule((*ROPE_FIELDS, "rotary_emb_base", "rotary_pct", "partial_rotary_factor"), partial_rotary(0.25)),
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
            Rule((*ROPE_FIELDS, "rope_local_base_freq"), rotary_by_layer_type(1_000_000.0, 10_000.0)),
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
            # As in transformers, "su" and "yarn" are older names of longrope here.
            Rule(
                (*ROPE_FIELDS, "partial_rotary_factor", "original_max_position_embeddings"),
                partial_rotary(1.0, {"su": "longrope", "yarn": "longrope"}),
            ),
            activation("hidden_act"),
            Rule(("sliding_window",), rules.window_everywhere),
        ),
        defaults=LLAMA_DEFAULTS
        | {"rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 4096},
        # The first files name the code that has become transformers' own.
        required={"attention_bias": (False,), "auto_map": (None, PHI3_CODE)},
        no_effect=("resid_pdrop", "embd_pdrop"),
        tensors=PHI3_TENSORS,
    ),
    "bert": Family(
        architectures=("BertModel", "BertForMaskedLM", "BertForPreTraining"),
        copied={name: ours for name, ours in BERT_COPIED.items() if ours != "tied"}
        | {"type_vocab_size": "token_types"},
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
    "cohere": COHERE,
    "gemma4_text": GEMMA4,
    "gpt_neo": GPT_NEO,
    "gptj": GPTJ,
    "gpt_oss": GPT_OSS,
    "granite": GRANITE,
    "llama4_text": LLAMA4,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "olmo3": OLMO3,
    "opt": OPT,
    "phi": PHI,
    "smollm3": SMOLLM3,
    "stablelm": STABLELM,
}
