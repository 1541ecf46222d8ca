"""Greater-than and indirect objects from weights: which transcoder features decide, and what do they read?

    python -m experiments.weights_circuits --model smollm2-135m --task greater_than ioi --layers 20 21 22 23 24 26 29

1. The task is checked first; then transcoders of the MLPs of `--layers` are trained on other prompts of the tasks and
   on ordinary text (a small budget: the FVU at the last position of held-out prompts is reported).
2. Greedy paths (features, heads, tokens; input-invariant strengths times activation, pattern and scales) into the
   difference of logits of right and wrong answers, for held-out prompts.
3. For the features that carry most, from weights alone: what a class token (ten digits; names) drives through the head
   by which the feature is reached most (its de-embedding; of E + MLP_0(norm E), the effective embedding), and the
   logits that it writes. Greater-than is a staircase: a feature reads the digit downwards and writes it upwards or the
   reverse, so that |Spearman| with the digit is high on both sides. Control: random active features of these layers.
4. Removal of the top features at the last position (errors stay), against as many random active ones.

Claim: Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944: the greater-than circuit of GPT-2 small is found in this way.
Verdict by: top features' removal costs more than that of every random draw, and their curves are more monotone.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.causal.graphs.transcoders import Transcoders, transcoders_of
from jaxinterp.causal.layerwise import layer_arrays, stack_layers
from jaxinterp.causal.measure import spearman
from jaxinterp.causal.task_words import NAMES, OBJECTS, PLACES, WORDS
from jaxinterp.causal.tasks import Task, make_task, require_able, task_score
from jaxinterp.causal.weights_circuits import read_vector
from jaxinterp.causal.weights_paths import (
    PromptRun,
    Reading,
    head_reads,
    logit_reading,
    prompt_run,
    sources,
    weights_paths,
)
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import load_text
from jaxinterp.methods import Transcoder
from jaxinterp.models.edits import Add
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.layers import normed
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.transformer import Transformer
from jaxinterp.training.fit import fit

Feature = tuple[int, int]
"""(layer, index)."""

Head = tuple[int, int, int]
"""(layer, head, position it looks at)."""

SEQ = 20
"""Tokens of a window of training text: the longest prompt, and padding without weight behind it."""


def training_windows(
    subject: Subject, tasks: dict[str, tuple[Task, Task]], tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and weights of windows: half of them one prompt each, half ordinary text; position 0 has no weight."""
    assert subject.tokenizer is not None
    prompts = [row for train, _ in tasks.values() for row in train.clean]
    order = np.random.default_rng(0).permutation(len(prompts))[: tokens // SEQ // 2]
    ids, weight = np.zeros((2 * len(order), SEQ), np.int32), np.zeros((2 * len(order), SEQ), np.float32)
    for place, prompt in enumerate(order):
        length = len(prompts[prompt])
        ids[2 * place, :length], weight[2 * place, 1:length] = prompts[prompt], 1
    text, _ = load_text("docs", subject.tokenizer, seq=SEQ, max_tokens=100_000 + 2 * tokens)
    for place in range(len(order)):
        ids[2 * place + 1], weight[2 * place + 1] = text[place]["tokens"], text[place]["weight"]
    return ids, weight


def train(
    subject: Subject, chosen: Sequence[int], ids: np.ndarray, weight: np.ndarray, method: Transcoder, *, steps: int,
    batch_size: int,
) -> Transcoders:  # fmt: skip
    """A transcoder for each of the chosen MLPs, on activations that are harvested once."""
    assert isinstance(subject.model, Transformer)
    layers, names = stack_layers(subject.model), ("mlp/in", "mlp/out")
    kept: dict[str, list[np.ndarray]] = defaultdict(list)
    for start in range(0, len(ids) // 50 * 50, 50):
        arrays = layer_arrays(layers, jnp.asarray(ids[start : start + 50]), names)
        for name in names:
            for layer in chosen:
                kept[f"blocks/{layer}/{name}"].append(np.asarray(arrays[name][layer]))
    whole = {name: np.concatenate(parts) for name, parts in kept.items()}
    parts = {}
    for layer in chosen:
        own = [f"blocks/{layer}/{name}" for name in names]
        rows = [
            {"tokens": ids[n], "weight": weight[n], "document": np.zeros(SEQ, np.int32)}
            | {name: whole[name][n] for name in own}
            for n in range(len(whole[own[0]]))
        ]
        found = fit(
            method, subject, grain.MapDataset.source(rows), site=f"blocks/{layer}/mlp", steps=steps,
            batch_size=batch_size, progress=False,
        )  # fmt: skip
        parts[layer] = found.decomposition
        print(f"layer {layer}: {found!r}", flush=True)
    return transcoders_of(parts)


def difference(task: Task, row: int, vocabulary: int, digits: Sequence[int] = ()) -> np.ndarray:
    """The direction of logits: right answers less wrong ones; of greater-than all digits, else the two answers.

    Args:
      digits: token ids of the ten digits in order, for greater-than.
    Raises:
      UserError: greater-than without digits.
    """
    direction = np.zeros(vocabulary, np.float32)
    right, wrong = [int(task.answer[row])], [int(task.other[row])]
    if task.name == "greater_than":
        if not digits:
            raise UserError("task='greater_than' compares all digits: give their token ids, digits=[...], in order.")
        start = int(task.texts[row].split(" to the year")[0][-2])
        right, wrong = list(digits[start + 1 :]), list(digits[: start + 1])
    direction[right], direction[wrong] = 1 / len(right), -1 / len(wrong)
    return direction


def strongest(
    model: Transformer, transcoders: Transcoders, task: Task, texts: list[PromptRun], top: int, digits: Sequence[int]
) -> tuple[dict[Feature, float], dict[str, float], dict[Feature, dict[Head, float]]]:
    """Mean effects of features at the last position, shares by kind, and the heads that reach the `top` features."""
    effects: dict[Feature, float] = defaultdict(float)
    kinds: dict[str, float] = defaultdict(float)
    onward: dict[Feature, list[tuple[PromptRun, Reading]]] = defaultdict(list)
    for row, text in enumerate(texts):
        start = logit_reading(model, text, difference(task, row, model.config.vocab_size, digits))
        for source in sources(model, transcoders, text, start):
            kinds[source.kind] += abs(source.effect) / len(texts)
            if source.kind == "feature" and source.onward is not None:
                effects[source.layer, source.index] += source.effect / len(texts)
                onward[source.layer, source.index].append((text, source.onward))
    heads: dict[Feature, dict[Head, float]] = defaultdict(lambda: defaultdict(float))
    for feature in sorted(effects, key=lambda feature: -abs(effects[feature]))[:top]:
        for text, reading in onward[feature]:
            for source in sources(model, transcoders, text, reading):
                if source.kind == "head":
                    heads[feature][source.layer, source.index, source.position] += source.effect / len(texts)
    return dict(effects), dict(kinds), heads


def effective_embedding(model: Transformer, ids: Sequence[int]) -> Array:
    """E + MLP_0(norm(E)) of token ids, [tokens, d]."""
    embedded = model.embedding.token[jnp.asarray(list(ids))] * model.embedding.scale
    first = model.blocks[0]
    return embedded + first.mlp(normed(first.mlp_norm, embedded))


def curves(
    model: Transformer, transcoders: Transcoders, feature: Feature, head: tuple[int, int], ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """What each token drives through a head (de-embedding), and the logit that the feature writes to it."""
    layer, index = feature
    read = read_vector(model, transcoders, layer, index)
    reads = effective_embedding(model, ids) @ head_reads(model, head[0], read)[head[1]]
    written = transcoders.readers[transcoders.layers.index(layer)].decoder[index, 0]
    scale = model.final_norm.weight + model.final_norm.offset if model.final_norm is not None else 1.0
    table = model.embedding.token if model.unembedding is None else model.unembedding.weight.T
    return np.asarray(reads), np.asarray(table[jnp.asarray(list(ids))] @ (scale * written))


@eqx.filter_jit
def _logits(model: Transformer, tokens: Array, edits: dict[str, Add]) -> Array:
    return run(model, tokens, edits=edits).logits[:, -1]


def removal(
    model: Transformer, transcoders: Transcoders, task: Task, texts: list[PromptRun], features: Sequence[Feature],
    digits: Sequence[int],
) -> float:  # fmt: skip
    """Mean change of the difference of logits where the features' writes at the last position are taken away."""
    count, d = len(texts), model.config.d_model
    tokens = jnp.asarray(task.clean[:count])
    deltas = {layer: np.zeros((*tokens.shape, d), np.float32) for layer in transcoders.layers}
    for layer, index in features:
        place = transcoders.layers.index(layer)
        for row, text in enumerate(texts):
            written = np.asarray(transcoders.readers[place].decoder[index, 0])
            deltas[layer][row, -1] -= text.codes[place][-1, index] * written
    directions = np.stack([difference(task, row, model.config.vocab_size, digits) for row in range(count)])
    edited = {f"blocks/{layer}/mlp/out": Add(jnp.asarray(delta)) for layer, delta in deltas.items()}
    none = {name: Add(jnp.zeros_like(edit.delta)) for name, edit in edited.items()}
    before, after = (np.asarray(_logits(model, tokens, edits)) for edits in (none, edited))
    return float(((after - before) * directions).sum(axis=1).mean())


def analyse(
    model: Transformer, transcoders: Transcoders, task: Task, classes: dict[str, list[int]], *, prompts: int, top: int,
    draws: int = 5,
) -> dict[str, Any]:  # fmt: skip
    """Steps 2 to 4 for one task; `classes` are the class tokens ("digits" in order, or "names" and "others")."""
    texts = [prompt_run(model, transcoders, row) for row in task.clean[:prompts]]
    digits = classes.get("digits", [])
    effects, kinds, heads = strongest(model, transcoders, task, texts, top, digits)
    start = logit_reading(model, texts[0], difference(task, 0, model.config.vocab_size, digits))
    paths = weights_paths(model, transcoders, texts[0], start, width=40, steps=3)
    chosen = sorted(effects, key=lambda feature: -abs(effects[feature]))[:top]
    active = sorted(
        {
            (layer, int(index))
            for place, layer in enumerate(transcoders.layers)
            for text in texts
            for index in np.flatnonzero(text.codes[place][-1])
        }
        - set(chosen)
    )
    draw = np.random.default_rng(0)
    pick = lambda: [active[n] for n in draw.choice(len(active), min(len(chosen), len(active)), replace=False)]
    reached: dict[tuple[int, int], float] = defaultdict(float)
    for by_head in heads.values():
        for (layer, head, _), effect in by_head.items():
            reached[layer, head] += abs(effect)
    usual = max(reached, key=lambda head: reached[head])
    rows = []
    for kind, features in (("top", chosen), ("random", pick())):
        for feature in features:
            totals: dict[tuple[int, int], float] = defaultdict(float)
            for (layer, head, _), effect in heads.get(feature, {}).items():
                totals[layer, head] += effect
            best = max(totals, key=lambda head: abs(totals[head])) if totals else usual
            row: dict[str, Any] = {
                "kind": kind, "layer": feature[0], "index": feature[1], "effect": effects.get(feature, 0.0),
                "head": list(best),
            }  # fmt: skip
            ids = [id for members in classes.values() for id in members]
            reads, writes = curves(model, transcoders, feature, best, ids)
            if "digits" in classes:
                order = jnp.arange(len(ids), dtype=jnp.float32)
                row |= {
                    "reads": float(spearman(jnp.asarray(reads), order)),
                    "writes": float(spearman(jnp.asarray(writes), order)),
                }
            else:
                split = len(classes["names"])
                row |= {
                    "reads": _separation(reads[:split], reads[split:]),
                    "writes": _separation(writes[:split], writes[split:]),
                }
            rows.append(row)
    return {
        "task": task.name, "kinds": kinds, "features": rows,
        "heads": [[*head, effect] for head, effect in sorted(reached.items(), key=lambda pair: -pair[1])[:5]],
        "paths": [
            [[s.kind, s.layer, s.index, s.position] for s in path.sources] + [path.effect]
            for path in paths if path.sources[0].kind == "feature" and len(path.sources) > 1
        ][:8],
        "removed": removal(model, transcoders, task, texts, chosen, digits),
        "removed_random": [removal(model, transcoders, task, texts, pick(), digits) for _ in range(draws)],
    }  # fmt: skip


def _separation(names: np.ndarray, others: np.ndarray) -> float:
    """Difference of means over the standard deviation of the others."""
    return float((names.mean() - others.mean()) / (others.std() + 1e-9))


def unexplained(transcoders: Transcoders, model: Transformer, texts: Sequence[PromptRun]) -> dict[int, float]:
    """FVU of every transcoder at the last position of the prompts."""
    found = {}
    for place, layer in enumerate(transcoders.layers):
        y = np.stack([text.mlp_out[layer][-1] for text in texts])
        code = np.stack([text.codes[place][-1] for text in texts])
        guess = code @ np.asarray(transcoders.readers[place].decoder[:, 0]) + np.asarray(
            transcoders.decoder_bias[place]
        )
        found[layer] = float(((y - guess) ** 2).sum() / ((y - y.mean(0)) ** 2).sum())
    return found


def report(found: dict[str, Any]) -> None:
    """What was found, in a few lines."""
    total = sum(found["kinds"].values())
    print(f"{found['task']}: " + ", ".join(f"{kind} {value / total:.0%}" for kind, value in found["kinds"].items()))
    print("heads by which features are reached: " + ", ".join(f"{a}.{b} {c:.2f}" for a, b, c in found["heads"]))
    for kind in ("top", "random"):
        rows = [row for row in found["features"] if row["kind"] == kind]
        means = [float(np.mean([abs(row[name]) for row in rows])) for name in ("reads", "writes")]
        print(f"{kind}: {len(rows)} features, mean |reads| {means[0]:.2f}, mean |writes| {means[1]:.2f}")
    for row in found["features"][:6]:
        print(
            f"  L{row['layer']}/{row['index']} effect {row['effect']:+.3f}, head {row['head'][0]}.{row['head'][1]}: "
            f"reads {row['reads']:+.2f}, writes {row['writes']:+.2f}"
        )
    for *nodes, effect in found["paths"][:5]:
        print(f"  path {effect:+.3f}: answer <- " + " <- ".join(f"{k} {a}.{b} at {p}" for k, a, b, p in nodes))
    print(f"removed: {found['removed']:+.3f}; random: {np.round(found['removed_random'], 3).tolist()}", flush=True)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run it; prints the findings and writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", nargs="+", default=["greater_than", "ioi"])
    parser.add_argument("--layers", nargs="+", type=int, default=[20, 21, 22, 23, 24, 26, 29])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--train-prompts", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=24)
    parser.add_argument("--top", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("results/weights_circuits.json"))
    given = parser.parse_args(arguments)
    subject = load(given.model)
    model = subject.model
    if not isinstance(model, Transformer) or subject.tokenizer is None:
        raise UserError(f"model={given.model!r} must be a Transformer with a tokenizer.")
    begun = time.process_time()
    ids = {
        "digits": [subject.tokenizer.encode(f"x{digit}")[-1] for digit in range(10)],
        "names": [subject.tokenizer.encode(f" {name}")[0] for name in NAMES],
        "others": [subject.tokenizer.encode(f" {word}")[0] for word in (*PLACES, *OBJECTS, *WORDS)],
    }
    tasks = {}
    for name in given.task:
        whole = make_task(name, subject.tokenizer, prompts=given.train_prompts + 2 * given.prompts, seed=0)
        tasks[name] = whole.take(slice(2 * given.prompts, None)), whole.take(slice(2 * given.prompts))
        score = task_score(model, tasks[name][1])
        print(score.sentence(), flush=True)
        require_able(score)
    rows, weight = training_windows(subject, tasks, given.tokens)
    method = Transcoder(features=given.features, k=given.k, activation="topk", learning_rate=2e-3)
    transcoders = train(subject, given.layers, rows, weight, method, steps=given.steps, batch_size=25 * SEQ)
    print(f"{rows.size} tokens, {time.process_time() - begun:.0f} CPU s", flush=True)
    results = []
    for name, (_, test) in tasks.items():
        classes = {kind: ids[kind] for kind in (["digits"] if name == "greater_than" else ["names", "others"])}
        found = analyse(model, transcoders, test, classes, prompts=given.prompts, top=given.top)
        texts = [prompt_run(model, transcoders, row) for row in test.clean]
        found |= {"fvu": unexplained(transcoders, model, texts), "model": given.model, "tokens": given.tokens}
        report(found)
        print("FVU at the last position: " + ", ".join(f"{a} {b:.2f}" for a, b in found["fvu"].items()), flush=True)
        results.append(found)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{time.process_time() - begun:.0f} CPU s")
    return results


if __name__ == "__main__":
    main()
