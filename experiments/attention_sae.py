"""Sparse autoencoders of one attention sublayer, and what their features are made of: heads and source positions.

One dictionary takes apart z, the outputs of all heads side by side, another one `out`, what they add up to. Every code
of the z dictionary is then split exactly by head and by source position (Kissane et al. 2024, arXiv 2406.17759).

Command: python -m experiments.attention_sae --out runs/attention          (SmolLM2-135M, blocks/2/attn)
         python -m experiments.attention_sae --model tiny --site blocks/1/attn --out runs/tiny-attention

Expected on SmolLM2: FVU 0.24 (z) and 0.14 (out) at L0 32, cross-entropy 3.154 and 3.156 (clean 3.155, zero 3.355, mean
3.234): both recover nearly all of so small a loss. No feature of z has half of the write vector in one of the nine
heads (largest share 0.22 on average, 0.13 for random rows). Head 1 has the largest share in 53 percent of the features;
those of head 4 read farthest back (36 tokens on average, 27 over all). 17 minutes with much other work on both cores;
not yet timed on quiet ones.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from rich.console import Console

from experiments.command import check_folder, command, open_folder, print_scoreboard
from jaxinterp.data.text import load_text, take
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.errors import UserError
from jaxinterp.evaluation.attention_attribution import (
    by_head,
    by_source,
    head_shares,
    mean_distance,
    reading,
    share_at,
    share_beyond,
)
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.methods.attention_sparse_autoencoder import AttentionSparseAutoencoder
from jaxinterp.models.attention import Attention
from jaxinterp.models.load import Subject, load
from jaxinterp.models.sites import check_site, run, select
from jaxinterp.report.features import choose, token_text
from jaxinterp.report.peaks import collect, measure
from jaxinterp.report.plots import bar_chart
from jaxinterp.report.sections import Chart, Section, write_page
from jaxinterp.training.fit import check_sizes, fit
from jaxinterp.training.mesh import make_mesh
from jaxinterp.training.tracking import JsonLines, ProgressBar

FAR = 16  # tokens back: beyond this a feature reads far
MOSTLY = 0.5  # the share from which a feature counts as one of a head, or of a distance
PEAKS = 3  # contexts of a feature, and source tokens of the first
SHARES = ("itself", "token before", "far", "window start")


@dataclass(frozen=True)
class Config:
    """What to train, on how much, and where."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A known name (smollm2-135m, tiny), a Hugging Face directory, a .gguf file, or a saved jaxinterp model."""
    site: str = "blocks/2/attn"
    """The attention leaf."""
    features: int = 2304
    """Size of each dictionary."""
    activation: Literal["topk", "batch_topk", "relu"] = "topk"
    """How codes are made sparse."""
    k: int = 32
    """Active features per token (topk, batch_topk); of other codes, how many are attributed."""
    l1: float = 0.0
    """Coefficient of the L1 penalty (relu)."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam."""
    text: str = "docs"
    """Training text, as `load_text` has it."""
    tokens: int = 400_000
    """Training tokens of each dictionary."""
    heldout_tokens: int = 32_768
    """Held-out tokens for the scoreboard."""
    ce_tokens: int = 4_096
    """How many of them the cross-entropies are measured on."""
    attributed_tokens: int = 8_192
    """Held-out tokens whose codes are split by head and source."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 2_048
    """Tokens a step."""
    examples: int = 12
    """Features shown with their contexts."""
    seed: int = 0
    """Of the data order, the start values and everything random."""
    resume: bool = False
    """Keep the dictionaries that the folder holds."""


def main(config: Config) -> None:
    """Train, score, attribute, report."""
    console, started = Console(), time.perf_counter()
    for name in ("heldout_tokens", "ce_tokens", "attributed_tokens", "examples"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1.")
    arrays: tuple[Literal["z", "out"], ...] = ("z", "out")
    methods = {array: method_of(config, array) for array in arrays}
    methods["z"].needs(config.site)
    steps = config.tokens // config.batch_size
    check_sizes(steps=steps, batch_size=config.batch_size, seq=config.seq, mesh=make_mesh())
    settings = {name: value for name, value in asdict(config).items() if name not in ("out", "resume")}
    check_folder(config.out, settings, resume=config.resume)

    subject = load(config.model)
    check_site(subject.model, f"{config.site}/z")
    attention = select(subject.model, config.site).get()
    train, heldout = load_text(
        config.text, subject.tokenizer, seq=config.seq, max_tokens=2 * (config.tokens + 10 * config.heldout_tokens)
    )
    out = open_folder(config.out, settings)
    dictionaries: dict[str, Any] = {}
    for array, method in methods.items():
        folder = out / array
        if not (folder / "dictionary.json").exists():
            console.print(f"{config.site}/{array}: {steps} steps")
            with ProgressBar(steps) as bar:
                tracks = (JsonLines(out / f"{array}.jsonl", resume=False), bar)
                trained = fit(
                    method,
                    subject,
                    train,
                    site=config.site,
                    steps=steps,
                    batch_size=config.batch_size,
                    seed=config.seed,
                    track=tracks,
                )
            save_dictionary(trained.decomposition, folder)
        dictionaries[array] = load_dictionary(folder)
    board = scoreboard(dictionaries, subject, heldout, tokens=config.heldout_tokens, ce_tokens=config.ce_tokens)
    print_scoreboard(board, console)

    z = dictionaries["z"]
    table = attribute(z, attention, subject, heldout, config)
    shares = np.asarray(head_shares(z.decoder, attention.heads))
    numbers = summarise(table, shares, chance_shares(z, attention.heads, config.seed))
    contexts = feature_examples(z, attention, subject, heldout, table, shares, config)
    results = numbers | {"scoreboard": board, "features": contexts, "seconds": round(time.perf_counter() - started, 1)}
    results["sentences"] = sentences(results, board)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    path = report(results, settings, out / "report.html")
    for sentence in results["sentences"]:
        console.print(sentence)
    console.print(f"{results['seconds']:.0f} s in all. Report: {path}")


def method_of(config: Config, array: Literal["z", "out"]) -> AttentionSparseAutoencoder:
    """The same hyperparameters for both arrays."""
    return AttentionSparseAutoencoder(
        features=config.features,
        activation=config.activation,
        k=config.k,
        l1=config.l1,
        dead_after=100_000,
        learning_rate=config.learning_rate,
        array=array,
    )


def attribute(
    dictionary: Dictionary, attention: Attention, subject: Subject, heldout: grain.MapDataset, config: Config
) -> dict[str, np.ndarray]:
    """Per feature, over the tokens where it fires: how often, shares of heads and distances, and the largest error.

    The error is that of both sums against the pre-activation, in units of the codes.
    """
    k = min(config.k, dictionary.features)
    totals: dict[str, np.ndarray] = {}
    worst = 0.0
    for batch in take(heldout, config.attributed_tokens, seed=config.seed, rows=2):
        inputs = {name: jnp.asarray(batch[name]) for name in ("tokens", "weight")}
        part, error = _attributed(dictionary, attention, subject.model, inputs, config.site, k)
        worst = max(worst, float(error))
        totals = {name: totals.get(name, 0) + np.asarray(value, np.float64) for name, value in part.items()}
    fired = np.maximum(totals["fired"], 1)
    means = {name: (value.T / fired).T for name, value in totals.items() if name != "fired"}
    return means | {"fired": totals["fired"], "error": np.array(worst)}


@eqx.filter_jit
def _attributed(
    dictionary: Dictionary, attention: Attention, model: Any, inputs: Mapping[str, Array], site: str, k: int
) -> tuple[dict[str, Array], Array]:
    trace = run(model, inputs["tokens"])
    z = trace[f"{site}/z"]
    flat = z.reshape(*z.shape[:2], -1)
    codes = dictionary.encode(flat).sparse(k)
    read = reading(dictionary, attention)
    heads = by_head(read, z, codes.indices)
    sources = by_source(read, attention, trace[f"{site}/in"], trace[f"{site}/pattern"], codes.indices)
    fires = (codes.values > 0) & (inputs["weight"][..., None] > 0)
    constant = read.constant[codes.indices]
    gaps = [jnp.abs(jnp.sum(parts, axis=-1) + constant - codes.values) for parts in (heads, sources)]
    sizes = jnp.abs(heads)
    columns = {
        "fired": jnp.ones(fires.shape),
        "distance": mean_distance(sources),
        "itself": share_at(sources, 0),
        "token before": share_at(sources, 1),
        "far": share_beyond(sources, FAR),
        "window start": jnp.abs(sources[..., 0]) / jnp.maximum(jnp.sum(jnp.abs(sources), axis=-1), 1e-30),
        "heads": sizes / jnp.sum(sizes, axis=-1, keepdims=True),
    }

    def by_feature(values: Array) -> Array:
        kept = jnp.where(fires.reshape(*fires.shape, *(1,) * (values.ndim - 3)), values, 0.0)
        return jax.ops.segment_sum(
            kept.reshape(-1, *values.shape[3:]), codes.indices.reshape(-1), num_segments=dictionary.features
        )

    error = jnp.max(jnp.where(fires, jnp.maximum(*gaps), 0.0))
    return {name: by_feature(values) for name, values in columns.items()}, error


def chance_shares(dictionary: Dictionary, heads: int, seed: int) -> np.ndarray:
    """Head shares of random rows as many and as long as the dictionary's: what it starts from."""
    return np.asarray(head_shares(jax.random.normal(jax.random.key(seed), dictionary.decoder.shape), heads))


def summarise(table: Mapping[str, np.ndarray], shares: np.ndarray, chance: np.ndarray) -> dict[str, Any]:
    """Counts and means over the features that fire on the attributed tokens."""
    live = table["fired"] > 0
    if not live.any():
        raise UserError("no feature fires on the attributed tokens: train on more tokens or take a larger k.")
    dominant, largest = shares[live].argmax(axis=1), shares[live].max(axis=1)
    return {
        "live": int(live.sum()),
        "largest_error": float(table["error"]),
        "features_by_dominant_head": np.bincount(dominant, minlength=shares.shape[1]).tolist(),
        "dominant_share": float(largest.mean()),
        "dominant_share_chance": float(chance.max(axis=1).mean()),
        "of_one_head": float((largest > MOSTLY).mean()),
        "heads_agree": float((table["heads"][live].argmax(axis=1) == dominant).mean()),
        "mean_distance": float(table["distance"][live].mean()),
        "distances": table["distance"][live].tolist(),
        "mostly": {name: float((table[name][live] > MOSTLY).mean()) for name in SHARES},
        "heads": [
            {"head": head}
            | {"features": int((dominant == head).sum())}
            | {
                name: float(table[name][live][dominant == head].mean()) if (dominant == head).any() else None
                for name in ("distance", *SHARES)
            }
            for head in range(shares.shape[1])
        ],
    }


def feature_examples(
    dictionary: Dictionary,
    attention: Attention,
    subject: Subject,
    heldout: grain.MapDataset,
    table: Mapping[str, np.ndarray],
    shares: np.ndarray,
    config: Config,
) -> list[dict[str, Any]]:
    """Some features, drawn evenly by how often they fire: their highest peaks, and what the highest one read."""
    windows = collect(heldout, config.heldout_tokens, config.seed)
    peaks = measure(dictionary, subject.model, windows, PEAKS)
    densities = np.asarray(peaks.fired, np.float64) / max(float(peaks.weight), 1.0)
    values, where, places = (np.asarray(part) for part in (peaks.values, peaks.windows, peaks.places))
    rows = []
    for j in choose(densities, config.examples, config.seed):
        row: dict[str, Any] = {"feature": f"{j}", "density": float(densities[j])}
        row |= {"head": f"{shares[j].argmax()}", "its share": float(shares[j].max())}
        row |= {name: float(table[name][j]) if table["fired"][j] else None for name in ("distance", *SHARES)}
        found = np.flatnonzero(values[j])
        texts = [[token_text(subject.tokenizer, int(t)) for t in windows[where[j, n]]["tokens"]] for n in found]
        row["highest peaks"] = "   |   ".join(_around(text, places[j, n]) for text, n in zip(texts, found, strict=True))
        tokens = jnp.asarray(windows[where[j, 0]]["tokens"])[None]
        parts = np.asarray(
            _sources(
                dictionary, attention, subject.model, tokens, config.site, jnp.asarray(j), jnp.asarray(places[j, 0])
            )
        )
        row["what the first one read"] = ", ".join(
            f"»{texts[0][s]}« {places[j, 0] - s} back ({parts[s] / np.abs(parts).sum():+.0%})"
            for s in np.argsort(-np.abs(parts))[:PEAKS]
        )
        rows.append(row)
    return rows


@eqx.filter_jit
def _sources(
    dictionary: Dictionary, attention: Attention, model: Any, tokens: Array, site: str, feature: Array, place: Array
) -> Array:
    """The part of every position of one window in a feature's pre-activation at `place`."""
    trace = run(model, tokens)
    indices = jnp.full((*tokens.shape, 1), feature)
    read = reading(dictionary, attention)
    return by_source(read, attention, trace[f"{site}/in"], trace[f"{site}/pattern"], indices)[0, place, 0]


def _around(tokens: Sequence[str], peak: int) -> str:
    before, after = tokens[max(0, peak - 8) : peak], tokens[peak + 1 : peak + 3]
    return " ".join(f"{''.join(before)}»{tokens[peak]}«{''.join(after)}".split())


def sentences(results: Mapping[str, Any], board: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers say, whichever way they fall."""
    z, out = board
    (z_low, z_high), (out_low, out_high) = z["ce_replaced_interval"], out["ce_replaced_interval"]
    apart = "a difference beyond" if z_low > out_high or out_low > z_high else "no difference beyond"
    mostly = results["mostly"]
    zero, mean = (z[name] - z["ce_clean"] for name in ("ce_zero", "ce_mean"))
    if min(zero, mean) < 0.01:
        loss = f"Ablating the sublayer costs {zero:.3f} (zero) and {mean:.3f} nats (mean): too little to recover."
    else:
        loss = (
            "Of the loss that zero ablation of the sublayer costs, the dictionary of z recovers "
            f"{z['ce_recovered_zero']:.0%} and that of out {out['ce_recovered_zero']:.0%}; of mean ablation's "
            f"{z['ce_recovered_mean']:.0%} and {out['ce_recovered_mean']:.0%}: {apart} the intervals of "
            f"{z['ce_tokens']:,} tokens."
        )
    return [
        loss,
        f"The parts by head and by source add up to every code within {results['largest_error']:.1e}.",
        f"{results['of_one_head']:.0%} of {results['live']} live features have more than half of their write vector in "
        f"one head; the largest head's share is {results['dominant_share']:.2f} on average "
        f"({results['dominant_share_chance']:.2f} for random rows). Weights and activations name the same head for "
        f"{results['heads_agree']:.0%}.",
        f"{mostly['itself']:.0%} of the features read mostly the token itself, {mostly['token before']:.0%} the token "
        f"before, {mostly['far']:.0%} mostly what stands more than {FAR} tokens back, {mostly['window start']:.0%} "
        f"mostly the window's first token; the mean distance is {results['mean_distance']:.1f} tokens.",
    ]


def report(results: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> Path:
    """The page."""
    by_head_counts = results["features_by_dominant_head"]
    counts, edges = np.histogram(results["distances"], bins=30)
    heads = bar_chart(
        np.arange(len(by_head_counts) + 1).tolist(),
        by_head_counts,
        title="Features by the head with the largest share",
        x_label="head",
        y_label="features",
    )
    distances = bar_chart(
        edges.tolist(), counts.tolist(), title="Features by mean distance", x_label="tokens back", y_label="features"
    )
    columns = ("fvu", "l0", "dead_fraction", "ce_replaced", "ce_recovered_zero", "ce_recovered_mean", "kl")
    board = tuple(
        {"array": row["writes"]} | {name.replace("_", " "): row[name] for name in columns}
        for row in results["scoreboard"]
    )
    sections = [
        Section("Scoreboard", (results["sentences"][0],), board),
        Section(
            "Heads and source positions",
            tuple(results["sentences"][1:]),
            tuple(results["heads"]),
            (
                Chart("Heads", "Live features by the head with the largest share in their write vector.", heads),
                Chart("Distances", "How far back the reasons for firing lie, on average over firings.", distances),
            ),
        ),
        Section(
            "Features",
            (
                "Drawn evenly by how often they fire. The peak stands between » and «; shares are those of the parts "
                "of the pre-activation, by size, at all its firings. Last column: the largest parts at the first peak.",
            ),
            tuple(results["features"]),
        ),
    ]
    return write_page(
        path,
        title=f"Attention-output dictionaries at {settings['site']}",
        subtitle=f"{settings['model']}, {settings['features']} features, {settings['activation']}",
        summary=results["sentences"][0],
        sections=sections,
        facts={name: str(value) for name, value in settings.items()},
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
