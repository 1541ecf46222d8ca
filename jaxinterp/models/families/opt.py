"""OPT: learned positions that begin at row 2 of the file; norms before the sublayers, or on the sums (OPT-350M)."""

from jaxtyping import PyTree

from jaxinterp.models.families.base import Family
from jaxinterp.models.families.fields import Fields, Rule, activation, flag, heads, number
from jaxinterp.models.families.tensors import block, linear
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED, Layout


def _norms(fields: Fields) -> dict[str, PyTree]:
    before = fields["do_layer_norm_before"]
    return {"pre_norms": before, "sum_norms": not before, "final_norm": not fields["_remove_final_layer_norm"]}


def _embedding(fields: Fields) -> dict[str, PyTree]:
    size = None if fields["word_embed_proj_dim"] is None else number(fields, "word_embed_proj_dim")
    return {"embedding_size": None if size == number(fields, "hidden_size") else size}


OPT = Family(
    architectures=("OPTForCausalLM", "OPTModel"),
    copied={"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "layers", "ffn_dim": "d_mlp"}
    | {"max_position_embeddings": "context", "tie_word_embeddings": "tied"},
    rules=(
        activation("activation_function"),
        Rule(("num_attention_heads",), heads),
        flag("enable_bias", "qkv_bias", "attention_out_bias", "mlp_bias"),
        Rule(("do_layer_norm_before", "_remove_final_layer_norm"), _norms),
        Rule(("word_embed_proj_dim",), _embedding),
    ),
    constants={"norm": "layer", "norm_bias": True, "norm_epsilon": 1e-5, "gated": False, "learned_positions": True},
    defaults={"activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True}
    | {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "word_embed_proj_dim": None},
    required={"layer_norm_elementwise_affine": (True,), "do_layer_norm_before": (True, False)}
    | {"_remove_final_layer_norm": (False, True)},
    no_effect=("dropout", "layerdrop", "init_std", "activation_dropout"),
    tensors={
        "embedding/token": ("model.decoder.embed_tokens.weight", PLAIN),
        "embedding/position": ("model.decoder.embed_positions.weight", Layout(skip=2)),
        **linear("embedding/projection", "model.decoder.project_in"),
        **linear("head_projection", "model.decoder.project_out"),
        **linear("unembedding", "lm_head"),
        **linear("final_norm", "model.decoder.final_layer_norm", PLAIN),
        **block(
            {
                "attn_norm": ("self_attn_layer_norm", PLAIN),
                "attn_sum_norm": ("self_attn_layer_norm", PLAIN),
                "attn/q_proj": ("self_attn.q_proj", TRANSPOSED),
                "attn/k_proj": ("self_attn.k_proj", TRANSPOSED),
                "attn/v_proj": ("self_attn.v_proj", TRANSPOSED),
                "attn/o_proj": ("self_attn.out_proj", TRANSPOSED),
                "mlp_norm": ("final_layer_norm", PLAIN),
                "mlp_sum_norm": ("final_layer_norm", PLAIN),
                "mlp/up_proj": ("fc1", TRANSPOSED),
                "mlp/down_proj": ("fc2", TRANSPOSED),
            },
            "model.decoder.layers",
        ),
    },
)
