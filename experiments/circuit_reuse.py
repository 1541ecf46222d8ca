"""Do two tasks use the same attention heads? Overlap of the circuits of heads, against chance and against themselves.

    python -m experiments.circuit_reuse --model smollm2-135m --tasks ioi colored_objects copying capitals

For each task: the effect of denoising every head's output (`attn/z`, all positions >= 1) by attribution (AtP, mean over
prompts), and the `top` heads by its size. For each pair of tasks the Jaccard overlap of the two sets, beside the
overlap of two random sets of that size (expected value) and that of the two halves of the prompts of one task, which is
the most that noise allows.

Claim: Merullo et al. 2024, arXiv 2310.08744: 78 % of the heads of the IOI circuit are those of colored objects in GPT-2
medium. Verdict by: the overlap of IOI and colored objects is above chance, and above that of IOI and capitals (a task
without a shared algorithm).
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinterp.causal.circuits import overlap, select_nodes
from jaxinterp.causal.layerwise import Layers, layer_arrays, layer_attributions, stack_layers
from jaxinterp.causal.tasks import Task, make_task, task_score
from jaxinterp.core.errors import UserError
from jaxinterp.models.load import load
from jaxinterp.models.transformer import Transformer


def head_effects(layers: Layers, task: Task, chunk: int = 8) -> np.ndarray:
    """AtP of every head, [prompts, layers, heads]: the sum over positions >= 1."""
    found = []
    for start in range(0, len(task), chunk):
        part = task.take(slice(start, start + chunk))
        fills = layer_arrays(layers, jnp.asarray(part.clean), ("attn/z",))
        effect = layer_attributions(layers, jnp.asarray(part.corrupted), part.metric(), fills)["attn/z"]
        found.append(np.asarray(effect[:, :, 1:].sum(axis=2)).transpose(1, 0, 2))
    return np.concatenate(found)


def jaccard(one: np.ndarray, other: np.ndarray, top: int) -> float:
    """Overlap of the `top` heads of two sets of prompts."""
    circuits = [select_nodes({"heads": effect.reshape(len(effect), -1)}, top=top) for effect in (one, other)]
    return overlap(*circuits)["jaccard"]


def by_chance(heads: int, top: int, draws: int = 2000) -> float:
    """The mean overlap of two random sets."""
    draw = np.random.default_rng(0)
    sets = [set(draw.choice(heads, top, replace=False)) for _ in range(2 * draws)]
    return float(np.mean([len(a & b) / len(a | b) for a, b in zip(sets[::2], sets[1::2], strict=True)]))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run it; prints the rows and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["ioi", "colored_objects", "copying", "capitals"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--top", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/circuit_reuse.json"))
    given = parser.parse_args(arguments)
    subject = load(given.model)
    if not isinstance(subject.model, Transformer):
        raise UserError(f"model={given.model!r} is a {type(subject.model).__name__}: give one that is a Transformer.")
    layers, start = stack_layers(subject.model), time.process_time()
    effects: dict[str, np.ndarray] = {}
    for name in given.tasks:
        task = make_task(name, subject.tokenizer, prompts=given.prompts, seed=given.seed)
        score = task_score(subject.model, task)
        print(score.sentence(), flush=True)
        if score.able:
            effects[name] = head_effects(layers, task)
    heads = layers.count * subject.model.config.heads
    chance = by_chance(heads, given.top)
    rows: list[dict[str, Any]] = []
    for name, effect in effects.items():
        half = len(effect) // 2
        rows.append({"pair": [name, name], "jaccard": jaccard(effect[:half], effect[half:], given.top)})
    for one, other in combinations(effects, 2):
        rows.append({"pair": [one, other], "jaccard": jaccard(effects[one], effects[other], given.top)})
    for row in rows:
        row |= {"top": given.top, "heads": heads, "chance": chance, "prompts": given.prompts, "model": given.model}
        print(f"{row['pair'][0]:16s} {row['pair'][1]:16s} Jaccard {row['jaccard']:.2f}, by chance {chance:.2f}")
    print(f"{time.process_time() - start:.0f} CPU s")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
