"""Does causal tracing say where a fact is best edited? Rank-one edits by layer, of MLP, attention and both.

    python -m experiments.editing --model smollm2-135m

Facts: "The capital of X is". Tracing: the run on another country's prompt, X's MLP (attention) output put back at the
subject's last position, by layer: which share of the difference of logits comes back. Editing, at the same layer and
position: the fact is rewritten to the other country's capital by a rank-one update, δ found by gradient steps, through
the down projection, the output projection, or both in the proportion of their traced effects (balanced). Scores, nats
or shares of facts: rewrite (the new answer above the old one), the same on a paraphrase, and harm: how much the log
probability of the right answer falls on a neighbour's prompt.

Claim: Hase et al. 2023, arXiv 2301.04213: where tracing is strong says (nearly) nothing of where editing works: R^2 of
edit success from the layer alone, and from the layer and tracing. IntAttn-Edit (recalled): balanced updates are better
than updates of the MLP alone. Verdict by: the gain in R^2; paired differences with a 95 percent interval.
Position 0 is never the edited one; its own traced effect is reported apart.
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

from jaxinterp.causal.editing import Update, balanced, edited_metric, key_readers, solve_target
from jaxinterp.causal.layerwise import Layers, layer_arrays, layer_patch_effects, stack_layers
from jaxinterp.causal.measure import LogitDifference, LogProbability
from jaxinterp.causal.tasks import Task, make_task
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import load_text
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.load import load
from jaxinterp.models.transformer import Transformer

SUBJECT = -2
"""Position of the subject's last token: before " is"."""

NAMES = {"mlp": "mlp/hidden", "attn": "attn/z"}


def covariances(layers: Layers, subject: Subject, chosen: Sequence[int], tokens: int) -> dict[tuple[str, int], Array]:
    """mean of key key^T over positions >= 1 of ordinary text, by (sublayer, layer)."""
    assert subject.tokenizer is not None
    text, _ = load_text("docs", subject.tokenizer, seq=32, max_tokens=100_000 + 4 * tokens)
    found: dict[tuple[str, int], Any] = {}
    for start in range(0, tokens // 32, 16):
        rows = jnp.asarray(np.stack([text[n]["tokens"] for n in range(start, start + 16)]))
        arrays = layer_arrays(layers, rows, tuple(NAMES.values()))
        for part, name in NAMES.items():
            for layer in chosen:
                keys = arrays[name][layer][:, 1:].reshape(16 * 31, -1)
                found[part, layer] = found.get((part, layer), 0.0) + keys.T @ keys / len(keys)
    return found


def traced(layers: Layers, task: Task) -> dict[str, np.ndarray]:
    """Share of the difference of logits that comes back, [layers, facts], at the subject and ("mlp 0") position 0."""
    clean, corrupted, metric = jnp.asarray(task.clean), jnp.asarray(task.corrupted), task.metric()
    fills = layer_arrays(layers, clean, ("mlp/out", "attn/out"))
    places = jnp.asarray([task.clean.shape[1] + SUBJECT, 0])
    effects = layer_patch_effects(layers, corrupted, metric, fills, places)
    last = layer_arrays(layers, jnp.concatenate([clean, corrupted]), ("resid/post",))["resid/post"][-1]
    both = LogitDifference(jnp.tile(metric.answer, 2), jnp.tile(metric.other, 2))
    scores = np.asarray(layers.metric(both, last))
    gap = scores[: len(task)] - scores[len(task) :]
    found = {}
    for name, effect in effects.items():
        part = name.partition("/")[0]
        found[part] = np.asarray(effect[:, :, 0]) / gap
        found[f"{part} 0"] = np.asarray(effect[:, :, 1]) / gap
    return found


def edits_of(
    layers: Layers, task: Task, layer: int, covariance: dict[tuple[str, int], Array], effect: dict[str, np.ndarray],
    steps: int,
) -> dict[str, dict[str, Update]]:  # fmt: skip
    """The three edits of every fact at one layer."""
    tokens = jnp.asarray(task.clean)
    goal = LogProbability(jnp.asarray(task.other))
    delta = solve_target(layers, tokens, goal, jnp.asarray(layer), SUBJECT, steps=steps)
    arrays = layer_arrays(layers, tokens, tuple(NAMES.values()))
    read = {
        part: key_readers(arrays[name][layer][:, SUBJECT].reshape(len(task), -1), covariance[part, layer])
        for part, name in NAMES.items()
    }
    one, other = balanced(delta, jnp.asarray(effect["mlp"][layer]), jnp.asarray(effect["attn"][layer]))
    return {
        "mlp": {"mlp": Update(read["mlp"], delta)},
        "attention": {"attention": Update(read["attn"], delta)},
        "balanced": {"mlp": Update(read["mlp"], one), "attention": Update(read["attn"], other)},
    }


def scores(layers: Layers, tasks: dict[str, Task], layer: int, edit: dict[str, Update]) -> dict[str, np.ndarray]:
    """Per fact: rewrite and paraphrase (logit of the new answer less the old one), harm to a neighbour (nats)."""
    at = jnp.asarray(layer)
    found = {}
    for name in ("fact", "paraphrase"):
        task = tasks[name]
        change = LogitDifference(jnp.asarray(task.other), jnp.asarray(task.answer))
        found[name] = np.asarray(edited_metric(layers, jnp.asarray(task.clean), change, at, **edit))
    task = tasks["fact"]
    neighbour = np.roll(np.arange(len(task)), 1)
    right = LogProbability(jnp.asarray(task.answer[neighbour]))
    tokens = jnp.asarray(task.clean[neighbour])
    found["harm"] = np.asarray(
        edited_metric(layers, tokens, right, at) - edited_metric(layers, tokens, right, at, **edit)
    )
    return found


def explained(success: np.ndarray, effect: np.ndarray) -> tuple[float, float]:
    """R^2 of success [layers, facts] from the layer alone, and from the layer and the traced effect."""
    by_layer = success.mean(axis=1, keepdims=True)
    total = ((success - success.mean()) ** 2).sum()
    rest, moved = success - by_layer, effect - effect.mean(axis=1, keepdims=True)
    slope = (rest * moved).sum() / max((moved**2).sum(), 1e-30)
    left = ((rest - slope * moved) ** 2).sum()
    return float(1 - (rest**2).sum() / total), float(1 - left / total)


def interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """Mean and 95 percent interval by bootstrap."""
    draws = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def paraphrased(subject: Subject, task: Task) -> Task:
    """The same facts in other words, of one length."""
    begin = [] if subject.tokenizer is None or subject.tokenizer.begin is None else [subject.tokenizer.begin]
    assert subject.tokenizer is not None
    rows = [begin + subject.tokenizer.encode(t.replace("capital of", "capital city of")) for t in task.texts]
    if len({len(row) for row in rows}) != 1:
        raise UserError("the paraphrases have several lengths in this tokenizer's tokens.")
    return Task("paraphrase", np.asarray(rows, np.int32), task.corrupted, task.answer, task.other, task.texts)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run it; prints and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--facts", type=int, default=12)
    parser.add_argument("--layers", nargs="+", type=int, default=list(range(0, 29, 2)))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--text-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("results/editing.json"))
    given = parser.parse_args(arguments)
    subject = load(given.model)
    if not isinstance(subject.model, Transformer):
        raise UserError(f"model={given.model!r} is a {type(subject.model).__name__}: give one that is a Transformer.")
    layers, begun = stack_layers(subject.model), time.process_time()
    whole = make_task("capitals", subject.tokenizer, prompts=2 * given.facts, seed=0)
    last = layer_arrays(layers, jnp.asarray(whole.clean), ("resid/post",))["resid/post"][-1]
    known = np.flatnonzero(np.asarray(layers.metric(whole.metric(), last)) > 0)
    print(f"the model knows {len(known)} of {len(whole)} facts (right capital above the other one)", flush=True)
    fact = whole.take([int(row) for row in known[: given.facts]])
    tasks = {"fact": fact, "paraphrase": paraphrased(subject, fact)}
    effect = traced(layers, fact)
    for part in ("mlp", "attn", "mlp 0", "attn 0"):
        print(f"traced, {part}: {[round(float(share), 2) for share in effect[part].mean(axis=1)]}", flush=True)
    covariance = covariances(layers, subject, given.layers, given.text_tokens)
    print(f"{time.process_time() - begun:.0f} CPU s", flush=True)
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for layer in given.layers:
        line = []
        for name, edit in edits_of(layers, fact, layer, covariance, effect, given.steps).items():
            own = scores(layers, tasks, layer, edit)
            for column, values in own.items():
                found.setdefault(name, {}).setdefault(column, []).append(values)
            line.append(
                f"{name} {np.mean(own['fact'] > 0):.2f}/{np.mean(own['paraphrase'] > 0):.2f}/{np.mean(own['harm']):.2f}"
            )
        print(f"layer {layer:2d} rewrite/paraphrase/harm: {'   '.join(line)}", flush=True)
    chosen = list(given.layers)
    rows: list[dict[str, Any]] = []
    for name, columns in found.items():
        table = {column: np.stack(values) for column, values in columns.items()}
        trace = effect["attn" if name == "attention" else "mlp"][chosen]
        row: dict[str, Any] = {"edit": name, "layers": chosen, "facts": len(fact), "model": given.model}
        for column, values in table.items():
            layer_only, both = explained(values, trace)
            of_means = np.corrcoef(trace.mean(axis=1), values.mean(axis=1))[0, 1]
            row |= {
                f"{column}_by_layer": values.mean(axis=1).tolist(),
                f"{column}_r2": [layer_only, both],
                f"{column}_corr": float(of_means),
            }
            print(
                f"{name:9s} {column:10s} R^2 layer {layer_only:.3f}, layer and tracing {both:.3f}; "
                f"correlation of means over layers {of_means:+.2f}"
            )
        row["rewritten_by_layer"] = (table["fact"] > 0).mean(axis=1).tolist()
        row["traced_by_layer"] = trace.mean(axis=1).tolist()
        rows.append(row)
    for column in ("fact", "paraphrase", "harm"):
        for other in ("mlp", "attention"):
            change = (np.stack(found["balanced"][column]) - np.stack(found[other][column])).mean(axis=0)
            mean, low, high = interval(change)
            print(f"balanced less {other}, {column}: {mean:+.2f} [{low:+.2f}, {high:+.2f}]")
            rows.append({"compare": ["balanced", other], "column": column, "mean": mean, "low": low, "high": high})
    print(f"{time.process_time() - begun:.0f} CPU s")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
