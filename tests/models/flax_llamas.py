"""A small Llama written in Flax, twice, as its users write them, and our own model's weights put into it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from jaxinterp.core.trees import fill_leaves, named_leaves
from jaxinterp.models.files.weights import skeleton
from jaxinterp.models.rotary import rotary_frequencies, rotate
from jaxinterp.models.transformer import Transformer, TransformerConfig

CONFIG = TransformerConfig(
    vocab_size=50,
    d_model=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    d_mlp=48,
    context=64,
    rotary_dimensions=8,
    tied=False,
)


def filled(config: TransformerConfig) -> Transformer:
    """Our own model with random weights, norms not all one."""
    rng = np.random.default_rng(1)
    leaves = {
        name: rng.normal(1.0 if leaf.ndim == 1 else 0.0, 0.2 if leaf.ndim == 1 else leaf.shape[0] ** -0.5, leaf.shape)
        for name, leaf in named_leaves(skeleton(config)).items()
    }
    leaves["embedding/token"] = rng.normal(size=(config.vocab_size, config.d_model))
    return fill_leaves(skeleton(config), {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()})


def own_llama() -> Transformer:
    """The model whose weights the Flax models get."""
    return filled(CONFIG)


def attend(query, key, value):
    """Causal attention of [batch, seq, heads, head_dim], fewer heads for keys and values."""
    frequencies = rotary_frequencies(CONFIG.rotary_dimensions, CONFIG.rotary_base, None)
    out = jax.nn.dot_product_attention(rotate(query, frequencies), rotate(key, frequencies), value, is_causal=True)
    return out.reshape(*out.shape[:2], -1)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.silu(nn.Dense(CONFIG.d_mlp, use_bias=False, name="gate_proj")(x))
        hidden = hidden * nn.Dense(CONFIG.d_mlp, use_bias=False, name="up_proj")(x)
        return nn.Dense(CONFIG.d_model, use_bias=False, name="down_proj")(hidden)


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        def project(name, heads):
            return nn.DenseGeneral((heads, CONFIG.head_dim), use_bias=False, name=name)(x)

        heads = attend(project("q", CONFIG.heads), project("k", CONFIG.kv_heads), project("v", CONFIG.kv_heads))
        return nn.Dense(CONFIG.d_model, use_bias=False, name="o")(heads)


class LinenBlock(nn.Module):
    def setup(self):
        self.norm_1, self.norm_2 = nn.RMSNorm(epsilon=1e-5), nn.RMSNorm(epsilon=1e-5)
        self.attention, self.mlp = LinenAttention(), LinenMLP()

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x)), None


class LinenLlama(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(CONFIG.vocab_size, CONFIG.d_model, name="embed")(tokens)
        for index in range(CONFIG.layers):
            x, _ = LinenBlock(name=f"layer_{index}")(x)
        x = nn.RMSNorm(epsilon=1e-5, name="norm")(x)
        return nn.Dense(CONFIG.vocab_size, use_bias=False, name="head")(x)


ZEROS = nnx.initializers.zeros_init()
PLAIN = {"use_bias": False, "kernel_init": ZEROS}  # real weights are put in; none need be drawn


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        def linear(d_in, d_out):
            return nnx.Linear(d_in, d_out, **PLAIN, rngs=rngs)

        self.gate_proj, self.up_proj = linear(CONFIG.d_model, CONFIG.d_mlp), linear(CONFIG.d_model, CONFIG.d_mlp)
        self.down_proj = linear(CONFIG.d_mlp, CONFIG.d_model)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x)))


class NNXAttention(nnx.Module):
    def __init__(self, rngs):
        def project(heads):
            return nnx.LinearGeneral(CONFIG.d_model, (heads, CONFIG.head_dim), **PLAIN, rngs=rngs)

        self.q, self.k, self.v = project(CONFIG.heads), project(CONFIG.kv_heads), project(CONFIG.kv_heads)
        self.o = nnx.Linear(CONFIG.heads * CONFIG.head_dim, CONFIG.d_model, **PLAIN, rngs=rngs)

    def __call__(self, x):
        return self.o(attend(self.q(x), self.k(x), self.v(x)))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm_1 = nnx.RMSNorm(CONFIG.d_model, epsilon=1e-5, rngs=rngs)
        self.norm_2 = nnx.RMSNorm(CONFIG.d_model, epsilon=1e-5, rngs=rngs)
        self.attention, self.mlp = NNXAttention(rngs), NNXMLP(rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class NNXLlama(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(CONFIG.vocab_size, CONFIG.d_model, embedding_init=ZEROS, rngs=rngs)
        self.layers = nnx.List([NNXBlock(rngs) for _ in range(CONFIG.layers)])
        self.norm = nnx.RMSNorm(CONFIG.d_model, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(CONFIG.d_model, CONFIG.vocab_size, **PLAIN, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def _block_arrays(block):
    attn, mlp = block.attn, block.mlp

    def heads(linear):
        return {"kernel": linear.weight.reshape(CONFIG.d_model, -1, CONFIG.head_dim)}

    return {
        "norm_1": {"scale": block.attn_norm.weight},
        "attention": {
            "q": heads(attn.q_proj), "k": heads(attn.k_proj), "v": heads(attn.v_proj),
            "o": {"kernel": attn.o_proj.weight},
        },
        "norm_2": {"scale": block.mlp_norm.weight},
        "mlp": {
            "gate_proj": {"kernel": mlp.gate_proj.weight},
            "up_proj": {"kernel": mlp.up_proj.weight},
            "down_proj": {"kernel": mlp.down_proj.weight},
        },
    }  # fmt: skip


def _arrays(model, layers):
    return {
        "embed": {"embedding": model.embedding.token},
        **layers,
        "norm": {"scale": model.final_norm.weight},
        "head": {"kernel": model.unembedding.weight},
    }


def linen_params(model: Transformer) -> dict:
    """The parameters of `LinenLlama` with our model's weights."""
    return _arrays(model, {f"layer_{i}": _block_arrays(block) for i, block in enumerate(model.blocks)})


def nnx_llama(model: Transformer) -> NNXLlama:
    """`NNXLlama` with our model's weights, in training mode, as a new model is."""
    arrays = _arrays(model, {"layers": {i: _block_arrays(block) for i, block in enumerate(model.blocks)}})
    llama = NNXLlama(nnx.Rngs(0))
    state = nnx.state(llama, nnx.Param)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(arrays)
    nnx.replace_by_pure_dict(state, arrays)
    nnx.update(llama, state)
    return llama


def random_tokens(seed: int = 0, shape: tuple[int, int] = (2, 12)):
    return jnp.asarray(np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape, np.int32))
