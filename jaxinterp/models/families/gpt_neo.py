"""GPT-Neo: GPT-2's shape with windows in some layers and attention scores that are not scaled."""

from jaxtyping import PyTree

from jaxinterp.models.families.base import SUMMARY, Family, mlp_width
from jaxinterp.models.families.fields import Fields, Rule, activation, heads, number, refused
from jaxinterp.models.families.tensors import block, linear
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED


def _windows(fields: Fields) -> dict[str, PyTree]:
    """`attention_types`: [[["global", "local"], 12]] repeats the kinds twelve times."""
    layers = number(fields, "num_layers")
    try:
        kinds = [
            kind for group, times in fields["attention_types"] for _ in range(min(times, layers)) for kind in group
        ]
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != layers or set(kinds) - {"global", "local"}:
        raise refused("attention_types", fields["attention_types"], f"global or local for each of {layers} layers")
    size = number(fields, "window_size")
    windows = tuple(size if kind == "local" else None for kind in kinds)
    return {"windows": windows if "local" in kinds else ()}


GPT_NEO = Family(
    architectures=("GPTNeoForCausalLM", "GPTNeoModel"),
    copied={"vocab_size": "vocab_size", "hidden_size": "d_model", "num_layers": "layers"}
    | {"max_position_embeddings": "context", "layer_norm_epsilon": "norm_epsilon", "tie_word_embeddings": "tied"},
    rules=(
        *(activation("activation_function"), mlp_width("intermediate_size", "hidden_size")),
        Rule(("num_heads",), lambda fields: heads({**fields, "num_attention_heads": number(fields, "num_heads")})),
        Rule(("attention_types", "window_size"), _windows),
    ),
    constants={"norm": "layer", "norm_bias": True, "mlp_bias": True, "attention_out_bias": True, "gated": False}
    | {"learned_positions": True, "attention_scale": 1.0},
    defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "intermediate_size": None}
    | {"tie_word_embeddings": True, "window_size": 256, "attention_types": [[["global", "local"], 12]]},
    no_effect=(*SUMMARY, "resid_dropout", "embed_dropout", "attention_layers"),
    tensors={
        "embedding/token": ("transformer.wte.weight", PLAIN),
        "embedding/position": ("transformer.wpe.weight", PLAIN),
        **linear("unembedding", "lm_head"),
        **linear("final_norm", "transformer.ln_f", PLAIN),
        **block(
            {
                "attn_norm": ("ln_1", PLAIN),
                "mlp_norm": ("ln_2", PLAIN),
                "attn/q_proj": ("attn.attention.q_proj", TRANSPOSED),
                "attn/k_proj": ("attn.attention.k_proj", TRANSPOSED),
                "attn/v_proj": ("attn.attention.v_proj", TRANSPOSED),
                "attn/o_proj": ("attn.attention.out_proj", TRANSPOSED),
                "mlp/up_proj": ("mlp.c_fc", TRANSPOSED),
                "mlp/down_proj": ("mlp.c_proj", TRANSPOSED),
            },
            "transformer.h",
        ),
    },
    prefix="transformer.",
    buffers=r".*\.attn\.attention\.(bias|masked_bias)",
)
