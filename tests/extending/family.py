"""A tiny model family: how its config.json and its tensors are read. `load(folder, families={"toy": TOY})`."""

from jaxinterp.models.families.fields import Rule, number, refused
from jaxinterp.models.families.tables import Family
from jaxinterp.models.families.tensors import block, linear
from jaxinterp.models.files.weights import PLAIN, TRANSPOSED


def heads(fields):
    """Our heads are as wide as the file's `width` allows, and half of each is rotated."""
    count, width = number(fields, "heads"), number(fields, "width")
    if width % count:
        raise refused("heads", count, f"a divisor of width={width}")
    size = width // count
    return {"heads": count, "kv_heads": count, "head_dim": size, "rotary_dimensions": size // 2}


TOY = Family(
    architectures=("ToyModel",),
    copied={"vocabulary": "vocab_size", "width": "d_model", "depth": "layers", "neurons": "d_mlp", "window": "context"},
    rules=(Rule(("heads",), heads),),
    constants={"activation": "relu", "gated": False, "mlp_bias": True, "tied": False},
    tensors={
        "embedding/token": ("toy.embed.weight", PLAIN),
        **linear("unembedding", "toy.guess"),
        **linear("final_norm", "toy.norm", PLAIN),
        **block(
            {
                "attn_norm": ("before_attention", PLAIN),
                "attn/q_proj": ("query", TRANSPOSED),
                "attn/k_proj": ("key", TRANSPOSED),
                "attn/v_proj": ("value", TRANSPOSED),
                "attn/o_proj": ("mix", TRANSPOSED),
                "mlp_norm": ("before_mlp", PLAIN),
                "mlp/up_proj": ("expand", TRANSPOSED),
                "mlp/down_proj": ("contract", TRANSPOSED),
            },
            "toy.layer",
        ),
    },
    prefix="toy.",
)
