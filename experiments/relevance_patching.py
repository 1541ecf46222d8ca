"""Do AtP and RelP predict what patching does, on a real model? Pearson's correlation with activation patching.

    python -m experiments.relevance_patching --model smollm2-135m --tasks ioi capitals copying --prompts 4

For each task and each kind of array (`mlp/out`, `attn/out`, `resid/post`): denoise every (layer, position >= 1) of
every prompt (the truth), estimate the same by AtP, by RelP, and by RelP with some of its rules only; correlate over all
(layer, position >= 1) of a prompt; give the mean and the range over prompts. The metric is the logit difference scaled
so that clean is 1 and corrupted 0. Position 0 is reported apart, over layers.

Claim: RelP, arXiv 2508.21258, table 1: on MLP outputs of GPT-2 RelP is near .99 where AtP is near .2.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinterp.causal.attribute import attribute, summed
from jaxinterp.causal.patch import patch_effects
from jaxinterp.causal.tasks import Task, make_task, task_score
from jaxinterp.models.load import Subject, load
from jaxinterp.models.rules import EXACT, RELEVANCE, Rules
from jaxinterp.models.sites import run, sites

KINDS = ("mlp/out", "attn/out", "resid/post")
RULES = {
    "AtP": EXACT,
    "RelP": RELEVANCE,
    "norm rule": Rules(norm=True),
    "norm + half": Rules(norm=True, gate=True),
    "norm + identity": Rules(norm=True, activation=True),
    "identity + half": Rules(activation=True, gate=True),
    "half rule": Rules(gate=True),
    "RelP + attention rule": Rules(norm=True, activation=True, gate=True, attention=True),
}


def correlations(subject: Subject, task: Task, kind: str, chunk: int) -> list[dict[str, Any]]:
    """A row for every estimator: correlation with patching, prompt by prompt, positions >= 1; and position 0 apart."""
    names = sites(subject.model, f"blocks/*/{kind}")
    clean, corrupted, metric = jnp.asarray(task.clean), jnp.asarray(task.corrupted), task.metric()
    trace = run(subject.model, clean, keep=f"blocks/*/{kind}")
    fills = {name: trace[name] for name in names}
    stacked = lambda found: np.stack([np.asarray(found[name], np.float64) for name in names], axis=1)
    truth = stacked(patch_effects(subject.model, corrupted, metric, fills, chunk=chunk))
    span = np.asarray(metric(run(subject.model, clean)) - metric(run(subject.model, corrupted)))[:, None, None]
    rows = []
    for estimator, rules in RULES.items():
        found = stacked(summed(attribute(subject.model, corrupted, metric, fills, method="gradient", rules=rules)))
        late, first = (
            [_pearson((found / span)[row, :, part], (truth / span)[row, :, part]) for row in range(len(task))]
            for part in (slice(1, None), slice(0, 1))
        )
        rows.append(
            {
                "task": task.name,
                "kind": kind,
                "estimator": estimator,
                "pearson": float(np.mean(late)),
                "lowest": float(np.min(late)),
                "highest": float(np.max(late)),
                "position_0": float(np.mean(first)),
                "share_of_size": float(np.abs(found[:, :, 1:]).sum() / np.abs(truth[:, :, 1:]).sum()),
            }
        )
    return rows


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.reshape(-1), y.reshape(-1)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else float("nan")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run it; prints and writes the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["ioi", "capitals", "copying"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=4, help="patched passes at once")
    parser.add_argument("--out", type=Path, default=Path("results/relevance_patching.json"))
    given = parser.parse_args(arguments)
    subject = load(given.model)
    rows: list[dict[str, Any]] = []
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for kind in given.kinds:
        for name in given.tasks:
            task = make_task(name, subject.tokenizer, prompts=given.prompts, seed=given.seed)
            score, start = (
                task_score(subject.model, make_task(name, subject.tokenizer, prompts=16, seed=1)),
                time.time(),
            )
            print(score.sentence(), flush=True)
            found = correlations(subject, task, kind, given.chunk)
            for row in found:
                row["able"] = score.able
                print(
                    f"{row['task']:10s} {row['kind']:10s} {row['estimator']:22s} r {row['pearson']:.3f} "
                    f"[{row['lowest']:.3f}, {row['highest']:.3f}]  position 0 {row['position_0']:.3f}  "
                    f"size {row['share_of_size']:.2f}",
                    flush=True,
                )
            print(f"{time.time() - start:.0f} s", flush=True)
            rows += found
            given.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
