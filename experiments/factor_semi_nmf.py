"""Semi-NMF of a real MLP's hidden activations: error, seeds, new tokens, concept detection, and a hierarchy.

    python -m experiments.factor_semi_nmf --out runs/semi_nmf

Two texts are two concepts. Groups of neurons are fitted on both, kept neurons per group s = .05 and all (1), two seeds
each (arXiv 2506.10920). Measured: the unexplained share (uncentred, as the method minimises) beside PCA of as many
directions and beside held-out tokens by non-negative least squares; the matched cosine of the seeds; the concept score
S_CD of the best group, chosen on training windows, on held-out windows, beside the difference of means, the best
principal direction and the best single neuron (chosen alike). Then ranks K, K/2, K/4 as a hierarchy against a direct
fit of the last rank.

Expected: seeds match below .5; semi-NMF at least PCA and single neurons in detection, about the difference of means;
PCA has the lower error; the direct fit beats the hierarchy at equal rank.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.commands.shell import check_folder, command, folder_of_a_run, say, settings_of, write_json
from jaxinterp.data.activations import READ, harvest_jit, on_device
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.decompositions.nonnegative import nonnegative_least_squares, optimality_gap
from jaxinterp.evaluation.planted.recovery import match
from jaxinterp.methods.factor import semi_nmf
from jaxinterp.methods.factor.semi_nmf_tree import shared_neurons, tree
from jaxinterp.models.load import load
from jaxinterp.report.sections import Chart, Section, write_page
from jaxinterp.report.tree import tree_chart


@dataclass(frozen=True)
class Config:
    """One array, two texts."""

    out: Path
    """Folder for the results; must be empty or absent."""
    model: str = "smollm2-135m"
    """The model."""
    site: str = "blocks/8/mlp"
    """The MLP whose hidden activations are taken."""
    concept: str = "kjv"
    """The text with the concept."""
    neutral: str = "docs"
    """The text without."""
    windows: int = 64
    """Windows of each text, half of them held out."""
    seq: int = 32
    """Their length."""
    features: int = 100
    """K."""
    updates: int = 150
    """Of semi-NMF."""


def activations(subject: Any, name: str, text: str, config: Config) -> tuple[Array, Array]:
    """([windows, seq, d], weights [windows, seq])."""
    windows, _ = load_text(text, subject.tokenizer, seq=config.seq, max_tokens=300_000)
    batch = take(windows, config.windows * config.seq, rows=config.windows)[0]
    rows = harvest_jit(subject.model, on_device(batch, READ), (name,))
    weight = jnp.asarray(batch["weight"]).at[:, 0].set(0)
    return rows.arrays[name].reshape(config.windows, config.seq, -1), weight


def matched(first: Array, second: Array) -> float:
    """Mean size of the matched cosines of two sets of features."""
    return float(np.abs(match(np.asarray(first), np.asarray(second)).cosine).mean())


def main(config: Config) -> None:
    """Fit, measure, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    subject, name = load(config.model), f"{config.site}/hidden"
    half = config.windows // 2
    texts = [activations(subject, name, text, config) for text in (config.concept, config.neutral)]
    (with_a, with_w), (without_a, without_w) = texts
    flat = lambda part: jnp.concatenate([a[part][w[part] > 0] for a, w in texts])
    rows, held_out = flat(slice(None, half)), flat(slice(half, None))
    energy, held_energy = float(jnp.sum(rows**2)), float(jnp.sum(held_out**2))
    factorise = jax.jit(semi_nmf.factorise, static_argnames=("updates", "kept"))

    def detect(features: Array, part: slice) -> np.ndarray:
        return np.asarray(semi_nmf.detection(features, with_a[part], without_a[part], with_w[part], without_w[part]))

    def best(features: Array) -> dict[str, float]:
        trained = np.nan_to_num(detect(features, slice(None, half)), nan=-np.inf)
        chosen = int(np.argmax(trained))
        held = detect(features[chosen : chosen + 1], slice(half, None))
        return {"train": float(trained[chosen]), "held_out": float(held[0]), "feature": chosen}

    _, vectors = jnp.linalg.eigh(rows.T @ rows)
    principal = vectors[:, ::-1][:, : config.features].T
    mean_with = jnp.mean(with_a[:half][with_w[:half] > 0], axis=0)
    mean_without = jnp.mean(without_a[:half][without_w[:half] > 0], axis=0)
    results: dict[str, Any] = {
        "tokens": len(rows),
        "pca": {
            "fvu": 1 - float(jnp.sum((rows @ principal.T) ** 2)) / energy,
            "held_out": 1 - float(jnp.sum((held_out @ principal.T) ** 2)) / held_energy,
            "detection": best(jnp.concatenate([principal, -principal])),
        },
        "difference_of_means": best((mean_with - mean_without)[None]),
        "neurons": best(jnp.eye(rows.shape[1])),
        "semi_nmf": {},
    }
    for sparsity in (0.05, 1.0):
        kept, found = semi_nmf.kept_entries(sparsity, rows.shape[1]), []
        for seed in (0, 1):
            start = semi_nmf.random_start(jax.random.key(seed), len(rows), config.features)
            found.append(factorise(rows, start, updates=config.updates, kept=kept))
        features = found[0].factors.features
        codes = nonnegative_least_squares(held_out, features)
        results["semi_nmf"][str(sparsity)] = {
            "fvu": [float(jnp.min(one.losses)) / energy for one in found],
            "rises": [int((np.diff(np.asarray(one.losses)) > 0).sum()) for one in found],
            "matched_seeds": matched(*(one.factors.features for one in found)),
            "held_out": float(semi_nmf.squared_error(held_out, features, codes)) / held_energy,
            "gap": float(jnp.mean(optimality_gap(held_out, features, codes))),
            "active": float(jnp.mean(jnp.sum(codes > 0, axis=1))),
            "detection": [best(one.factors.features) for one in found],
        }
        say(f"s={sparsity}: {results['semi_nmf'][str(sparsity)]}")
        if sparsity == 1.0:
            continue
        ranks, below, starts = (config.features // 2, config.features // 4), config.features, []
        for rank in ranks:
            starts.append(semi_nmf.random_start(jax.random.key(rank), below, rank))
            below = rank
        levels = semi_nmf.hierarchy(features, starts, updates=config.updates, kept=kept)
        direct = factorise(
            rows, semi_nmf.random_start(jax.random.key(9), len(rows), ranks[-1]), updates=config.updates, kept=kept
        )
        first = found[0].factors.coefficients
        results["hierarchy"] = {
            "ranks": list(ranks),
            "fvu": [float(jnp.sum((rows - semi_nmf.compose(first, levels[:depth])) ** 2)) / energy for depth in (1, 2)],
            "direct": float(jnp.min(direct.losses)) / energy,
        }
        say(f"hierarchy: {results['hierarchy']}")
        branches = tree(levels)
        groups = shared_neurons(features, branches[0].parent)
        results["tree"] = [{"parent": one.parent.tolist(), "share": one.share.tolist()} for one in branches]
        results["shared_neurons"] = groups
    say(*(f"{key}: {results[key]}" for key in ("pca", "difference_of_means", "neurons")))
    with folder_of_a_run(config.out, settings_of(config)) as out:
        write_json(out / "results.json", results)
        chart = tree_chart(
            [b.parent for b in branches], [b.share for b in branches], "Groups of neurons, and their parents"
        )
        shared = tuple(
            {
                "parent": parent,
                "children": int(np.sum(branches[0].parent == parent)),
                "shared neurons": len(neurons),
                "the most shared": ", ".join(map(str, neurons[:8])),
            }
            for parent, neurons in groups.items()
        )
        path = write_page(
            out / "report.html",
            title=f"{config.model}: {name}, semi-NMF",
            subtitle=f"{len(rows):,} tokens, {config.features} groups of neurons",
            summary="A hierarchy of groups of neurons; what the children of a parent share.",
            sections=[
                Section("Tree", charts=(Chart("Groups and parents", "Wider lines: larger shares.", chart),), wide=True),
                Section("Neurons that children share", (), shared),
            ],
            facts={key: str(value) for key, value in settings_of(config).items()},
        )
        say(f"Page: {path}")


if __name__ == "__main__":
    command(Config, main, __doc__)
