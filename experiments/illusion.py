"""Does a direction of an MLP's hidden array act by what the MLP reads of it? The row-space test on a real model.

    python -m experiments.illusion --model smollm2-135m --layers 0 5 10 20

Prompts "Then NAME went home because": he or she? For each layer's `mlp/hidden` (positions >= 1): swap the coordinate
along a direction v between a man's and a woman's name, and measure which share of the gap in logit(he) - logit(she) is
moved; the same along v_row (what the down projection reads) and v_null (what it cannot read), of length 1 each, and for
the whole array, which is the ceiling. v: the difference of means of the two kinds of names, from other names; random.

Claim: Makelov et al. 2023, arXiv 2311.17030: directions found by patching can act by a part that the data does not use
(effect of v, none of v_row, none of the whole array). Control: the random direction; v_null must do nothing.
Verdict by: effect of v with a v_row whose effect is under a third of it.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.causal.directions import difference_in_means, unit
from jaxinterp.causal.layerwise import Layers, layer_arrays, layer_set_metric, stack_layers
from jaxinterp.causal.measure import LogitDifference, Metric
from jaxinterp.causal.subspace import direction_report
from jaxinterp.core.errors import UserError
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.load import load
from jaxinterp.models.transformer import Transformer

MEN = "John James David Paul Mark Peter Michael Thomas Robert William George Charles Henry Daniel Andrew Steven"
WOMEN = "Mary Sarah Anna Jane Emma Laura Susan Lisa Karen Helen Maria Elizabeth Margaret Alice Julia Rachel"
TEMPLATE = "Then {} went home because"


def prompts(subject: Subject) -> tuple[Array, Array]:
    """Men's and women's prompts of the usual length, as many of one as of the other."""
    kinds = [[subject.ids(TEMPLATE.format(name)) for name in names.split()] for names in (MEN, WOMEN)]
    lengths = [len(row) for rows in kinds for row in rows]
    usual = max(set(lengths), key=lengths.count)
    men, women = ([row for row in rows if len(row) == usual] for rows in kinds)
    count = min(len(men), len(women)) // 2 * 2
    if count < 4:
        raise UserError(f"{count} pairs of names of one length in this tokenizer's tokens: too few.")
    return jnp.asarray(men[:count], jnp.int32), jnp.asarray(women[:count], jnp.int32)


def effect_of(
    layers: Layers, tokens: Array, metric: Metric, layer: int, hidden: Array, gap: Array
) -> Callable[[Callable[[Any], Any]], Array]:
    """edit -> the share of the mean gap that it moves, prompt by prompt."""
    before = layer_set_metric(layers, tokens, metric, "mlp/hidden", jnp.asarray(layer), hidden)

    def effect(edit: Callable[[Any], Any]) -> Array:
        after = layer_set_metric(layers, tokens, metric, "mlp/hidden", jnp.asarray(layer), edit(hidden))
        return (before - after) / jnp.mean(gap)

    return effect


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run it; prints the rows and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", nargs="+", type=int, default=[0, 5, 10, 20])
    parser.add_argument("--out", type=Path, default=Path("results/illusion.json"))
    given = parser.parse_args(arguments)
    subject = load(given.model)
    if not isinstance(subject.model, Transformer):
        raise UserError(f"model={given.model!r} is a {type(subject.model).__name__}: give one that is a Transformer.")
    layers, start = stack_layers(subject.model), time.process_time()
    men, women = prompts(subject)
    half = len(men) // 2
    he, she = (subject.ids(TEMPLATE.format("Mary") + word)[-1] for word in (" he", " she"))
    metric = LogitDifference(jnp.full(half, he, jnp.int32), jnp.full(half, she, jnp.int32))
    last = jnp.asarray(layers.count - 1)
    arrays = {
        name: layer_arrays(layers, ids, ("mlp/hidden",))["mlp/hidden"]
        for name, ids in zip("mw", (men, women), strict=True)
    }
    scores = [
        layer_set_metric(layers, ids[half:], metric, "mlp/hidden", last, arrays[name][-1][half:])
        for name, ids in (("m", men), ("w", women))
    ]
    gap = scores[0] - scores[1]
    right = float(np.mean([np.mean(np.asarray(scores[0]) > 0), np.mean(np.asarray(scores[1]) < 0)]))
    print(f"{half} held-out pairs; right on {right:.0%}; gap in logits {float(gap.mean()):.2f}", flush=True)
    later = (jnp.arange(men.shape[1]) >= 1)[:, None]
    rows: list[dict[str, Any]] = []
    for layer in given.layers:
        base, source = (arrays[name][layer] for name in "mw")
        weight = subject.model.blocks[layer].mlp.down_proj.weight
        flat = [kind[:half, 1:].reshape(-1, kind.shape[-1]) for kind in (base, source)]
        data = jnp.concatenate([kind[half:, 1:].reshape(-1, kind.shape[-1]) for kind in (base, source)])
        label = jnp.arange(len(data)) >= len(data) // 2
        effect = effect_of(layers, men[half:], metric, layer, base[half:], gap)
        for name, v in (
            ("DiM", difference_in_means(flat[1], flat[0])),
            ("random", unit(jax.random.normal(jax.random.key(layer), flat[0].shape[1:]))),
        ):
            found = direction_report(effect, v, weight, source[half:], data, label, where=later)
            rows.append({"layer": layer, "direction": name, "right": right, **found._asdict()})
            print(
                f"layer {layer:2d} {name:7s} v {found.effect:+.3f}  row {found.effect_row:+.3f} (as is "
                f"{found.effect_row_as_is:+.3f})  null {found.effect_null:+.3f}  whole array {found.effect_full:+.3f}  "
                f"|v_null| {found.null_norm:.2f}",
                flush=True,
            )
    print(f"{time.process_time() - start:.0f} CPU s")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
