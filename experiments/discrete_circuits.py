"""Do discrete codes find the attention heads that a task depends on? Indirect object identification, by ablation.

Positive prompts repeat a name, "When Mary and John went to the store, John gave a drink to" -> Mary; negative ones have
a third name in its place, and no right answer. Every head's contribution to the residual stream becomes a code, and a
head scores by the codes that only positive prompts bring about (O'Neill and Bui 2024, arXiv 2405.12522). The truth here
is causal: how far the logit difference (answer minus repeated name) moves when one head alone is put at its mean over
the negative prompts. Beside the codes stands a score that needs no dictionary: the distance between a head's mean
contributions on the two kinds of prompts.

Command: python -m experiments.discrete_circuits --out runs/discrete          (SmolLM2-135M, 270 heads)
         python -m experiments.discrete_circuits --prompts 24 --causal-prompts 4 --seeds 1 --out runs/small

Measured on SmolLM2: accuracy 100 percent, logit difference 5.4 (negative prompts: 0.04). The codes do not rank single
heads: AUC of their z-score for the ten largest effects 0.57 (raw score 0.34; labels permuted 0.48; a dictionary that
was not trained 0.78), against 0.94 of the distance of means. The 20 heads of highest z are needed together all the
same: without them -0.6 of 5.8 logits are left, without 20 random heads 5.8. A likely reason, not tested: heads that
copy whichever name they find take the codes of names, on both kinds of prompts. Eight minutes with much other work on
both cores, two of them for the effects of single heads; not yet timed on quiet ones.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments.indirect_objects import DRAWS, Task, ablated_sets, indirect_objects, single_effects, task_numbers
from jaxinterp.commands.shell import (
    check_folder,
    check_positive,
    command,
    open_folder,
    print_table,
    read_json,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.evaluation.attention.discrete_codes import head_contributions, node_scores, permutation_z, roc_auc
from jaxinterp.methods.sparse.discrete_codes import DiscreteCodes, codes_of
from jaxinterp.models.load import load
from jaxinterp.models.transformer import Transformer
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.sections import Chart, Section, write_page

TOPS = (10, 20, 40)  # how many heads count as the circuit
LEVEL = 0.05  # AUCs nearer than this are called level
ABLE = 0.75  # the accuracy below which there is no circuit to look for


@dataclass(frozen=True)
class Config:
    """How many prompts, and how the codes are learned."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A known name, a Hugging Face directory, a .gguf file, or a saved jaxinterp model."""
    prompts: int = 64
    """Prompts of either kind."""
    causal_prompts: int = 16
    """Positive prompts on which every head is ablated by itself, and as many others for sets of heads."""
    features: int = 200
    """Codes."""
    l1: float = 0.02
    """Coefficient of the L1 penalty on codes."""
    steps: int = 500
    """Training steps of the codes."""
    permutations: int = 1000
    """Of the labels, for the z-score."""
    seeds: int = 3
    """Dictionaries of codes to average over."""
    seed: int = 0
    """Of the prompts and everything random."""
    resume: bool = False
    """Keep the causal effects that the folder holds."""


def main(config: Config) -> None:
    """Measure the task, the heads and the codes, and write a report."""
    check_positive(config, "prompts", "causal_prompts", "seeds")
    if 2 * config.causal_prompts > config.prompts:
        raise UserError(f"causal_prompts={config.causal_prompts} may be at most half of prompts={config.prompts}.")
    if config.permutations < 2:
        raise UserError(f"permutations={config.permutations} must be at least 2.")
    codes = DiscreteCodes(config.features, config.l1, steps=config.steps)
    if 2 * config.prompts < codes.training_examples:
        raise UserError(
            f"prompts={config.prompts} of either kind are too few: codes are trained on {codes.training_examples}."
        )
    settings = settings_of(config)
    check_folder(config.out, settings, resume=config.resume)
    started = time.perf_counter()
    subject = load(config.model)
    if subject.tokenizer is None or not isinstance(subject.model, Transformer):
        raise UserError(f"model={config.model} must be a transformer with a tokenizer.")
    heads = len(subject.model.blocks) * subject.model.config.heads
    if heads <= min(TOPS):
        raise UserError(
            f"model={config.model} has {heads} heads: a circuit of {min(TOPS)} needs more to stand out from."
        )
    task = indirect_objects(subject.tokenizer, config.prompts, config.seed)
    found = task_numbers(subject.model, task)
    say(f"accuracy {found['accuracy']:.0%}, logit difference {found['difference']:.2f}")
    if found["accuracy"] < ABLE:
        raise UserError(
            f"model={config.model} solves {found['accuracy']:.0%} of the prompts: it has no circuit for it."
        )

    out = open_folder(config.out, settings)
    kept = out / "effects.json"
    if not kept.exists():
        write_json(kept, single_effects(subject.model, task, config.causal_prompts).tolist())
    results = found | analyse(subject.model, task, np.asarray(read_json(kept)), codes, config)
    results["seconds"] = round(time.perf_counter() - started, 1)
    write_json(out / "results.json", results)
    path = report(results, settings, out / "report.html")
    first, *tops = results["auc"][0]
    print_table({first: (first, "{}")} | {top.removeprefix("AUC, "): (top, "{:.3f}") for top in tops}, results["auc"])
    say(*results["sentences"], f"{results['seconds']:.0f} s in all. Report: {path}")


def analyse(
    model: Transformer, task: Task, effects: np.ndarray, codes: DiscreteCodes, config: Config
) -> dict[str, Any]:
    """Scores of all heads against their effects, and what ablating sets of them does."""
    positive = jnp.arange(len(task.tokens)) < task.half
    everywhere = jnp.ones(task.tokens.shape).at[:, 0].set(0)  # nothing but an attention sink stands at position 0
    last = jnp.zeros(task.tokens.shape).at[:, -1].set(1)
    scores: dict[str, list[np.ndarray]] = {}
    distinct = []
    start = replace(codes, steps=1)
    key = jax.random.key(config.seed)
    for where, weight in (("mean over positions", everywhere), ("last position", last)):
        rows = eqx.filter_jit(head_contributions)(model, jnp.asarray(task.tokens), weight)
        for seed in range(config.seeds):
            own = jax.random.fold_in(key, seed)
            taken = codes_of(codes.train(rows, own), rows)
            shuffled = jax.random.permutation(jax.random.fold_in(key, 99 + seed), positive)

            def z_score(labels: Array, taken: Array = taken) -> Array:
                return permutation_z(taken, labels, codes.features, key, permutations=config.permutations)

            for name, score in {
                "codes, z": z_score(positive),
                "codes, raw": node_scores(taken, positive, codes.features),
                "codes, normalised": node_scores(taken, positive, codes.features, normalised=True),
                "codes, raw, labels permuted": node_scores(taken, shuffled, codes.features),
                "codes, z, labels permuted": z_score(shuffled),
                "codes, z, dictionary not trained": z_score(positive, codes_of(start.train(rows, own), rows)),
            }.items():
                scores.setdefault(f"{name}; {where}", []).append(np.asarray(score))
            distinct.append(np.mean([len(set(column)) for column in np.asarray(taken).T]))
        apart = jnp.linalg.norm(jnp.mean(rows[: task.half], 0) - jnp.mean(rows[task.half :], 0), axis=-1)
        scores[f"distance of means; {where}"] = [np.asarray(apart)]
    order = np.argsort(-np.abs(effects), kind="stable")
    auc = [
        {"score": name}
        | {
            f"AUC, top {top}": _auc(runs, np.isin(np.arange(len(order)), order[:top]))
            for top in TOPS
            if top < len(order)
        }
        for name, runs in scores.items()
    ]
    z = np.mean(scores["codes, z; mean over positions"], axis=0)
    rankings = {
        "highest z": np.argsort(-z, kind="stable"),
        "lowest z": np.argsort(z, kind="stable"),
        "distance of means": np.argsort(-scores["distance of means; mean over positions"][0], kind="stable"),
        "largest causal effect": order,
    }
    sets = ablated_sets(model, task, rankings, prompts=config.causal_prompts, seed=config.seed)
    heads = model.config.heads
    results = {
        "heads": [
            {"head": f"{head // heads}.{head % heads}", "effect": float(effects[head]), "z": float(z[head])}
            for head in order
        ],
        "auc": auc,
        "sets": sets,
        "distinct_codes": float(np.mean(distinct)),
        "above_two": int(np.sum(z > 2)),
    }
    return results | {"sentences": sentences(results)}


def _auc(runs: list[np.ndarray], member: np.ndarray) -> float:
    return float(np.mean([float(roc_auc(jnp.asarray(run, jnp.float32), jnp.asarray(member))) for run in runs]))


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What the numbers say, whichever way they fall."""
    auc = {row["score"]: next(value for name, value in row.items() if name != "score") for row in results["auc"]}
    z, rival = auc["codes, z; mean over positions"], auc["distance of means; mean over positions"]
    permuted = auc["codes, z, labels permuted; mean over positions"]
    untrained = auc["codes, z, dictionary not trained; mean over positions"]
    singly = "ranks" if z > 0.8 else "ranks, weakly," if z > 0.65 else "hardly ranks"
    learned = "helps" if z > untrained + LEVEL else "does not help" if z > untrained - LEVEL else "hurts"
    base, row = results["sets"][0]["highest z"], results["sets"][min(3, len(results["sets"]) - 1)]
    least = min(row["random, lowest draw"], row["lowest z"])
    if row["highest z"] < 0.5 * base and row["highest z"] < least:
        together = "the heads of highest z are needed"
    else:
        together = "the heads of highest z are not needed more than others"
    return [
        f"Head by head, the codes' z-score {singly} what single heads do: AUC {z:.2f} for the {min(TOPS)} with the "
        f"largest effects (labels permuted: {permuted:.2f}); the distance of a head's two mean contributions, without "
        f"any codes, has {rival:.2f}.",
        f"With a dictionary that was not trained, the z-score of the codes has {untrained:.2f}: training the "
        f"dictionary {learned}.",
        f"As a set, {together}: of a logit difference of {base:.2f}, ablating {row['heads']} leaves "
        f"{row['highest z']:.2f} where z is highest, {row['lowest z']:.2f} where it is lowest, "
        f"{row['random heads']:.2f} at random (lowest of {DRAWS} draws: {row['random, lowest draw']:.2f}), "
        f"{row['distance of means']:.2f} by the distance of means and {row['largest causal effect']:.2f} by single "
        "effects.",
        f"{results['above_two']} of {len(results['heads'])} heads have z above 2; a head takes "
        f"{results['distinct_codes']:.0f} codes on average.",
    ]


def report(results: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> Path:
    """The page."""
    scatter = xy_chart(
        [Series("heads", tuple((head["z"], abs(head["effect"])) for head in results["heads"]))],
        x_label="z-score of the codes",
        y_label="|effect|, logits",
        title="Effect of each head against its z-score",
    )
    names = [name for name in results["sets"][0] if name != "heads"]
    curves = xy_chart(
        [
            Series(
                name,
                tuple((float(row["heads"]), row[name]) for row in results["sets"]),
                line=True,
                emphasis=name == "highest z",
            )
            for name in names
        ],
        x_label="heads at their mean",
        y_label="logit difference",
        title="Logit difference with sets of heads ablated",
    )
    sections = [
        Section(
            "The task",
            (
                f"The model prefers the right name in {results['accuracy']:.0%} of positive prompts, by "
                f"{results['difference']:.2f} logits; on negative prompts the same difference is "
                f"{results['difference_negative']:.2f}.",
            ),
            tuple(results["heads"][:15]),
        ),
        Section("Scores against causal effects", tuple(results["sentences"]), tuple(results["auc"])),
        Section(
            "Sets of heads",
            ("The circuit is what the logit difference cannot do without.",),
            tuple(results["sets"]),
            (
                Chart("Sets of heads", "Lower is better for a score that finds the circuit.", curves),
                Chart("Single heads", "One point a head.", scatter),
            ),
        ),
    ]
    return write_page(
        path,
        title="Discrete codes and the heads of a circuit",
        subtitle=f"{settings['model']}, indirect object identification",
        summary=" ".join((results["sentences"][0], results["sentences"][2])),
        sections=sections,
        facts={name: str(value) for name, value in settings.items()},
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
