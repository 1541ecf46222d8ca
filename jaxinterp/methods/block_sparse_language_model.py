"""Block-sparse MLP weights by pruning and growing while a language model is trained (BLaST).

Every matrix of every MLP is cut into blocks. Every `every` steps, with sparsity s(t) and gradient G of the loss by the
*whole* matrix, masked blocks included:

    grown  = the round(grow (1 - s) n) blocks of largest |G_IJ|_F among those that are not kept by size
    kept   = the other blocks up to round((1 - s) n), by |W_IJ|_F
    W      = W where kept or grown, else 0; a block that grows anew begins at 0
    s(t)   = s_end (1 - (1 - t / ramp)^3) until t = ramp, then s_end

Between refreshes the gradient of masked blocks is 0. Weights are masked after each step, so that what is stored is
what is computed; `kernels.block_sparse` computes with the blocks alone.

Source: BLaST 2507.03117, section 3. Its repository was not found: ramp, interval, the share that grows and the size of
blocks are arguments, and the cubic ramp is Zhu and Gupta's (1710.01878).
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from jaxinterp.core.batch import Batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.metrics import Metrics, Ratio
from jaxinterp.core.protocols import MethodState, Recipe
from jaxinterp.core.sites import Needs, Site
from jaxinterp.methods.checks import check_not_negative, check_positive, check_whole
from jaxinterp.methods.language_model import adamw, check_no_site, in_float32, next_token
from jaxinterp.models.selection import block_norms, spread_blocks, top_k


def cubic_sparsity(step: Int[Array, ""] | int, target: float, ramp: int) -> Float[Array, ""]:
    """s_end (1 - (1 - t / ramp)^3), s_end from `ramp` on."""
    along = jnp.clip(jnp.asarray(step, jnp.float32) / ramp, 0.0, 1.0)
    return target * (1 - (1 - along) ** 3)


def prune_and_grow(
    weight: Float[Array, "d_in d_out"],
    gradient: Float[Array, "d_in d_out"],
    sparsity: float | Float[Array, ""],
    grow: float,
    block: tuple[int, int],
) -> Bool[Array, "block_rows block_columns"]:
    """Which blocks are kept or grown, exactly round((1 - sparsity) n) of n; `sparsity` may be traced.

    Raises:
      UserError: a block does not divide the matrix.
    """
    sizes, slopes = block_norms(weight, block), block_norms(gradient, block)
    count = jnp.round((1 - jnp.asarray(sparsity)) * sizes.size).astype(jnp.int32)
    new = jnp.round(grow * count).astype(jnp.int32)
    kept = top_k(sizes.reshape(-1), count - new)
    grown = top_k(jnp.where(kept, -1.0, slopes.reshape(-1)), new)
    return (kept | grown).reshape(sizes.shape)


@dataclass(frozen=True)
class BlockSparseLanguageModel:
    """Trains every array of the subject's model, in float32; matrices of MLPs end block-sparse."""

    sparsity: float = 0.8
    """The share of blocks that goes in the end."""
    block: int = 128
    """Rows and columns of a block."""
    ramp: float = 0.6
    """The share of the steps over which the sparsity rises."""
    every: int = 20
    """Steps between refreshes of the masks."""
    grow: float = 0.1
    """The share of kept blocks that are chosen by their gradient."""
    learning_rate: float = 4e-3
    warmup: float = 0.05
    decay: float = 0.5
    weight_decay: float = 0.1
    gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError if a value is invalid."""
        check_positive(self, "learning_rate", "gradient_norm", "ramp")
        check_not_negative(self, "weight_decay", "warmup", "decay", "grow", "sparsity")
        check_whole(self, block=1, every=1)
        for name in ("sparsity", "grow", "ramp"):
            if vars(self)[name] > 1:
                raise UserError(f"{name}={vars(self)[name]} is a share: at most 1.")

    def needs(self, site: Site = None) -> Needs:
        """No array of the subject: the windows are the batch.

        Raises:
          UserError: a site is named, but the whole model is trained.
        """
        check_no_site(self, site)
        return Needs(windows=True, rows="none")

    def recipe(self, steps: int) -> Recipe:
        """AdamW, then masks; `aux` holds the masks of blocks, one tuple a layer in the order of projections."""
        optimizer = adamw(self, steps)
        ramp = max(1, round(self.ramp * steps))
        block = (self.block, self.block)

        def start(key: PRNGKeyArray, sample: Batch, model: PyTree = None, previous: PyTree = None) -> MethodState:
            wide = in_float32(model)
            masks = [jnp.ones(block_norms(weight, block).shape, bool) for weight in mlp_matrices(wide)]
            return MethodState(wide, optimizer.init(eqx.filter(wide, eqx.is_inexact_array)), masks)

        def step(
            state: MethodState, batch: Batch, key: PRNGKeyArray, model: PyTree = None
        ) -> tuple[MethodState, Metrics]:
            leaves, fixed = eqx.partition(state.decomposition, eqx.is_inexact_array)
            loss = lambda leaves: next_token(eqx.combine(leaves, fixed), batch, key, model=model)
            gradient, metrics = jax.grad(loss, has_aux=True)(leaves)
            share = cubic_sparsity(batch.step, self.sparsity, ramp)
            refresh = batch.step % self.every == 0
            masks = [
                jnp.where(refresh, prune_and_grow(weight, slope, share, self.grow, block), mask)
                for weight, slope, mask in zip(mlp_matrices(leaves), mlp_matrices(gradient), state.aux, strict=True)
            ]
            updates, moments = optimizer.update(masked(gradient, masks, block), state.optimizer, leaves)
            learned = masked(optax.apply_updates(leaves, updates), masks, block)
            kept = jnp.mean(jnp.concatenate([mask.reshape(-1) for mask in masks]), dtype=jnp.float32)
            metrics = {**metrics, "block_sparsity": Ratio(1 - kept, jnp.ones(()))}
            return MethodState(eqx.combine(learned, fixed), moments, masks), metrics

        return Recipe(start, step, lambda state: state.decomposition)


def mlp_matrices(model: PyTree) -> list[Any]:
    """The weights of every MLP's projections, layer by layer."""
    found = []
    for block in model.blocks:
        mlp = block.mlp
        found += [linear.weight for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if linear is not None]
    return found


def masked(model: PyTree, masks: list[Bool[Array, "_rows _columns"]], block: tuple[int, int]) -> PyTree:
    """The model (or its gradient) with the weights of MLPs set to zero in blocks that are not kept."""
    weights = [
        jnp.where(spread_blocks(mask, block), weight, 0)
        for weight, mask in zip(mlp_matrices(model), masks, strict=True)
    ]
    return eqx.tree_at(mlp_matrices, model, weights)
