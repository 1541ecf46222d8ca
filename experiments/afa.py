"""Are codes as long as their inputs say? The ZF plot of sparse autoencoders on a real model, and top-AFA beside TopK.

Paper: Lee et al. 2025, arXiv 2503.24277 (bounds and norms: jaxinterp/evaluation/quasi_orthogonality.py; top-AFA:
jaxinterp/methods/sparse/afa.py).

Command: python -m experiments.afa --out runs/afa                  (SmolLM2-135M, the output of blocks/1/mlp)
         python -m experiments.afa --out runs/afa-tiny --model tiny --tokens 50000 --features 256 --k 8

TopK at several k, ReLU with an L1 penalty and top-AFA at several λ are trained in one run, on the same tokens. For each
held-out token |z|, the length of the normalised input about the decoder's bias, stands against |f|, the length of its
codes. If atoms were orthogonal and reconstruction exact, all points would lie on the identity line. |f|/|z| is reported
with its two factors: |f|/|fD| (fD: what the codes write), which is below 1 where features that are active together have
related directions, and |fD|/|z|, below 1 where something is not reconstructed. A control gives the same codes to other
features of the same dictionary at random: what |f|/|fD| lacks then is due to the number of dimensions. Beside them: the
coherence of the atoms, and ε_LBO, what coherence the gap would need at least.

Measured (2304 features, 160,000 tokens): median |f|/|z| .63, .61, .68 (TopK at 32, 128, 512), .38 (ReLU + L1) and 1.00
(top-AFA); its factors |f|/|fD| .74, .67, .70, .61, .91 to .97, and |fD|/|z| .89, .92, .97, .64, 1.03 to 1.10. With the
same codes at random features |f|/|fD| is .99 to 1.09: TopK's gap is one of related features that are active together.
Top-AFA pays for its lengths: at the 558 features a token that it chooses (.97 a dimension) FVU .133 against .088 of
TopK, at λ = 1 and 321 features .265 against .114; cross-entropies 2.949 and 2.958 against 2.944 (clean 2.936).
17 minutes on two cores that had other work to do; 2.7 GB.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax

from jaxinterp.commands.on_text import OnText, Prepared, prepared, train_together
from jaxinterp.commands.shell import (
    Columns,
    check_distinct,
    command,
    measured_on,
    print_scoreboard,
    print_table,
    say,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import harvested
from jaxinterp.data.text.load_text import take
from jaxinterp.evaluation.equal_sparsity import at_l0
from jaxinterp.evaluation.quasi_orthogonality import Lengths, code_lengths
from jaxinterp.evaluation.scoreboard import Row, scoreboard
from jaxinterp.methods import Method, SparseAutoencoder, TopAFASparseAutoencoder
from jaxinterp.models.load import Subject
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.sections import Chart, Section, write_page

CLOSE = 0.05
"""A ratio of lengths this near to 1 counts as 1."""

POINTS = 500
"""Tokens of each method in the ZF plot."""


@dataclass(frozen=True)
class Config(OnText):
    """Where, how large, how long."""

    k: int = 32
    """TopK is trained at this k, and at 4 and 16 times it."""
    afa: tuple[float, ...] = (1 / 32, 1.0)
    """λ: top-AFA is trained at each."""
    l1: float = 0.002
    """Coefficient of the L1 penalty of the ReLU autoencoder."""
    tokens: int = 160_000
    heldout_tokens: int = 16_384
    ce_tokens: int = 2048


def methods(config: Config) -> dict[str, Method]:
    """By name.

    Raises:
      UserError: a number is invalid.
    """
    if not config.afa or min(config.afa) <= 0 or config.l1 <= 0:
        raise UserError(f"afa={config.afa} and l1={config.l1} must be positive, afa with at least one number.")
    if not 2 <= config.k <= config.features // 16:
        raise UserError(f"k={config.k} must lie between 2 and a sixteenth of features={config.features}.")
    check_distinct("afa", [f"{value:.3g}" for value in config.afa])
    shared: dict[str, Any] = {
        "features": config.features,
        "learning_rate": config.learning_rate,
        "dead_after": max(1, config.tokens // 5),
    }
    topk: dict[str, Method] = {
        f"topk {k}": SparseAutoencoder(k=k, **shared) for k in (config.k, 4 * config.k, 16 * config.k)
    }
    relu: dict[str, Method] = {"relu L1": SparseAutoencoder(activation="relu", l1=config.l1, **shared | {"auxk": 0.0})}
    return topk | relu | {f"top-AFA {value:.3g}": TopAFASparseAutoencoder(afa=value, **shared) for value in config.afa}


def main(config: Config) -> None:
    """Train, score, measure, report."""
    clock = time.perf_counter()
    trained_by = methods(config)
    ready = prepared(config)
    say(f"{len(trained_by)} methods, {config.steps} steps of {config.batch_size} tokens, {config.site}/out")
    trained = train_together(trained_by, ready, config)
    say(f"{time.perf_counter() - clock:.0f} s so far; scoring on held-out text ...")
    board = scoreboard(
        trained.decomposition, ready.subject, ready.heldout, tokens=config.heldout_tokens, ce_tokens=config.ce_tokens
    )
    x = outputs(ready.subject, ready.heldout, config)
    found = {name: code_lengths(one, x, jax.random.key(config.seed)) for name, one in trained.decomposition.items()}
    lengths = {name: one.numbers for name, one in found.items()}
    rivals = at_their_l0(board)
    sentences = reading(lengths, rivals, x.shape[1])
    kept = {"scoreboard": board, "lengths": lengths, "top-AFA against TopK": rivals, "reading": sentences}
    write_json(ready.out / "results.json", kept)
    print_scoreboard(board)
    print_table(COLUMNS, [{"method": name} | numbers for name, numbers in lengths.items()])
    say(*sentences)
    path = report(config, ready, board, found, rivals, sentences)
    say(f"{time.perf_counter() - clock:.0f} s in all. Report: {path}")


COLUMNS: Columns = {
    "method": ("method", "{}"),
    "|f|/|z|": ("|f|/|z| median", "{:.3f}"),
    "|f|/|fD|": ("|f|/|fD| median", "{:.3f}"),
    "|fD|/|z|": ("|fD|/|z| median", "{:.3f}"),
    "shuffled": ("|f|/|fD| shuffled", "{:.3f}"),
    "(h-1)eps": ("(h-1) eps_LBO", "{:.3f}"),
    "eps mean": ("eps_mean", "{:.3f}"),
    "eps max": ("eps_max", "{:.3f}"),
}


def outputs(subject: Subject, heldout: grain.MapDataset, config: Config) -> jax.Array:
    """The MLP's held-out outputs at tokens that have weight, `[tokens, d_model]`."""
    name = f"{config.site}/out"
    return harvested(subject.model, take(heldout, config.heldout_tokens, seed=config.seed), (name,))[name]


def at_their_l0(board: Sequence[Row]) -> list[dict[str, Any]]:
    """Every top-AFA against TopK at the L0 that top-AFA chose, measured or between two k (linear in log L0)."""
    topk = [row for row in board if row["method"].startswith("topk")]
    rows = []
    for row in board:
        if row["method"].startswith("top-AFA"):
            other = at_l0(topk, row["l0"])
            rows.append(
                {
                    "method": row["method"],
                    "L0": row["l0"],
                    "FVU": row["fvu"],
                    "TopK FVU": other["fvu"],
                    "CE": row["ce_replaced"],
                    "TopK CE": other["ce_replaced"],
                    "TopK L0": other["l0"],
                    "TopK read off": other["how"],
                }
            )
    return rows


def reading(
    lengths: Mapping[str, Mapping[str, float | None]], rivals: Sequence[Mapping[str, Any]], d: int
) -> list[str]:
    """What the numbers say, whichever way they fall."""
    known = {name: row for name, row in lengths.items() if row["|f|/|z| median"] is not None}
    said = []
    if len(known) < len(lengths):
        lone = ", ".join(name for name in lengths if name not in known)
        said.append(f"No token has two active features in: {lone}. Nothing is said of their lengths.")
    if known:
        said += of_lengths(
            {name: {key: float(value or 0) for key, value in row.items()} for name, row in known.items()}, d
        )
    for row in rivals:
        if row["TopK read off"] == "nearest":
            said.append(
                f"{row['method']} has {row['L0']:.0f} active features, which no k of TopK is near: not compared."
            )
            continue
        share = row["FVU"] / row["TopK FVU"] - 1
        more = "as much" if abs(share) < 0.02 else "less" if share < 0 else "more"
        said.append(
            f"{row['method']} has {row['L0']:.0f} active features ({row['L0'] / d:.2f} a dimension) and leaves {more} "
            f"variance unexplained {'as' if more == 'as much' else 'than'} TopK there ({row['FVU']:.3f} and "
            f"{row['TopK FVU']:.3f}), at a cross-entropy of {row['CE']:.3f} and {row['TopK CE']:.3f}."
        )
    said.append("One seed, one layer, a short run with one learning rate for all.")
    return said


def of_lengths(lengths: Mapping[str, Mapping[str, float]], d: int) -> list[str]:
    """Which codes are too short, by which of the two factors, and whether that is for having only d dimensions."""
    ratio, related, rest, shuffled = (
        {name: row[key] for name, row in lengths.items()}
        for key in ("|f|/|z| median", "|f|/|fD| median", "|fD|/|z| median", "|f|/|fD| shuffled")
    )
    least = min(ratio, key=lambda name: abs(ratio[name] - 1))
    under = [name for name in ratio if ratio[name] < 1 - CLOSE]
    said = [
        f"Codes are too short by more than {CLOSE:.0%} for most tokens in {len(under)} of {len(ratio)} dictionaries"
        f"{' (' + ', '.join(under) + ')' if under else ''}; nearest to the line is {least}, with a median |f|/|z| of "
        f"{ratio[least]:.2f}."
    ]
    if not under:
        return said
    factors = "; ".join(f"{name} {ratio[name]:.2f} = {related[name]:.2f} and {rest[name]:.2f}" for name in under)
    said.append(
        "Two factors make a length, |f|/|fD| for directions and |fD|/|z| for what is reconstructed (medians, whose "
        f"product need not be exact): {factors}."
    )
    complete = [name for name in under if related[name] >= 1 - CLOSE]
    if complete:
        said.append(f"In {', '.join(complete)} codes are too short only for what is not reconstructed.")
    gone = [name for name in under if name not in complete and shuffled[name] > (1 + related[name]) / 2]
    if gone:
        low, high = (bound(shuffled[name] for name in gone) for bound in (min, max))
        said.append(
            f"In {', '.join(gone)} more than half of what |f|/|fD| lacks is gone with the same codes at random "
            f"features (medians {low:.2f} to {high:.2f}): it comes from related directions of features "
            f"that are active together, not from having only {d} dimensions."
        )
    left = [name for name in under if name not in complete and name not in gone]
    if left:
        said.append(
            f"In {', '.join(left)} most of what |f|/|fD| lacks is there with the same codes at random features too: it "
            "is not one of which features are active together."
        )
    return said


def report(
    config: Config,
    ready: Prepared,
    board: Sequence[Row],
    found: Mapping[str, Lengths],
    rivals: Sequence[Mapping[str, Any]],
    sentences: Sequence[str],
) -> Path:
    """The page."""
    keys = ("method", "fvu", "l0", "dead_fraction", "ce_replaced", "ce_recovered_zero", "ce_recovered_mean", "kl")
    return write_page(
        ready.out / "report.html",
        title=f"{config.model}: {config.site}/out, lengths of codes",
        subtitle=f"{len(found)} sparse autoencoders, {config.features} features",
        summary=sentences[0],
        sections=[
            Section(
                "ZF plots",
                ("One point a held-out token. On the dashed line codes are as long as their input.",),
                charts=tuple(zf_plot(name, one) for name, one in found.items()),
            ),
            Section(
                "Lengths and coherence",
                (
                    "|f|/|z| is |f|/|fD| times |fD|/|z| (fD: what the codes write). Shuffled: the same codes at random "
                    "features of the same dictionary. eps_LBO: the coherence that the gap would need at least; h: "
                    "active features. eps: inner products of different unit atoms.",
                ),
                tuple({"method": name, **one.numbers} for name, one in found.items()),
            ),
            Section("The scoreboard", (measured_on(board),), tuple({key: row[key] for key in keys} for row in board)),
            Section("top-AFA against TopK at its own L0", rows=tuple(rivals)),
            Section("What it says", tuple(sentences)),
        ],
        facts=ready.facts,
    )


def zf_plot(name: str, lengths: Lengths) -> Chart:
    """|f| against |z|, for some of the tokens."""
    step = max(1, len(lengths.inputs) // POINTS)
    points = tuple(zip(lengths.inputs[::step].tolist(), lengths.codes[::step].tolist(), strict=True))
    under = lengths.numbers["under-active"]
    return Chart(
        name,
        "no token has two active features" if under is None else f"{under:.0%} of tokens under-active (below the line)",
        xy_chart(
            [Series(name, points)],
            x_label="|z|: length of the input",
            y_label="|f|: length of the codes",
            title=f"ZF plot of {name}",
            identity=True,
        ),
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
