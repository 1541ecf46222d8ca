"""The rows of the sparsity experiment that one score and one share give: score -> sparsity -> edits."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.sparsity_statistics import Statistics
from jaxinterp.models import selection
from jaxinterp.models.leave_out import BySize, Core, Fixed, LeaveOut, LowRank, TopK

BLEND = 0.9
"""R-Sparse: the share of the budget that whole channels get; the low-rank path has the rest."""


def scores(
    model: Any, leaves: Sequence[str], stats: Statistics, *, shares: Sequence[float], seq: int, before: int, seed: int
) -> dict[str, Callable[[float], dict[str, Any]]]:
    """By the name of a row: sparsity -> edits. `before`: positions that stay dense."""
    mlps = {leaf: model.blocks[int(leaf.split("/")[1])].mlp for leaf in leaves}
    down = {leaf: selection.row_norms(mlp.down_proj.weight) for leaf, mlp in mlps.items()}
    both = {
        leaf: selection.row_norms(jnp.concatenate([mlp.gate_proj.weight, mlp.up_proj.weight], axis=1))
        for leaf, mlp in mlps.items()
    }
    rms = {leaf: jnp.asarray(np.sqrt(stats.up[leaf].mean_square()), jnp.float32) for leaf in leaves}
    size = {leaf: jnp.asarray(stats.hidden[leaf].mean_size(), jnp.float32) for leaf in leaves}
    act = model.config.activation
    d_mlp, d_model = model.config.d_mlp, model.config.d_model
    random = np.random.default_rng(seed)
    noise = {leaf: jnp.asarray(random.random(d_mlp), jnp.float32) for leaf in leaves}
    ones = lambda size: jnp.ones(size, jnp.float32)

    def rows(port: str, width: int, score: Callable[[str], Any]) -> Callable[[float], dict[str, Any]]:
        def edits(share: float) -> dict[str, Any]:
            k = jnp.asarray(round(width * (1 - share)), jnp.int32)
            return {f"{leaf}/{port}": LeaveOut(score(leaf), TopK(k), dense_before=before) for leaf in leaves}

        return edits

    bases: dict[str, Any] = {}

    def r_sparse(share: float) -> dict[str, Any]:
        """At equal numbers of weights read: k channels and a path of rank r, k d + r (m + d) = (1 - s) m d."""
        most = round((1 - min(shares)) * (1 - BLEND) * d_mlp * d_model / (d_mlp + d_model))
        rank = round((1 - share) * (1 - BLEND) * d_mlp * d_model / (d_mlp + d_model))
        for leaf in leaves:
            if leaf not in bases:
                bases[leaf] = selection.low_rank_basis(mlps[leaf].down_proj.weight, most)
        k = jnp.asarray(round(d_mlp * (1 - share) * BLEND), jnp.int32)
        path = jnp.arange(most) < rank
        return {
            f"{leaf}/hidden": LeaveOut(BySize(down[leaf]), TopK(k), LowRank(bases[leaf] * path), before)
            for leaf in leaves
        }

    return {
        "|a| (TEAL)": rows("hidden", d_mlp, lambda leaf: BySize(ones(d_mlp))),
        "|a||w| (WINA, CETT)": rows("hidden", d_mlp, lambda leaf: BySize(down[leaf])),
        "R-Sparse": r_sparse,
        "|s| (CATS)": rows("pre", d_mlp, lambda leaf: BySize(ones(d_mlp), act)),
        "|s| rms(u) (CHESS)": rows("pre", d_mlp, lambda leaf: BySize(rms[leaf], act)),
        "|s| rms(u)|w|": rows("pre", d_mlp, lambda leaf: BySize(rms[leaf] * down[leaf], act)),
        "input |x| (TEAL)": rows("in", d_model, lambda leaf: BySize(ones(d_model))),
        "input |x||w| (WINA)": rows("in", d_model, lambda leaf: BySize(both[leaf])),
        "CoreInfer": rows("hidden", d_mlp, lambda leaf: Core(0.4, seq // 4)),
        "fixed E|a| (AMP)": rows("hidden", d_mlp, lambda leaf: Fixed(size[leaf])),
        "fixed E|a||w|": rows("hidden", d_mlp, lambda leaf: Fixed(size[leaf] * down[leaf])),
        "fixed E|a grad|": rows("hidden", d_mlp, lambda leaf: Fixed(jnp.asarray(stats.effect[leaf], jnp.float32))),
        "fixed MAW": rows(
            "hidden",
            d_mlp,
            lambda leaf: Fixed(selection.peak_to_peak(mlps[leaf].gate_proj.weight, mlps[leaf].up_proj.weight)),
        ),
        "fixed random": rows("hidden", d_mlp, lambda leaf: Fixed(noise[leaf])),
    }
