"""The rows of the sparsity experiment that are not one score at one share: pruned weights, budgets by layer, CETT."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from experiments.sparsity_results import Results
from experiments.sparsity_statistics import Statistics
from jaxinterp.commands.shell import say
from jaxinterp.evaluation.sparsity.budgets import greedy_levels
from jaxinterp.evaluation.sparsity.calibrate import Summary
from jaxinterp.evaluation.sparsity.curves import cett_curves, cett_ppl
from jaxinterp.models import selection
from jaxinterp.models.leave_out import BySize, LeaveOut, TopK
from jaxinterp.models.pruning import mask_weights, weight_mask


def pruning(model: Any, leaves: Sequence[str], stats: Statistics, results: Results) -> None:
    """All three matrices of every MLP: 50 % without structure, and 2:4."""
    for title, sparsity in (("50 %", 0.5), ("2:4", (2, 4))):
        for name in ("magnitude", "Wanda", "DaSS"):
            share = 0.5 if title == "50 %" else 0.501  # a key of its own; 2:4 is 50 %
            if results.find(name, share) is None:
                masks = prune_masks(model, leaves, stats, name, sparsity)
                results.row(name, share, mask_weights(model, masks), dict)


class Norms(Protocol):
    """What `prune_masks` reads: sums over the calibration text, by leaf."""

    @property
    def hidden(self) -> Mapping[str, Summary]: ...
    @property
    def inputs(self) -> Mapping[str, Summary]: ...


def prune_masks(
    model: Any, leaves: Sequence[str], stats: Norms, name: str, sparsity: float | tuple[int, int]
) -> dict[str, Any]:
    """Masks of every MLP's matrices by a published rule."""
    masks = {}
    for leaf in leaves:
        mlp = model.blocks[int(leaf.split("/")[1])].mlp
        read, hidden = (jnp.asarray(part[leaf].norms(), jnp.float32) for part in (stats.inputs, stats.hidden))
        for field in mlp.projections():
            weight = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj, "down_proj": mlp.down_proj}[field].weight
            within: Any = "output"
            if name == "magnitude":
                score = selection.magnitude(weight)
                within = "layer" if isinstance(sparsity, float) else "output"
            elif name == "DaSS" and field != "down_proj":
                score, within = selection.dass(weight, hidden), "input"
            else:
                score = selection.wanda(weight, hidden if field == "down_proj" else read)
            masks[f"{leaf}/{field}"] = weight_mask(score, sparsity, within=within)
    return masks


def budgets(
    model: Any, leaves: Sequence[str], stats: Statistics, results: Results, before: int, step: float = 0.05
) -> dict[str, Any]:
    """Levels by layer for a mean of 50 and 65 %: greedy, error |change of the MLP's output| / |stream behind it|."""
    down = {leaf: model.blocks[int(leaf.split("/")[1])].mlp.down_proj.weight for leaf in leaves}
    table: dict[tuple[str, float], float] = {}

    def error_of(leaf: str, level: float) -> float:
        key = (leaf, round(level, 6))
        if key not in table:
            k = jnp.asarray(round(stats.kept[leaf].shape[1] * (1 - level)), jnp.int32)
            table[key] = float(_output_change(stats.kept[leaf], down[leaf], k)) / stats.stream[leaf]
        return table[key]

    path = greedy_levels(lambda levels: sum(error_of(leaf, levels[leaf]) for leaf in leaves), leaves, 0.65, step=step)
    found = {}
    for mean in (0.5, 0.65):
        levels = next(each for each in path if sum(each.values()) / len(leaves) >= mean - 1e-9)
        edits = {
            f"{leaf}/hidden": LeaveOut(
                BySize(selection.row_norms(down[leaf])),
                TopK(jnp.asarray(round(stats.kept[leaf].shape[1] * (1 - levels[leaf])), jnp.int32)),
                dense_before=before,
            )
            for leaf in leaves
        }
        results.row("|a||w|, budget by layer", mean, model, partial(dict, edits))
        found[f"{mean:g}"] = [round(levels[leaf], 3) for leaf in leaves]
    return found


@jax.jit
def _output_change(a: Any, weight: Any, k: Any) -> Any:
    mask = selection.top_k(selection.wina(a, weight), k)
    return jnp.mean(jnp.linalg.norm(jnp.where(mask, 0, a) @ weight, axis=-1))


def cett_percent(model: Any, stats: Statistics, results: Results, before: int, percent: float) -> dict[str, Any]:
    """CETT-PPL-p %: one CETT for all layers, thresholds from the calibration text, loss on held-out text.

    Every loss is kept as it comes, so that a search that was stopped goes on where it was.
    """
    dense = results.find("dense", 0.0)
    assert dense is not None
    curves = cett_curves(model, stats.kept)
    searched: dict[str, float] = results.content.setdefault("searched", {})

    def loss(edits: Any) -> float:
        key = ",".join(f"{float(edit.selector.threshold):.6g}" for edit in edits.values())
        if key not in searched:
            results.check_time()
            searched[key] = float(sum(results.measure(model, edits)) / results.measure.counts.sum())
            results.keep()
        say(f"CETT-PPL: perplexity {100 * math.expm1(searched[key] - dense['ce']):+.2f} %")
        return searched[key]

    found = cett_ppl(model, curves, loss, dense["ce"], percent, tolerance=5e-3, dense_before=before)
    return {
        "CETT": found.cett,
        "activation ratio": found.ratio,
        "perplexity rise %": found.percent,
        "ratio by layer": [round(layer.ratio, 3) for layer in found.layers.values()],
    }
