"""One decoder-only transformer, configured: GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma and their kin.

The model is a pytree of arrays. Blocks are unrolled (a tuple, not a scanned stack), so that every layer has a name of
its own and a layer that nobody asks for vanishes from the compiled program.

    resid/pre -> attn_norm -> attn -> (attn_post_norm) -> + -> resid/mid -> mlp_norm -> mlp -> (mlp_post_norm) -> +
    parallel blocks: both sublayers read resid/pre, and there is no resid/mid
"""

from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.errors import UserError
from jaxinterp.models.attention import Attention
from jaxinterp.models.layers import Linear, Norm, RopeScaling, Tap, no_tap, random_linear, soft_cap, under
from jaxinterp.models.mlp import MLP, MLPLeaf
from jaxinterp.models.rules import EXACT, Activation, Rules

RESIDUAL = "residual stream behind a block"
"""What a rematerialised backward pass keeps (`jax.checkpoint_policies.save_only_these_names`)."""


@dataclass(frozen=True)
class TransformerConfig:
    """Everything about a transformer but its weights."""

    vocab_size: int
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    d_mlp: int
    context: int  # the longest sequence the model was made for, in tokens
    activation: Activation = "silu"
    gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0
    norm_bias: bool = False
    post_norms: bool = False
    parallel: bool = False
    learned_positions: bool = False
    rotary_dimensions: int = 0  # of each head; 0 where positions are learned
    rotary_base: float = 10_000.0
    rotary_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()  # one entry a layer; empty: no windows
    attention_scale: float | None = None  # default: head_dim^-1/2
    attention_cap: float | None = None
    logit_cap: float | None = None
    query_key_norm: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    tied: bool = True

    def __post_init__(self) -> None:
        """Raises UserError where two fields contradict each other."""
        if self.heads % self.kv_heads:
            raise UserError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}.")
        if self.windows and len(self.windows) != self.layers:
            raise UserError(f"windows has {len(self.windows)} entries for layers={self.layers}: give one a layer.")
        if self.rotary_dimensions % 2 or self.rotary_dimensions > self.head_dim:
            raise UserError(
                f"rotary_dimensions={self.rotary_dimensions} must be even and at most head_dim={self.head_dim}."
            )


class Embedding(eqx.Module):
    """Token vectors, times a scale, plus learned positions where the model has them."""

    token: Float[Array, "vocab d_model"]
    position: Float[Array, "context d_model"] | None
    scale: float = eqx.field(static=True)

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq d_model"]:
        x = self.token[tokens]
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        return x if self.position is None else x + self.position[: tokens.shape[1]]


class Block(eqx.Module):
    """One transformer block. `mlp` and `attn` are leaves: any callable pytree that keeps the shape may stand there."""

    attn_norm: Norm
    attn: Any
    attn_post_norm: Norm | None
    mlp_norm: Norm
    mlp: Any
    mlp_post_norm: Norm | None
    parallel: bool = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "batch seq d_model"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "batch seq d_model"]:
        x = tap("resid/pre", x)
        attn_in = tap("attn/in", self.attn_norm(x, rules))
        if isinstance(self.attn, Attention):
            attn_out = self.attn(attn_in, tap=under(tap, "attn"), rules=rules)
        else:
            attn_out = self.attn(attn_in)
        attn_out = tap("attn/out", attn_out)
        attn_added = attn_out if self.attn_post_norm is None else self.attn_post_norm(attn_out, rules)
        middle = x if self.parallel else tap("resid/mid", x + attn_added)

        mlp_in = tap("mlp/in", self.mlp_norm(middle, rules))
        if isinstance(self.mlp, MLPLeaf):
            mlp_out = self.mlp(mlp_in, tap=under(tap, "mlp"), rules=rules)
        else:
            mlp_out = self.mlp(mlp_in)
        mlp_out = tap("mlp/out", mlp_out)
        mlp_added = mlp_out if self.mlp_post_norm is None else self.mlp_post_norm(mlp_out, rules)
        mlp_added = tap("mlp/added", mlp_added)
        return tap("resid/post", checkpoint_name((x + attn_added if self.parallel else middle) + mlp_added, RESIDUAL))


class Transformer(eqx.Module):
    """A decoder-only language model: tokens -> logits, every array on the way offered to `tap` by name."""

    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm
    unembedding: Linear | None  # None: tied to the embedding
    config: TransformerConfig = eqx.field(static=True)

    def __call__(
        self, tokens: Int[Array, "batch seq"], *, tap: Tap = no_tap, rules: Rules = EXACT
    ) -> Float[Array, "batch seq vocab"]:
        if self.config.learned_positions and tokens.shape[1] > self.config.context:
            raise UserError(f"{tokens.shape[1]} positions, but the model learned only {self.config.context}.")
        x = tap("embed", self.embedding(tokens))
        for index, block in enumerate(self.blocks):
            x = block(x, tap=under(tap, f"blocks/{index}"), rules=rules)
        final = tap("final", self.final_norm(x, rules))
        return self.unembed(final)

    def unembed(self, final: Float[Array, "*axes d_model"]) -> Float[Array, "*axes vocab"]:
        """Logits of what the final norm returned."""
        weight = self.embedding.token.T if self.unembedding is None else self.unembedding.weight
        logits = jnp.matmul(final, weight, preferred_element_type=jnp.float32)
        if self.unembedding is not None and self.unembedding.bias is not None:
            logits = logits + self.unembedding.bias
        return soft_cap(logits, self.config.logit_cap)


def initialise(config: TransformerConfig, key: PRNGKeyArray) -> Transformer:
    """A transformer with random weights: the shape that loaders fill, and a model to test on."""
    keys = iter(jax.random.split(key, 3 + 8 * config.layers))

    def norm(size: int = config.d_model) -> Norm:
        bias = jnp.zeros(size) if config.norm_bias else None
        return Norm(jnp.ones(size) - config.norm_offset, bias, config.norm, config.norm_epsilon, config.norm_offset)

    def head_norm() -> Norm | None:
        if not config.query_key_norm:
            return None
        return Norm(jnp.ones(config.head_dim), None, "rms", config.norm_epsilon, config.norm_offset)

    def attention(layer: int) -> Attention:
        d_model, inner, kv = config.d_model, config.heads * config.head_dim, config.kv_heads * config.head_dim
        return Attention(
            query=random_linear(next(keys), d_model, inner, config.qkv_bias),
            key=random_linear(next(keys), d_model, kv, config.qkv_bias),
            value=random_linear(next(keys), d_model, kv, config.qkv_bias),
            out=random_linear(next(keys), inner, d_model, config.attention_out_bias),
            query_norm=head_norm(),
            key_norm=head_norm(),
            heads=config.heads,
            kv_heads=config.kv_heads,
            scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
            window=config.windows[layer] if config.windows else None,
            cap=config.attention_cap,
            rotary_dimensions=config.rotary_dimensions,
            rotary_base=config.rotary_base,
            rotary_scaling=config.rotary_scaling,
        )

    def mlp() -> MLP:
        d_model, d_mlp, bias = config.d_model, config.d_mlp, config.mlp_bias
        gate = random_linear(next(keys), d_model, d_mlp, bias) if config.gated else None
        up = random_linear(next(keys), d_model, d_mlp, bias)
        return MLP(gate, up, random_linear(next(keys), d_mlp, d_model, bias), config.activation)

    def block(layer: int) -> Block:
        return Block(
            attn_norm=norm(),
            attn=attention(layer),
            attn_post_norm=norm() if config.post_norms else None,
            mlp_norm=norm(),
            mlp=mlp(),
            mlp_post_norm=norm() if config.post_norms else None,
            parallel=config.parallel,
        )

    position = None
    if config.learned_positions:
        position = 0.1 * jax.random.normal(next(keys), (config.context, config.d_model))
    return Transformer(
        embedding=Embedding(
            jax.random.normal(next(keys), (config.vocab_size, config.d_model)), position, config.embedding_scale
        ),
        blocks=tuple(block(layer) for layer in range(config.layers)),
        final_norm=norm(),
        unembedding=None if config.tied else random_linear(next(keys), config.d_model, config.vocab_size, False),
        config=config,
    )
