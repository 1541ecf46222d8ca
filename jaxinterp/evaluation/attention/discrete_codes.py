"""Which attention heads belong to a circuit, by the discrete codes that they take on prompts of two kinds.

A head's contribution to the residual stream on a prompt becomes one number, its strongest feature:

    contribution   x_eh = mean over positions t of z^h_t W_O^h                 [examples, heads, d_model]
    code           c_eh = argmax_j of the sparse codes of x_eh                 one dictionary for all heads
    presence       P±_hj = some positive (negative) example has c_eh = j
    node score     u_h = |P+_h and not P-_h|            normalised: over |P+_h or P-_h|
    edge score     the same for pairs (c_eg, c_eh) of codes of two heads
    z-score        (u_h - mean) / std of u_h under permuted labels, each head against itself

The node score counts codes that only positive prompts bring about. A head that takes many codes has more of them by
chance, labels or not, so that u_h alone ranks heads by the entropy of their codes; the z-score does not.

Source: O'Neill and Bui 2024, arXiv 2405.12522. The permutation z-score is not the paper's.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxinterp.core.errors import UserError
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer


def head_contributions(
    model: Transformer, tokens: Int[Array, "examples seq"], weight: Float[Array, "examples seq"]
) -> Float[Array, "examples heads d_model"]:
    """What every head adds to the residual stream, averaged over positions by weight; head h of layer l at l * H + h.

    Behind W_O, without its bias and before a post-norm, where the model has them.
    """
    trace = run(model, tokens)
    share = weight / jnp.sum(weight, axis=1, keepdims=True)
    layers = []
    for index, block in enumerate(model.blocks):
        z = jnp.einsum("es,eshd->ehd", share, trace[f"blocks/{index}/attn/z"].astype(jnp.float32))
        write = block.attn.o_proj.weight.astype(jnp.float32).reshape(z.shape[1], z.shape[2], -1)
        layers.append(jnp.einsum("ehd,hdm->ehm", z, write))
    return jnp.concatenate(layers, axis=1)


def presence(codes: Int[Array, "examples heads"], chosen: Bool[Array, " examples"], features: int) -> Array:
    """P_hj: whether head h takes code j on some chosen example; Bool `[heads, features]`."""
    return jnp.einsum("ehj,e->hj", jax.nn.one_hot(codes, features), chosen.astype(jnp.float32)) > 0


def node_scores(
    codes: Int[Array, "examples heads"], positive: Bool[Array, " examples"], features: int, *, normalised: bool = False
) -> Float[Array, " heads"]:
    """u_h: codes of positive examples that no negative one has; `normalised`: over the codes that there are."""
    has, has_not = presence(codes, positive, features), presence(codes, ~positive, features)
    own = jnp.sum(has & ~has_not, axis=1).astype(jnp.float32)
    return own / jnp.sum(has | has_not, axis=1) if normalised else own


def permutation_z(
    codes: Int[Array, "examples heads"],
    positive: Bool[Array, " examples"],
    features: int,
    key: PRNGKeyArray,
    *,
    permutations: int = 1000,
    normalised: bool = False,
) -> Float[Array, " heads"]:
    """How far u_h lies above what it is under permuted labels, in standard deviations; 0 where it cannot vary.

    Raises:
      UserError: there is no positive or no negative example, or fewer than 2 permutations.
    """
    if permutations < 2:
        raise UserError(f"permutations={permutations} must be at least 2.")
    if not isinstance(positive, jax.core.Tracer) and (bool(positive.all()) or not bool(positive.any())):
        raise UserError("all examples are of one kind: give positive and negative prompts.")

    return _permutation_z(codes, positive, features, key, permutations, normalised)


@partial(jax.jit, static_argnums=(2, 4, 5))
def _permutation_z(
    codes: Array, positive: Array, features: int, key: PRNGKeyArray, permutations: int, normalised: bool
) -> Array:
    def score(labels: Array) -> Array:
        return node_scores(codes, labels, features, normalised=normalised)

    def permuted(key: PRNGKeyArray) -> Array:
        return score(jax.random.permutation(key, positive))

    chance = jax.lax.map(permuted, jax.random.split(key, permutations), batch_size=min(16, permutations))
    mean, std = jnp.mean(chance, axis=0), jnp.std(chance, axis=0)
    return jnp.where(std > 1e-6, (score(positive) - mean) / jnp.maximum(std, 1e-6), 0.0)


def edge_scores(
    codes: Int[Array, "examples heads"], positive: Bool[Array, " examples"], *, normalised: bool = False
) -> Float[Array, "heads heads"]:
    """Pairs of codes of two heads that occur together on a positive example and on no negative one.

    `normalised`: over the pairs of codes that there are. Counted without a table of code pairs: an example counts where
    no earlier one of its kind and no negative one has both codes. The diagonal is the node score.
    """
    count = len(codes)

    def matches(example: Array, others: Array) -> Array:
        """For every pair of heads, whether some of the other examples has both codes of this one."""
        same = (codes == codes[example]) & others[:, None]
        return jnp.einsum("eg,eh->gh", same.astype(jnp.float32), same.astype(jnp.float32)) > 0

    def add(sums: tuple[Array, Array], example: Array) -> tuple[tuple[Array, Array], None]:
        earlier = jnp.arange(count) < example
        own = positive[example] & ~matches(example, (positive & earlier) | ~positive)
        return (sums[0] + own, sums[1] + ~matches(example, earlier)), None

    zeros = jnp.zeros((codes.shape[1], codes.shape[1]), jnp.float32)
    (own, all_pairs), _ = jax.lax.scan(add, (zeros, zeros), jnp.arange(count))
    return own / all_pairs if normalised else own


def roc_auc(scores: Float[Array, " heads"], member: Bool[Array, " heads"]) -> Float[Array, ""]:
    """The probability that a member scores above a non-member, ties counting half; NaN where there is none of one."""
    difference = scores[:, None] - scores[None, :]
    pairs = member[:, None] & ~member[None, :]
    wins = (difference > 0) + 0.5 * (difference == 0)
    return jnp.sum(jnp.where(pairs, wins, 0.0)) / jnp.sum(pairs)
