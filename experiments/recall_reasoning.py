"""Do recall and reasoning use different neurons and heads? Selective ablation, against matched random sets.

    python -m experiments.recall_reasoning --model smollm2-135m

Tasks: capitals (recall), three-shot sums (reasoning), copying; and a *second template* of the first two: languages,
sums in words. A set of units (46 neurons, .1 %; or 5 heads) is chosen by (mean - a) . gradient of the answer's log
probability on half of the prompts of one task and mean-ablated on the other half of every task. Means are over all
tasks' prompts. Positions >= 1 throughout; the same with position 0 in means and ablation is its own row, and so is
ablating position 0 alone. Control: random sets with as many units in every layer. Interval: 95 percent, by bootstrap
over prompts.

Claim: recall and reasoning rely on separable parts (up to 15 % selective loss; arXiv 2510.03366, recalled; neurons less
robust). Verdict by: a set costs its own task more than the others and more than random sets, and the second template of
its kind more than other kinds. A set that costs its own template only is selective for the template, not for recall.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.causal.ablate import ablated_metric, matched, strongest_units, unit_means, unit_scores
from jaxinterp.causal.layerwise import Layers, layer_arrays, stack_layers
from jaxinterp.causal.measure import LogProbability
from jaxinterp.causal.tasks import Task, make_task
from jaxinterp.core.errors import UserError
from jaxinterp.models.load import load
from jaxinterp.models.transformer import Transformer

TASKS = ("capitals", "languages", "sums", "sums_in_words", "copying")
CHOSEN_ON = ("capitals", "sums", "copying")


def costs(layers: Layers, task: Task, name: str, mask: np.ndarray, means: Array, **where: int) -> np.ndarray:
    """Nats of the answer's log probability that an ablation costs, a prompt each."""
    metric, tokens = LogProbability(jnp.asarray(task.answer)), jnp.asarray(task.clean)
    last = layer_arrays(layers, tokens, ("resid/post",))["resid/post"][-1]
    after = ablated_metric(layers, tokens, metric, name, jnp.asarray(mask), means, **where)
    return np.asarray(layers.metric(metric, last) - after)


def interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 percent interval by bootstrap."""
    draws = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def table(
    layers: Layers, halves: dict[str, tuple[Task, Task]], name: str, count: int, *, first: int, draws: int
) -> list[dict[str, Any]]:
    """A row for every set (chosen on one task) and every task it is tested on, random sets among them."""
    means = unit_means(layers, [jnp.asarray(half.clean) for half, _ in halves.values()], name, first)
    rows, halves_agree = [], {}
    for chosen_on in (task for task in CHOSEN_ON if task in halves):
        half = halves[chosen_on][0]
        metric = LogProbability(jnp.asarray(half.answer))
        scores = np.asarray(unit_scores(layers, jnp.asarray(half.clean), metric, name, means, first))
        middle = scores.shape[1] // 2
        halves_agree[chosen_on] = float(
            np.corrcoef(scores[:, :middle].mean(1).ravel(), scores[:, middle:].mean(1).ravel())[0, 1]
        )
        mask = strongest_units(jnp.asarray(scores.mean(1)), count)
        sets = [("chosen", mask), *((f"random {seed}", matched(mask, seed)) for seed in range(draws))]
        for kind, each in sets:
            for tested_on, (_, test) in halves.items():
                mean, low, high = interval(costs(layers, test, name, each, means, first=first))
                rows.append(
                    {"units": name, "first": first, "set": chosen_on, "kind": kind, "task": tested_on, "cost": mean,
                     "low": low, "high": high, "agree": halves_agree[chosen_on]}
                )  # fmt: skip
        show([row for row in rows if row["set"] == chosen_on])
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """One line for the chosen set, one for the mean and the largest of the random ones."""
    head = f"{rows[0]['units']} from position {rows[0]['first']}, chosen on {rows[0]['set']}"
    print(f"{head} (scores of two halves correlate {rows[0]['agree']:.2f})")
    chosen = [row for row in rows if row["kind"] == "chosen"]
    print("   " + "   ".join(f"{r['task']} {r['cost']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]" for r in chosen))
    random: dict[str, list[float]] = {row["task"]: [] for row in chosen}
    for row in rows:
        if row["kind"] != "chosen":
            random[row["task"]].append(row["cost"])
    drawn = (f"{task} {np.mean(v):+.2f} (most {max(v):+.2f})" for task, v in random.items() if v)
    print("   random: " + "   ".join(drawn), flush=True)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run it; prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--neurons", type=int, default=46)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/recall_reasoning.json"))
    given = parser.parse_args(arguments)
    subject = load(given.model)
    if not isinstance(subject.model, Transformer):
        raise UserError(f"model={given.model!r} is a {type(subject.model).__name__}: give one that is a Transformer.")
    layers, begun = stack_layers(subject.model), time.process_time()
    halves: dict[str, tuple[Task, Task]] = {}
    for name in given.tasks:
        task = make_task(name, subject.tokenizer, prompts=given.prompts, seed=0)
        right = task_right(layers, task)
        print(f"{name}: right on {right:.0%} of {len(task)}", flush=True)
        if right >= 0.75:
            halves[name] = task.split()
    rows: list[dict[str, Any]] = []
    for units, count in (("mlp/hidden", given.neurons), ("attn/z", given.heads)):
        rows += table(layers, halves, units, count, first=1, draws=given.draws)
    rows += table(layers, halves, "mlp/hidden", given.neurons, first=0, draws=0)
    means = unit_means(layers, [jnp.asarray(half.clean) for half, _ in halves.values()], "mlp/hidden")
    everything = np.ones((layers.count, means.shape[1]), bool)
    for layer in (None, 2, 11):
        mask = everything if layer is None else everything & (np.arange(layers.count) == layer)[:, None]
        for tested_on, (_, test) in halves.items():
            cost = interval(costs(layers, test, "mlp/hidden", mask, means, first=0, last=1))
            rows.append({"units": "MLP at position 0", "set": layer, "task": tested_on, "cost": cost[0]})
            print(
                f"MLP {'all' if layer is None else layer} at position 0 alone: {tested_on} {cost[0]:+.2f}", flush=True
            )
    print(f"{time.process_time() - begun:.0f} CPU s")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def task_right(layers: Layers, task: Task) -> float:
    """How often the answer is above the other one."""
    last = layer_arrays(layers, jnp.asarray(task.clean), ("resid/post",))["resid/post"][-1]
    found = layers.metric(task.metric(), last)
    return float((np.asarray(found) > 0).mean())


if __name__ == "__main__":
    main()
