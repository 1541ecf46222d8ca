"""Sparse autoencoders of one attention sublayer, and what their features are made of: heads and source positions.

One dictionary takes apart z, the outputs of all heads side by side, another one `out`, what they add up to. Every code
of the z dictionary is then split exactly by head and by source position (Kissane et al. 2024, arXiv 2406.17759).

Command: python -m experiments.attention_sae --out runs/attention          (SmolLM2-135M, blocks/2/attn)
         python -m experiments.attention_sae --model tiny --site blocks/1/attn --out runs/tiny-attention

Measured on SmolLM2: FVU 0.24 (z) and 0.14 (out) at L0 32, cross-entropy 3.154 and 3.156 (clean 3.155, zero 3.355, mean
3.234): both recover nearly all of so small a loss. No feature of z has half of the write vector in one of the nine
heads (largest share 0.22 on average, 0.13 for random rows). Head 1 has the largest share in 53 percent of the features;
those of head 4 read farthest back (36 tokens on average, 27 over all). 17 minutes with much other work on both cores;
not yet timed on quiet ones.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxinterp.commands.on_text import OnText, Prepared, prepared
from jaxinterp.commands.shell import (
    check_positive,
    command,
    folder_of_a_run,
    measured_on,
    print_scoreboard,
    say,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.files import load_dictionary, save_dictionary
from jaxinterp.evaluation.attention.attribution import head_shares
from jaxinterp.evaluation.attention.features import FAR, attribute, chance_shares, summarise
from jaxinterp.evaluation.equal_sparsity import order
from jaxinterp.evaluation.scoreboard import scoreboard
from jaxinterp.methods.sparse.attention_sparse_autoencoder import AttentionSparseAutoencoder
from jaxinterp.models.sites import check_site, select
from jaxinterp.report.attention_features import feature_examples
from jaxinterp.report.plots import bar_chart
from jaxinterp.report.sections import Chart, Section, write_page
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import parse_mesh
from jaxinterp.training.tracking import JsonLines

ARRAYS: tuple[Literal["z", "out"], ...] = ("z", "out")


@dataclass(frozen=True)
class Config(OnText):
    """What to train, on how much, and where."""

    site: str = "blocks/2/attn"
    """The attention leaf."""
    activation: Literal["topk", "batch_topk", "relu"] = "topk"
    """How codes are made sparse."""
    k: int = 32
    """Active features per token (topk, batch_topk); of other codes, how many are attributed."""
    l1: float = 0.0
    """Coefficient of the L1 penalty; relu needs one."""
    ce_tokens: int = 4_096
    attributed_tokens: int = 8_192
    """Held-out tokens whose codes are split by head and source."""
    batch_size: int = 2_048
    examples: int = 12
    """Features shown with their contexts."""


def main(config: Config) -> None:
    """Train, score, attribute, report."""
    started = time.perf_counter()
    check_positive(config, "k", "attributed_tokens", "examples")
    if config.activation == "relu" and config.l1 <= 0:
        raise UserError(f"l1={config.l1} must be positive where activation=relu: nothing else makes codes sparse.")
    method_of(config, "z").needs(config.site)
    ready = prepared(config, check=lambda model, site: check_site(model, f"{site}/z"))
    attention = select(ready.subject.model, config.site).get()
    dictionaries: dict[str, Any] = {array: trained(config, ready, array) for array in ARRAYS}
    board = scoreboard(
        dictionaries, ready.subject, ready.heldout, tokens=config.heldout_tokens, ce_tokens=config.ce_tokens
    )
    print_scoreboard(board)
    write_json(ready.out / "results.json", {"scoreboard": board})

    z, heads, model = dictionaries["z"], attention.heads, ready.subject.model
    options: dict[str, Any] = {"tokens": config.attributed_tokens, "seed": config.seed}
    table = attribute(z, attention, model, ready.heldout, config.site, k=config.k, **options)
    shares = np.asarray(head_shares(z.decoder, heads))
    numbers = summarise(table, shares, chance_shares(z, heads, config.seed))
    options = {"examples": config.examples, "tokens": config.heldout_tokens, "seed": config.seed}
    contexts = feature_examples(z, attention, ready.subject, ready.heldout, config.site, table, shares, **options)
    results = numbers | {"scoreboard": board, "features": contexts, "seconds": round(time.perf_counter() - started, 1)}
    results["sentences"] = sentences(results, board)
    write_json(ready.out / "results.json", results)
    path = report(results, ready.facts, ready.out / "report.html")
    say(*results["sentences"], f"{results['seconds']:.0f} s in all. Report: {path}")


def trained(config: Config, ready: Prepared, array: Literal["z", "out"]) -> Any:
    """The dictionary of one array: the one that the folder holds, or a new one, which is kept there."""
    with folder_of_a_run(ready.out, ready.record) as out:
        folder = out / array
        if not (folder / "decomposition.json").exists():
            say(f"{config.site}/{array}: {config.steps} steps")
            found = fit(
                method_of(config, array),
                ready.subject,
                ready.train,
                site=config.site,
                steps=config.steps,
                batch_size=config.batch_size,
                seed=config.seed,
                mesh=parse_mesh(config.mesh),
                track=(JsonLines(out / f"{array}.jsonl", resume=False),),
            )
            save_dictionary(found.decomposition, folder)
    return load_dictionary(folder)


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


def sentences(results: Mapping[str, Any], board: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers say, whichever way they fall."""
    z, out = board
    apart = "no difference beyond" if order(z, out) == "level" else "a difference beyond"
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


def report(results: Mapping[str, Any], facts: Mapping[str, str], path: Path) -> Path:
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
        Section("Scoreboard", (results["sentences"][0], measured_on(results["scoreboard"])), board),
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
        title=f"Attention-output dictionaries at {facts['site']}",
        subtitle=f"{facts['model']}, {facts['features']} features, {facts['activation']}",
        summary=results["sentences"][0],
        sections=sections,
        facts=facts,
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
