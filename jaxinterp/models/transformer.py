"""One transformer, configured: the decoders of `families.tables.FAMILIES`, and the encoder BERT.

The model is a pytree of arrays. Blocks are unrolled (a tuple, not a scanned stack), so that every layer has a name of
its own and a layer that nobody asks for vanishes from the compiled program.

    resid/pre -> (attn_norm) -> attn -> (attn_post_norm) -> + resid/pre -> (attn_sum_norm) -> resid/mid
    resid/mid -> (mlp_norm)  -> mlp  -> (mlp_post_norm)  -> + resid/mid -> (mlp_sum_norm)  -> resid/post

    norms on what is read (most models), on what is read and written (Gemma 2 and 3), on what is written (OLMo 2), on
    the sum (BERT)
    parallel blocks: both sublayers read resid/pre, and there is no resid/mid
    what a sublayer adds is multiplied by `residual_scale` (Granite)
    a layer may end with vectors of its own for every token, and a factor (Gemma 4, `per_layer`)

An encoder differs in fields of the configuration only: attention is not causal, padding is not looked at, and there is
no head. It predicts no token; its answers are `final` and `pooled`, the mean of `final` over the tokens that are no
padding.
"""

from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.models.attention import Attention, Temperature
from jaxinterp.models.delta_net import DeltaConfig, GatedDeltaNet, random_delta_net
from jaxinterp.models.layers import (
    Linear,
    Norm,
    Tap,
    UnitNorm,
    call_leaf,
    no_tap,
    normed,
    random_linear,
    rows_of_ids,
    soft_cap,
    under,
)
from jaxinterp.models.mixtures.config import MixtureConfig, make_mlp
from jaxinterp.models.mixtures.routed import RoutedConfig, random_routed
from jaxinterp.models.mlp import MLP
from jaxinterp.models.per_layer import PerLayer, PerLayerConfig, PerLayerInputs, random_inputs, random_per_layer
from jaxinterp.models.rotary import RopeScaling
from jaxinterp.models.rules import EXACT, Activation, Rules

RESIDUAL = "residual stream behind a block"
"""What a rematerialised backward pass keeps (`jax.checkpoint_policies.save_only_these_names`)."""


@dataclass(frozen=True)
class WholeConfig:
    """Attention of layers without a window, where it differs from that of the others."""

    head_dim: int
    kv_heads: int
    values_are_keys: bool = False


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
    pre_norms: bool = True  # on what a sublayer reads
    post_norms: bool = False  # on what a sublayer writes, before it is added
    sum_norms: bool = False  # on the sum; there is no final norm then
    final_norm: bool = True
    embedding_norm: bool = False
    parallel: bool = False
    causal: bool = True
    padding: int | None = None  # the token that no other token looks at
    token_types: int = 0  # learned vectors for the parts of an input; every token is of type 0
    learned_positions: bool = False
    rotary_dimensions: int = 0  # of each head; 0 where positions are learned
    rotary_base: float = 10_000.0
    rotary_scaling: RopeScaling | None = None
    rotary_interleaved: bool = False  # dimension 2i is paired with 2i + 1
    unrotated: tuple[int, ...] = ()  # layers without rotary positions
    local_rotary_base: float | None = None  # of layers with a window; default: as the other layers
    local_rotary_scaling: RopeScaling | None = None  # of layers with a window, where they have a base of their own
    windows: tuple[int | None, ...] = ()  # one entry a layer; empty: no windows
    chunks: tuple[int | None, ...] = ()  # likewise: attention within chunks of so many positions
    temperature: Temperature | None = None  # of queries in layers without rotary positions
    attention_scale: float | None = None  # default: head_dim^-1/2
    scale_by_layer: bool = False  # the attention scale is divided by the layer's number, counted from 1
    attention_cap: float | None = None
    attention_clip: float | None = None  # queries, keys and values are clipped to +- this
    logit_cap: float | None = None
    query_key_norm: bool = False
    query_key_norm_over: Literal["head", "projection", "each_head"] = "head"  # all heads together; each with weights
    query_key_norm_kind: Literal["rms", "layer"] = "rms"
    query_key_norm_bias: bool = False
    unit_query_key: bool = False  # divided by their root mean square behind the rotation, in layers that have one
    attention_sinks: bool = False
    attention_gate: bool = False  # z is multiplied by sigmoid(x W_gate)
    delta: DeltaConfig | None = None  # a Gated DeltaNet in attention's place, in `delta_layers`
    delta_layers: tuple[int, ...] = ()
    whole: WholeConfig | None = None
    value_norm: bool = False  # of each head, without weights
    shared_layers: int = 0  # so many last layers take keys and values from the last layer of their kind before them
    shared_width: int = 1  # their MLPs are so many times as wide
    per_layer: PerLayerConfig | None = None  # vectors of a token for every layer
    layer_scale: bool = False  # what a layer returns is multiplied by a number of its own
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    embedding_size: int | None = None  # of token vectors, where a linear map leads from them to d_model and back
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a sublayer adds
    tied: bool = True
    head: bool = True  # False: no logits, but `pooled`
    head_bias: bool = False
    logit_scale: float = 1.0
    routed: RoutedConfig | None = None  # a mixture of experts in place of the MLP, but in `dense_layers`
    dense_layers: tuple[int, ...] = ()
    mixture: MixtureConfig | None = None  # an MLP of another kind; `activation`, `gated` and `d_mlp` are not used then

    def __post_init__(self) -> None:
        """Raises UserError if two fields contradict each other."""
        if self.heads % self.kv_heads:
            raise UserError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}.")
        for name, each in (("windows", self.windows), ("chunks", self.chunks)):
            if each and len(each) != self.layers:
                raise UserError(f"{name} has {len(each)} entries for layers={self.layers}: give one a layer.")
        if self.rotary_dimensions % 2 or self.rotary_dimensions > self.head_dim:
            raise UserError(
                f"rotary_dimensions={self.rotary_dimensions} must be even and at most head_dim={self.head_dim}."
            )
        for scaling in (self.rotary_scaling, self.local_rotary_scaling):
            if scaling is not None:
                scaling.check(self.rotary_dimensions)
        if self.delta_layers and (self.delta is None or not self.causal):
            raise UserError(f"delta_layers={self.delta_layers} need delta=DeltaConfig(...) and causal=True.")
        if self.shared_layers and not {*self.kinds()} <= {*self.kinds()[: self.layers - self.shared_layers]}:
            raise UserError(
                f"shared_layers={self.shared_layers} of layers={self.layers}: no layer before has keys of their kind."
            )
        if self.head_bias and self.tied:
            raise UserError("head_bias=True needs tied=False: the embedding has no bias.")
        if self.parallel and self.sum_norms:
            raise UserError("parallel=True and sum_norms=True contradict each other: there is one sum to a block.")
        if self.windows and not self.causal:
            raise UserError("windows are for causal attention: give windows=() with causal=False.")

    def kinds(self) -> tuple[str, ...]:
        """Of every layer: "window" or "whole"."""
        windows = self.windows or (None,) * self.layers
        return tuple("whole" if window is None else "window" for window in windows)


class Embedding(eqx.Module):
    """Token vectors, times a scale; plus learned positions and the vector of token type 0, and a norm, where given.

    `projection` leads from token vectors of another size to d_model (OPT-350M).
    """

    token: Float[Array, "vocab embedding_size"]
    position: Float[Array, "context d_model"] | None
    token_type: Float[Array, "types d_model"] | None
    norm: Norm | None
    scale: float = eqx.field(static=True)
    projection: Linear | None = None

    def cuts(self) -> dict[str, int | None]:
        """Tokens are cut; positions and token types lie whole on every device."""
        projection = {} if self.projection is None else {"projection/weight": 1}
        return {"token": 0, "position": None, "token_type": None, **projection}

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        rules: Rules = EXACT,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        x = rows_of_ids(self.token, tokens)
        if self.scale != 1.0:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.projection is not None:
            x = self.projection(x)
        if self.position is not None:
            if positions is None:
                x = x + self.position[: tokens.shape[1]]
            else:  # NaN for a position that was not learned, so that it shows
                x = x + self.position.at[jnp.maximum(positions, 0)].get(mode="fill", fill_value=jnp.nan)
        if self.token_type is not None:
            x = x + self.token_type[0]
        return normed(self.norm, x, rules)


class Block(eqx.Module):
    """One transformer block. `mlp` and `attn` are leaves: any callable pytree that keeps the shape may stand there."""

    attn_norm: Norm | None
    attn: Any
    attn_post_norm: Norm | None
    attn_sum_norm: Norm | None
    mlp_norm: Norm | None
    mlp: PyTree
    mlp_post_norm: Norm | None
    mlp_sum_norm: Norm | None
    parallel: bool = eqx.field(static=True)
    residual_scale: float = eqx.field(static=True, default=1.0)
    per_layer: PerLayer | None = None
    scale: Float[Array, " one"] | None = None

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        real: Bool[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        shared: dict[str, Any] | None = None,
        vectors: Float[Array, "batch seq size"] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        x = tap("resid/pre", x)
        attn_in = tap("attn/in", normed(self.attn_norm, x, rules))
        attn_tap = under(tap, "attn")
        others = {"real": real, "positions": positions, "shared": shared}
        attn_out = call_leaf(self.attn, attn_in, tap=attn_tap, rules=rules, **others)
        attn_out = tap("attn/out", attn_out)
        attn_added = self._scaled(normed(self.attn_post_norm, attn_out, rules))
        middle = x if self.parallel else tap("resid/mid", normed(self.attn_sum_norm, x + attn_added, rules))

        mlp_in = tap("mlp/in", normed(self.mlp_norm, middle, rules))
        mlp_out = tap("mlp/out", call_leaf(self.mlp, mlp_in, tap=under(tap, "mlp"), rules=rules))
        mlp_added = tap("mlp/added", self._scaled(normed(self.mlp_post_norm, mlp_out, rules)))
        post = (x + attn_added if self.parallel else middle) + mlp_added
        post = normed(self.mlp_sum_norm, post, rules)
        if self.per_layer is not None:
            if vectors is None:
                raise UserError("this block adds vectors of its tokens' own (per_layer): run it within its model.")
            post = post + self.per_layer(post, vectors, tap=under(tap, "per_layer"), rules=rules)
        post = post if self.scale is None else post * self.scale.astype(post.dtype)
        return tap("resid/post", checkpoint_name(post, RESIDUAL))

    def _scaled(self, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        return x if self.residual_scale == 1.0 else x * jnp.asarray(self.residual_scale, x.dtype)


class Transformer(eqx.Module):
    """Tokens -> logits (None without a head), every array on the way offered to `tap` by name."""

    embedding: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    unembedding: Linear | None  # None: tied to the embedding, or no head
    config: TransformerConfig = eqx.field(static=True)
    head_projection: Linear | None = None  # from d_model to token vectors of another size
    per_layer: PerLayerInputs | None = None

    def __call__(
        self,
        tokens: Int[Array, "batch seq"],
        *,
        tap: Tap = no_tap,
        rules: Rules = EXACT,
        mask: Bool[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq vocab"] | None:
        """The logits; `mask` is False for padding, `positions` are by default 0, 1, 2, ... (see `models.run`)."""
        if self.config.learned_positions and positions is None and tokens.shape[1] > self.config.context:
            raise UserError(f"{tokens.shape[1]} positions, but the model learned only {self.config.context}.")
        real = None if self.config.padding is None else tokens != self.config.padding
        if mask is not None:
            real = mask if real is None else real & mask
        x = tap("embed", self.embedding(tokens, rules, positions))
        vectors = None if self.per_layer is None else self.per_layer(tokens, x, rules)
        shared: dict[str, Any] | None = {} if self.config.shared_layers else None  # keys and values, for later layers
        for index, block in enumerate(self.blocks):
            own = None if vectors is None else vectors[:, :, index]
            others: dict[str, Any] = {"real": real, "positions": positions, "shared": shared, "vectors": own}
            x = block(x, tap=under(tap, f"blocks/{index}"), rules=rules, **others)
        final = tap("final", normed(self.final_norm, x, rules))
        if self.config.head:
            return self.unembed(final)
        tap("pooled", mean_over(final, jnp.ones(tokens.shape, bool) if real is None else real))
        return None

    def unembed(self, final: Float[Array, "*axes d_model"]) -> Float[Array, "*axes vocab"]:
        """Logits of what the final norm returned.

        Raises:
          UserError: the model has no head.
        """
        if not self.config.head:
            raise UserError(
                "the model has no head (head=False) and so no logits: its answers are 'final' and 'pooled'."
            )
        if self.head_projection is not None:
            final = self.head_projection(final)
        wide = jnp.promote_types(final.dtype, jnp.float32)
        if self.unembedding is not None:
            logits = jnp.matmul(final, self.unembedding.weight, preferred_element_type=wide)
        elif final.size == final.shape[-1]:  # one token: on a CPU a vector times a transposed matrix is 5 times slower
            logits = jnp.einsum("vd,...d->...v", self.embedding.token, final, preferred_element_type=wide)
        else:
            logits = jnp.matmul(final, self.embedding.token.T, preferred_element_type=wide)
        if self.unembedding is not None and self.unembedding.bias is not None:
            logits = logits + self.unembedding.bias
        if self.config.logit_scale != 1.0:
            logits = logits * jnp.asarray(self.config.logit_scale, logits.dtype)
        return soft_cap(logits, self.config.logit_cap)

    def output_matrix(self) -> Float[Array, "d_model vocab"]:
        """W of logits = cap(final W + bias): the unembedding, with the projection before it and the logits' scale.

        Raises:
          UserError: the model has no head.
        """
        if not self.config.head:
            raise UserError("the model has no head (head=False): nothing maps 'final' to logits.")
        matrix = self.embedding.token.T if self.unembedding is None else self.unembedding.weight
        if self.head_projection is not None:
            matrix = self.head_projection.weight @ matrix
        return matrix if self.config.logit_scale == 1.0 else matrix * jnp.asarray(self.config.logit_scale, matrix.dtype)


def mean_over(x: Float[Array, "batch seq d"], real: Bool[Array, "batch seq"]) -> Float[Array, "batch d"]:
    """The mean of x over the positions that are real; 0 where none is."""
    count = jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)
    wide = jnp.sum(jnp.where(real[..., None], x, 0).astype(jnp.promote_types(x.dtype, jnp.float32)), axis=1)
    return (wide / count).astype(x.dtype)


def initialise(config: TransformerConfig, key: PRNGKeyArray) -> Transformer:
    """A transformer with random weights: the shape that loaders fill, and a model to test on."""
    keys = iter(jax.random.split(key, 3 + 8 * config.layers))

    def norm(present: bool) -> Norm | None:
        if not present:
            return None
        size, bias = config.d_model, jnp.zeros(config.d_model, jnp.float32) if config.norm_bias else None
        return Norm(
            jnp.ones(size, jnp.float32) - config.norm_offset, bias, config.norm, config.norm_epsilon, config.norm_offset
        )

    def projection_norm(heads: int, layer: int, head_dim: int) -> Norm | UnitNorm | None:
        if config.unit_query_key and layer not in config.unrotated:
            return UnitNorm(config.norm_epsilon)
        if not config.query_key_norm:
            return None
        size = head_dim * (heads if config.query_key_norm_over == "projection" else 1)
        shape = (heads, size) if config.query_key_norm_over == "each_head" else (size,)
        bias = jnp.zeros(size, jnp.float32) if config.query_key_norm_bias else None
        weight = jnp.ones(shape, jnp.float32) - config.norm_offset
        return Norm(weight, bias, config.query_key_norm_kind, config.norm_epsilon, config.norm_offset)

    def attention(layer: int) -> Attention | GatedDeltaNet:
        if config.delta is not None and layer in config.delta_layers:
            return random_delta_net(next(keys), config.d_model, config.delta, config.norm_epsilon)
        window = config.windows[layer] if config.windows else None
        local = window is not None and config.local_rotary_base is not None
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        whole = WholeConfig(config.head_dim, config.kv_heads)
        if config.whole is not None and window is None:
            whole = config.whole
        rotated = whole.head_dim if whole is config.whole else config.rotary_dimensions
        d_model, inner, kv = config.d_model, config.heads * whole.head_dim, whole.kv_heads * whole.head_dim
        own_keys = layer < config.layers - config.shared_layers
        own_values = own_keys and not whole.values_are_keys

        def keys_or_values(present: bool) -> Linear | None:
            return random_linear(next(keys), d_model, kv, config.qkv_bias, cut="out") if present else None

        return Attention(
            q_proj=random_linear(next(keys), d_model, inner, config.qkv_bias, cut="out"),
            k_proj=keys_or_values(own_keys),
            v_proj=keys_or_values(own_values),
            o_proj=random_linear(next(keys), inner, d_model, config.attention_out_bias, cut="in"),
            query_norm=projection_norm(config.heads, layer, whole.head_dim),
            key_norm=projection_norm(whole.kv_heads, layer, whole.head_dim) if own_keys else None,
            heads=config.heads,
            kv_heads=whole.kv_heads,
            scale=scale / (layer + 1) if config.scale_by_layer else scale,
            causal=config.causal,
            window=window,
            cap=config.attention_cap,
            rotary_dimensions=0 if layer in config.unrotated else rotated,
            rotary_base=(config.local_rotary_base or 0.0) if local else config.rotary_base,
            rotary_scaling=config.local_rotary_scaling if local else config.rotary_scaling,
            chunk=config.chunks[layer] if config.chunks else None,
            temperature=config.temperature if layer in config.unrotated else None,
            late_norms=config.unit_query_key,
            gate_proj=(
                random_linear(next(keys), d_model, inner, config.qkv_bias, cut="out") if config.attention_gate else None
            ),
            sinks=jnp.zeros(config.heads, jnp.float32) if config.attention_sinks else None,
            clip=config.attention_clip,
            interleaved=config.rotary_interleaved,
            value_norm=UnitNorm(config.norm_epsilon) if config.value_norm and own_keys else None,
            shares=config.kinds()[layer] if config.shared_layers else None,
        )

    def mlp(layer: int) -> PyTree:
        if config.routed is not None and layer not in config.dense_layers:
            return random_routed(next(keys), config.d_model, config.routed)
        if config.mixture is not None:
            return make_mlp(config.mixture, config.d_model, next(keys))
        wide = config.shared_width if layer >= config.layers - config.shared_layers else 1
        d_model, d_mlp, bias = config.d_model, wide * config.d_mlp, config.mlp_bias
        gate = random_linear(next(keys), d_model, d_mlp, bias, cut="out") if config.gated else None
        up = random_linear(next(keys), d_model, d_mlp, bias, cut="out")
        return MLP(gate, up, random_linear(next(keys), d_mlp, d_model, bias, cut="in"), config.activation)

    def block(layer: int) -> Block:
        return Block(
            attn_norm=norm(config.pre_norms),
            attn=attention(layer),
            attn_post_norm=norm(config.post_norms),
            attn_sum_norm=norm(config.sum_norms),
            mlp_norm=norm(config.pre_norms),
            mlp=mlp(layer),
            mlp_post_norm=norm(config.post_norms),
            mlp_sum_norm=norm(config.sum_norms),
            parallel=config.parallel,
            residual_scale=config.residual_scale,
            per_layer=own_vectors(layer),
            scale=jnp.ones(1, jnp.float32) if config.layer_scale else None,
        )

    def own_vectors(layer: int) -> PerLayer | None:
        if config.per_layer is None:
            return None
        own = jax.random.fold_in(key, 3 + layer)
        return random_per_layer(own, config.per_layer, config.d_model, config.activation, config.norm_epsilon)

    position = None
    if config.learned_positions:
        position = 0.1 * jax.random.normal(next(keys), (config.context, config.d_model), dtype=jnp.float32)
    token_type = None
    if config.token_types:
        token_type = 0.1 * jax.random.normal(
            jax.random.fold_in(key, 0), (config.token_types, config.d_model), dtype=jnp.float32
        )
    untied = config.head and not config.tied
    size = config.d_model if config.embedding_size is None else config.embedding_size

    def between(number: int, d_in: int, d_out: int, cut: Literal["out", "in"]) -> Linear | None:
        if config.embedding_size is None:
            return None
        return random_linear(jax.random.fold_in(key, number), d_in, d_out, False, cut=cut)

    return Transformer(
        embedding=Embedding(
            token=jax.random.normal(next(keys), (config.vocab_size, size), dtype=jnp.float32),
            position=position,
            token_type=token_type,
            norm=norm(config.embedding_norm),
            scale=config.embedding_scale,
            projection=between(1, size, config.d_model, "out"),
        ),
        blocks=tuple(block(layer) for layer in range(config.layers)),
        final_norm=norm(config.final_norm and not config.sum_norms),
        unembedding=random_linear(next(keys), size, config.vocab_size, config.head_bias, cut="out") if untied else None,
        config=config,
        head_projection=between(2, config.d_model, size, "in") if config.head else None,
        per_layer=None
        if config.per_layer is None
        else random_inputs(
            jax.random.fold_in(key, 1), config.per_layer, config.d_model, config.layers, config.norm_epsilon
        ),
    )
