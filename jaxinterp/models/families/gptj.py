"""GPT-J: parallel blocks with one norm, neighbours paired in the rotation, a head with a bias."""

from jaxinterp.models.families.base import GPT_COPIED, GPT_HEADS, SUMMARY, Family, mlp_width
from jaxinterp.models.families.fields import Rule, activation, number
from jaxinterp.models.families.tensors import block, linear
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED

GPTJ = Family(
    architectures=("GPTJForCausalLM", "GPTJModel"),
    copied={name: ours for name, ours in GPT_COPIED.items() if ours != "tied"},
    rules=(
        *(activation("activation_function"), GPT_HEADS, mlp_width("n_inner", "n_embd")),
        Rule(("rotary_dim",), lambda fields: {"rotary_dimensions": number(fields, "rotary_dim")}),
    ),
    constants={"norm": "layer", "norm_bias": True, "mlp_bias": True, "gated": False, "parallel": True}
    | {"rotary_interleaved": True, "head_bias": True, "tied": False},
    defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "rotary_dim": 64, "n_inner": None}
    | {"tie_word_embeddings": False},
    required={"rotary": (True,), "scale_attn_weights": (True,)},
    no_effect=SUMMARY,
    tensors={
        "embedding/token": ("transformer.wte.weight", PLAIN),
        **linear("unembedding", "lm_head"),
        **linear("final_norm", "transformer.ln_f", PLAIN),
        **block(
            {
                "attn_norm": ("ln_1", PLAIN),
                "mlp_norm": ("ln_1", PLAIN),
                "attn/q_proj": ("attn.q_proj", TRANSPOSED),
                "attn/k_proj": ("attn.k_proj", TRANSPOSED),
                "attn/v_proj": ("attn.v_proj", TRANSPOSED),
                "attn/o_proj": ("attn.out_proj", TRANSPOSED),
                "mlp/up_proj": ("mlp.fc_in", TRANSPOSED),
                "mlp/down_proj": ("mlp.fc_out", TRANSPOSED),
            },
            "transformer.h",
        ),
    },
    prefix="transformer.",
    buffers=r".*\.attn\.(bias|masked_bias|embed_positions)",
)
