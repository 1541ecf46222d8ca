"""Do AtP and RelP predict what patching does, on a real model? Pearson's correlation with activation patching.

    python -m experiments.relevance_patching --model smollm2-135m --tasks ioi capitals copying --prompts 8

For each task and each kind of array (`mlp/out`, `attn/out`, `resid/post`): denoise every (layer, position >= 1) of
every prompt (the truth), estimate the same by AtP, by RelP, and by RelP with some of its rules only; correlate over all
(layer, position >= 1) of a prompt; give the mean and the range over prompts, and for how many prompts the estimator
beats AtP. Positions before the first token in which the two prompts differ are not run: their effect is 0 in truth and
estimate. Position 0 is reported apart, over layers; NaN where the two prompts agree there.

Rows are written as they come; a second call goes on where the first stopped.

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

from jaxinterp.causal.layerwise import layer_arrays, layer_attributions, layer_patch_effects, stack_layers
from jaxinterp.causal.tasks import Task, make_task, task_score
from jaxinterp.core.errors import UserError
from jaxinterp.models.load import load
from jaxinterp.models.rules import EXACT, RELEVANCE, Rules
from jaxinterp.models.transformer import Transformer

KINDS = ("mlp/out", "attn/out", "resid/post")
RULES = {
    "AtP": EXACT,
    "RelP": RELEVANCE,
    "norm rule": Rules(norm=True),
    "identity rule": Rules(activation=True),
    "half rule": Rules(gate=True),
    "norm + half": Rules(norm=True, gate=True),
    "norm + identity": Rules(norm=True, activation=True),
    "identity + half": Rules(activation=True, gate=True),
    "attention rule": Rules(attention=True),
    "RelP + attention rule": Rules(norm=True, activation=True, gate=True, attention=True),
}


def estimates(layers: Any, task: Task, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
    """The clean arrays by kind, and by estimator and kind what it says, [layers, batch, seq]."""
    corrupted, metric = jnp.asarray(task.corrupted), task.metric()
    fills = layer_arrays(layers, jnp.asarray(task.clean), tuple(kinds))
    found = {}
    for name, rules in RULES.items():
        values = layer_attributions(layers, corrupted, metric, fills, rules)
        found[name] = {kind: np.asarray(value, np.float64) for kind, value in values.items()}
    return fills, found


def truth(layers: Any, task: Task, kind: str, fills: Any) -> np.ndarray:
    """The effect of denoising, [layers, batch, seq]; positions before the first difference have none."""
    first = int(np.argmax((task.clean != task.corrupted).any(axis=0)))
    positions = np.arange(first, task.clean.shape[1])
    effects = layer_patch_effects(
        layers, jnp.asarray(task.corrupted), task.metric(), {kind: fills[kind]}, jnp.asarray(positions)
    )[kind]
    whole = np.zeros((layers.count, *task.clean.shape))
    whole[:, :, positions] = np.asarray(effects)
    return whole


def rows_of(task: Task, kind: str, real: np.ndarray, found: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    """A row for every estimator: correlation with patching, prompt by prompt, positions >= 1; position 0 apart."""
    late = {
        name: [_pearson(value[kind][:, b, 1:], real[:, b, 1:]) for b in range(len(task))]
        for name, value in found.items()
    }
    rows = []
    for name, value in found.items():
        r = np.asarray(late[name])
        rows.append(
            {
                "task": task.name,
                "kind": kind,
                "estimator": name,
                "pearson": float(r.mean()),
                "lowest": float(r.min()),
                "highest": float(r.max()),
                "beats_AtP": int(np.sum(r > np.asarray(late["AtP"]))),
                "prompts": len(task),
                "position_0": _pearson(value[kind][:, :, 0], real[:, :, 0]),
                "share_of_size": float(np.abs(value[kind][:, :, 1:]).sum() / np.abs(real[:, :, 1:]).sum()),
            }
        )
    return rows


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.reshape(-1), y.reshape(-1)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else float("nan")


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['task']:10s} {row['kind']:10s} {row['estimator']:22s} r {row['pearson']:.3f} "
        f"[{row['lowest']:.3f}, {row['highest']:.3f}]  beats AtP {row['beats_AtP']}/{row['prompts']}  "
        f"position 0 {row['position_0']:.3f}  size {row['share_of_size']:.2f}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run it; prints and writes the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["ioi", "capitals", "copying"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/relevance_patching.json"))
    given = parser.parse_args(arguments)
    settings = {"model": given.model, "seed": given.seed}
    rows: list[dict[str, Any]] = json.loads(given.out.read_text()) if given.out.is_file() else []
    done = {(row["task"], row["kind"], row["prompts"], row["model"], row["seed"]) for row in rows}
    missing = {
        name: kinds
        for name in given.tasks
        if (kinds := [kind for kind in given.kinds if (name, kind, given.prompts, *settings.values()) not in done])
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if missing:
        subject = load(given.model)
        if not isinstance(subject.model, Transformer):
            raise UserError(
                f"model={given.model!r} is a {type(subject.model).__name__}: give one that is a Transformer."
            )
        layers = stack_layers(subject.model)
    for name, kinds in missing.items():
        start = time.process_time()
        task = make_task(name, subject.tokenizer, prompts=given.prompts, seed=given.seed)
        score = task_score(subject.model, make_task(name, subject.tokenizer, prompts=16, seed=given.seed + 1))
        print(f"{score.sentence()} {task.clean.shape[1]} tokens. {time.process_time() - start:.0f} CPU s", flush=True)
        fills, found = estimates(layers, task, kinds)
        print(f"estimates after {time.process_time() - start:.0f} CPU s", flush=True)
        for kind in kinds:
            real = truth(layers, task, kind, fills)
            new = [{**row, "able": score.able, **settings} for row in rows_of(task, kind, real, found)]
            for row in new:
                show(row)
            rows += new
            given.out.write_text(json.dumps(rows, indent=1) + "\n")
            print(f"{name} {kind}: {time.process_time() - start:.0f} CPU s", flush=True)
    return rows


if __name__ == "__main__":
    main()
