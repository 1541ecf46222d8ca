"""Are codes as long as their inputs say? The ZF plot of sparse autoencoders on a real model, and top-AFA beside TopK.

Paper: Lee et al. 2025, arXiv 2503.24277 (bounds and norms: jaxinterp/evaluation/quasi_orthogonality.py; top-AFA:
jaxinterp/methods/afa.py).

Command: python -m experiments.afa --out runs/afa                  (SmolLM2-135M, the output of blocks/1/mlp)
         python -m experiments.afa --out runs/afa-tiny --model tiny --tokens 50000 --features 256 --k 8

TopK at several k, ReLU with an L1 penalty and top-AFA at several λ are trained in one run, on the same tokens. For each
held-out token |z|, the length of the normalised input about the decoder's bias, stands against |f|, the length of its
codes. If atoms were orthogonal and reconstruction exact, all points would lie on the identity line. Three numbers say
why they do not: coherence of the atoms, ε_LBO (what coherence the gap would need at least), and a control, in which the
same codes are given to other features of the same dictionary at random: what is left of the gap there is due to the
number of dimensions, the rest to features that are active together having related directions.

Expected on SmolLM2 (6 minutes of processor time; 2.7 GB): every dictionary but top-AFA's writes codes too short for
nearly all tokens, median |f|/|z| 0.63, 0.61, 0.68 (TopK at 32, 128, 512), 0.38 (ReLU + L1) and 1.00 (top-AFA); with the
same codes at random features 0.99 to 1.09: the gap is not one of dimensions. top-AFA pays for its lengths: at the 555
features a token that it chooses (0.96 a dimension) FVU 0.128 against TopK's 0.088, at λ = 1 and 400 features 0.234
against 0.102; cross-entropies 2.951 and 2.975 against 2.946 and 2.945 (clean 2.936).
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.command import check_folder, command, open_folder, print_scoreboard
from experiments.comparison import at_l0, check_mlp, read_text, train_together
from jaxinterp.data.activations import harvest_jit
from jaxinterp.data.text import take
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.errors import UserError
from jaxinterp.evaluation.quasi_orthogonality import afa_norm, coherence, epsilon_lbo, zf_points
from jaxinterp.evaluation.scoreboard import Row, scoreboard
from jaxinterp.methods import Method, SparseAutoencoder, TopAFASparseAutoencoder
from jaxinterp.models.load import Subject, load
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.sections import Chart, Section, write_page
from jaxinterp.training.fit import check_sizes
from jaxinterp.training.mesh import parse_mesh

CLOSE = 0.05
"""A median |f|/|z| this near to 1 is on the line."""

POINTS = 500
"""Tokens of each method in the ZF plot."""


@dataclass(frozen=True)
class Config:
    """Where, how large, how long."""

    out: Path
    """Folder for the results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A known name (smollm2-135m, tiny), a Hugging Face directory, a .gguf file, or a saved jaxinterp model."""
    site: str = "blocks/1/mlp"
    """The MLP leaf whose output is taken apart."""
    features: int = 2304
    """Size of every dictionary."""
    k: int = 32
    """TopK is trained at this k, and at 4 and 16 times it."""
    afa: tuple[float, ...] = (1 / 32, 1.0)
    """λ: top-AFA is trained at each."""
    l1: float = 0.002
    """Coefficient of the L1 penalty of the ReLU autoencoder."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam, of every method."""
    text: str = "docs"
    """Training text: docs, kjv, shakespeare, several joined by +, or a path."""
    tokens: int = 160_000
    """Training tokens."""
    heldout_tokens: int = 16_384
    """Held-out tokens for FVU, L0 and the ZF plot."""
    ce_tokens: int = 2048
    """How many of them the cross-entropies are measured on."""
    seq: int = 256
    """Length of a window of text, in tokens."""
    batch_size: int = 1024
    """Tokens a step."""
    seed: int = 0
    """Of the data order and the start values, which all methods share."""
    mesh: str = "data=1,feature=1"
    """Devices along each axis."""
    resume: bool = False
    """Continue the run in the output folder."""


def methods(config: Config) -> dict[str, Method]:
    """By name.

    Raises:
      UserError: a number cannot be.
    """
    if not config.afa or min(config.afa) <= 0 or config.l1 <= 0:
        raise UserError(f"afa={config.afa} and l1={config.l1} must be positive, afa with at least one number.")
    if not 1 <= config.k <= config.features // 16:
        raise UserError(f"k={config.k} must lie between 1 and a sixteenth of features={config.features}.")
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
    console, clock = Console(), time.perf_counter()
    trained_by, mesh = methods(config), parse_mesh(config.mesh)
    steps = config.tokens // config.batch_size
    check_sizes(steps=steps, batch_size=config.batch_size, seq=config.seq, mesh=mesh)
    record = {name: value for name, value in asdict(config).items() if name not in ("out", "resume")}
    record["afa"] = list(config.afa)
    check_folder(config.out, record, resume=config.resume)

    subject = load(config.model)
    check_mlp(subject.model, config.site)
    train, heldout = read_text(
        config.text, subject, tokens=config.tokens, heldout_tokens=config.heldout_tokens, seq=config.seq
    )
    out = open_folder(config.out, record)
    console.print(f"{len(trained_by)} methods, {steps} steps of {config.batch_size} tokens, {config.site}/out")
    trained = train_together(trained_by, subject, train, config, out, tokens=config.tokens)
    console.print(f"{time.perf_counter() - clock:.0f} s so far; scoring on held-out text ...")
    board = scoreboard(
        trained.decomposition, subject, heldout, tokens=config.heldout_tokens, ce_tokens=config.ce_tokens
    )
    x = outputs(subject, heldout, config)
    lengths, clouds = {}, {}
    for name, dictionary in trained.decomposition.items():
        lengths[name], clouds[name] = measured(dictionary, x, config.seed)
    rivals = at_their_l0(board)
    sentences = reading(board, lengths, rivals, x.shape[1])
    results = {"scoreboard": board, "lengths": lengths, "top-AFA against TopK": rivals, "reading": sentences}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_scoreboard(board, console)
    print_lengths(lengths, console)
    for sentence in sentences:
        console.print(sentence)
    path = report(out, config, board, lengths, clouds, rivals, sentences)
    console.print(f"{time.perf_counter() - clock:.0f} s in all. Report: {path}")


def outputs(subject: Subject, heldout: grain.MapDataset, config: Config) -> jax.Array:
    """The MLP's held-out outputs at tokens that have weight, `[tokens, d_model]`."""
    name, parts = f"{config.site}/out", []
    for batch in take(heldout, config.heldout_tokens, seed=config.seed):
        windows = {key: jnp.asarray(batch[key]) for key in ("tokens", "weight")}
        rows = harvest_jit(subject.model, windows, (name,)).flat()
        parts.append(np.asarray(rows.arrays[name])[np.asarray(rows.weight) > 0])
    return jnp.asarray(np.concatenate(parts))


def measured(
    dictionary: Dictionary, x: jax.Array, seed: int
) -> tuple[dict[str, float], tuple[tuple[float, float], ...]]:
    """Numbers about the lengths of all tokens, and some of the points (|z|, |f|)."""
    parts = []
    order = jax.random.permutation(jax.random.key(seed), dictionary.features)
    for start in range(0, len(x), 2048):
        points = zf_points(dictionary, x[start : start + 2048])
        codes = dictionary.encode(x[start : start + 2048]).dense()
        # The same codes at other features of the same dictionary: what they would write there.
        parts.append([*points, afa_norm(codes[:, order] @ dictionary.decoder), afa_norm(codes)])
    z, f, h, written, plain = (np.concatenate([np.asarray(part[n], np.float64) for part in parts]) for n in range(5))
    # At least two atoms: with one, a gap needs no coherence to be wrong.
    some = (h > 1) & (f > 0) & (z > 0)
    ratio = (f / np.where(z > 0, z, 1.0))[some]
    needed = np.asarray(epsilon_lbo(jnp.asarray(z[some]), jnp.asarray(f[some]), jnp.asarray(h[some])), np.float64)
    eps = coherence(dictionary.decoder)
    row = {
        "under-active": float(np.mean(ratio < 1)),
        "over-active": float(np.mean(ratio > 1)),
        "|f|/|z| low quartile": float(np.quantile(ratio, 0.25)),
        "|f|/|z| median": float(np.median(ratio)),
        "|f|/|z| high quartile": float(np.quantile(ratio, 0.75)),
        "|f|/|z| shuffled": float(np.median((plain / np.where(written > 0, written, 1.0))[some])),
        "(h-1) eps_LBO": float(np.median((h[some] - 1) * needed)),
        "eps_LBO median": float(np.median(needed)),
        "eps_mean": float(eps.eps_mean),
        "eps_max": float(eps.eps_max),
        "no code": float(np.mean(h == 0)),
    }
    step = max(1, len(z) // POINTS)
    return row, tuple((float(a), float(b)) for a, b in zip(z[::step], f[::step], strict=True))


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
    board: Sequence[Row], lengths: Mapping[str, Mapping[str, float]], rivals: Sequence[Mapping[str, Any]], d: int
) -> list[str]:
    """What the numbers say, whichever way they fall."""
    said = []
    least = min(lengths, key=lambda name: abs(lengths[name]["|f|/|z| median"] - 1))
    under = [name for name, row in lengths.items() if row["|f|/|z| median"] < 1 - CLOSE]
    said.append(
        f"Codes are too short by more than {CLOSE:.0%} for most tokens in {len(under)} of {len(lengths)} dictionaries"
        f"{' (' + ', '.join(under) + ')' if under else ''}; nearest to the line is {least}, with a median |f|/|z| of "
        f"{lengths[least]['|f|/|z| median']:.2f}."
    )
    gone = [n for n in under if lengths[n]["|f|/|z| shuffled"] > (1 + lengths[n]["|f|/|z| median"]) / 2]
    low, high = (bound(row["|f|/|z| shuffled"] for row in lengths.values()) for bound in (min, max))
    said.append(
        f"With the same codes at random features of the same dictionary the medians lie from {low:.2f} to {high:.2f}; "
        f"in {len(gone)} of the {len(under)} that are too short, more than half of the gap is gone then: it comes from "
        f"features that are active together, not from having only {d} dimensions."
        if under
        else f"With the same codes at random features the medians lie from {low:.2f} to {high:.2f}."
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


def print_lengths(lengths: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """The table about lengths, in 80 columns."""
    columns = {
        "under": "under-active",
        "|f|/|z|": "|f|/|z| median",
        "shuffled": "|f|/|z| shuffled",
        "(h-1)eps": "(h-1) eps_LBO",
        "eps mean": "eps_mean",
        "eps max": "eps_max",
    }
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("method", *columns):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for name, row in lengths.items():
        table.add_row(name, *(f"{row[key]:.3f}" for key in columns.values()))
    console.print(table)


def report(
    out: Path,
    config: Config,
    board: Sequence[Row],
    lengths: Mapping[str, Mapping[str, float]],
    clouds: Mapping[str, tuple[tuple[float, float], ...]],
    rivals: Sequence[Mapping[str, Any]],
    sentences: Sequence[str],
) -> Path:
    """The page."""
    keys = ("method", "fvu", "l0", "dead_fraction", "ce_replaced", "ce_recovered_zero", "ce_recovered_mean", "kl")
    charts = tuple(
        Chart(
            name,
            f"{lengths[name]['under-active']:.0%} of tokens under-active (below the line)",
            xy_chart(
                [Series(name, points)],
                x_label="|z|: length of the input",
                y_label="|f|: length of the codes",
                title=f"ZF plot of {name}",
                identity=True,
            ),
        )
        for name, points in clouds.items()
    )
    return write_page(
        out / "report.html",
        title=f"{config.model}: {config.site}/out, lengths of codes",
        subtitle=f"{len(lengths)} sparse autoencoders, {config.features} features",
        summary=sentences[0],
        sections=[
            Section(
                "ZF plots",
                (
                    "One point a held-out token. On the dashed line codes are as long as their input, below it they "
                    "are shorter (under-active), above it longer.",
                ),
                charts=charts,
            ),
            Section(
                "Lengths and coherence",
                (
                    "Shuffled: the same codes at random features of the same dictionary. eps_LBO: the coherence that "
                    "the gap would need at least; h: active features. eps: inner products of different unit atoms.",
                ),
                tuple({"method": name, **row} for name, row in lengths.items()),
            ),
            Section("The scoreboard", rows=tuple({key: row[key] for key in keys} for row in board)),
            Section("top-AFA against TopK at its own L0", rows=tuple(rivals)),
            Section("What it says", tuple(sentences)),
        ],
        facts={name: str(value) for name, value in asdict(config).items() if name not in ("out", "resume")},
    )


if __name__ == "__main__":
    command(Config, main, __doc__)
