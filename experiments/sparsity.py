"""Which neurons may be left out? Perplexity against sparsity for every score, on one model, at equal sparsity.

Command: python -m experiments.sparsity --out runs/sparsity --quick     16 windows of 64 tokens, under 15 CPU minutes
         python -m experiments.sparsity --out runs/sparsity             64 windows of 256

Every row leaves out the same share of neurons (of the MLP's input, for rows that say "input") of every token in every
layer: k = round((1 - sparsity) d) stay, by the score of the row. Differences between two rows are per document, with a
bootstrap interval over documents. Position 0 counts in no statistic and in no loss, and stays dense (--dense-before 0:
not): a few neurons write activations of many thousands there, and a row that drops these measures nothing else.

Claims: |a||w| is ahead of |a| and WINA of TEAL (2505.19427); CHESS is ahead of CATS (2409.01366); Wanda (2306.11695)
and DaSS (2405.01943) are ahead of magnitude; CETT-PPL-1 % (2411.02335). Resumable: rows in results.json stay.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.commands.shell import (
    check_folder,
    chosen,
    command,
    folder_of_a_run,
    read_json,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.data.activations import counted
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.evaluation.intervals import ratio_interval
from jaxinterp.evaluation.sparsity.budgets import greedy_levels, ppl_percent
from jaxinterp.evaluation.sparsity.calibrate import Summary, calibrate
from jaxinterp.evaluation.sparsity.measures import cett_threshold
from jaxinterp.models import selection
from jaxinterp.models.leave_out import Above, BySize, Core, Fixed, LeaveOut, LowRank, TopK
from jaxinterp.models.load import load
from jaxinterp.models.pruning import mask_weights, weight_mask
from jaxinterp.models.sites import Add, run, sites
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.sections import Chart, Section, write_page

PAIRS = (
    ("|a||w| (WINA, CETT)", "|a| (TEAL)"),
    ("input |x||w| (WINA)", "input |x| (TEAL)"),
    ("|s| rms(u) (CHESS)", "|s| (CATS)"),
    ("|s| rms(u)|w|", "|s| rms(u) (CHESS)"),
    ("R-Sparse", "|a||w| (WINA, CETT)"),
    ("Wanda", "magnitude"),
    ("DaSS", "magnitude"),
    ("DaSS", "Wanda"),
)
"""The first against the second."""

BLEND = 0.9
"""R-Sparse: the share of the budget that whole channels get; the low-rank path has the rest."""


@dataclass(frozen=True)
class Config:
    """Sizes."""

    out: Path
    """Folder for results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A model with gated MLPs."""
    text: str = "docs"
    """Text: the calibration windows come from its training part."""
    cache: Path = Path("runs/tokens")
    """Folder for the text's tokens."""
    windows: int = 64
    """Held-out windows."""
    calibration: int = 16
    """Windows of the training text for statistics."""
    seq: int = 256
    """Tokens a window."""
    sparsity: tuple[float, ...] = (0.25, 0.4, 0.5, 0.65, 0.8, 0.9)
    """Shares of neurons left out."""
    only: str = ""
    """Rows by name, joined by ";"; default: all."""
    percents: tuple[float, ...] = (1.0,)
    """For CETT-PPL-p %."""
    quick: bool = False
    """16 windows of 64 tokens, 8 for statistics."""
    dense_before: int = 1
    """Positions that stay as they are."""
    most_seconds: float = math.inf
    """CPU seconds after which no new row is begun; continue with --resume."""
    seed: int = 0
    """Of the sample of windows and of the random row."""
    resume: bool = False
    """Continue the run in the output folder."""


class Statistics(eqx.Module):
    """What calibration gives, by leaf."""

    hidden: dict[str, Summary]
    up: dict[str, Summary]
    inputs: dict[str, Summary]
    effect: dict[str, np.ndarray]  # E |a dL/da|
    kept: dict[str, Any]  # hidden activations of the tokens with weight, [tokens, d]
    stream: dict[str, float]  # the mean norm of resid/post


def main(config: Config) -> None:
    """Calibrate, measure every row, compare, write."""
    if config.quick:
        config = dataclasses.replace(config, windows=16, calibration=8, seq=64)
    for share in config.sparsity:
        if not 0 < share < 1:
            raise UserError(f"sparsity={share} must lie between 0 and 1.")
    record = settings_of(config, "most_seconds", "cache")
    check_folder(config.out, record, resume=config.resume)
    subject = load(config.model)
    model: Any = subject.model
    leaves = sites(model, "blocks/*/mlp")
    if not model.config.gated or model.config.mixture is not None:
        raise UserError(f"model={config.model!r} has no gated MLPs: CATS, CHESS and MAW score gates.")
    train, heldout = load_text(
        config.text,
        subject.tokenizer,
        seq=config.seq,
        max_tokens=max(2_000_000, 40 * config.seq * config.windows),
        cache=config.cache,
    )
    rows = 4
    batches = take(heldout, config.windows * config.seq, seed=config.seed, rows=rows)
    calibration = take(train, config.calibration * config.seq, seed=config.seed, rows=rows)
    with folder_of_a_run(config.out, record) as out:
        measure = Measure(model, batches)
        results = Results(out / "results.json", measure, config.most_seconds)
        dense = results.row("dense", 0.0, model, dict)
        say(f"dense: {dense['ce']:.4f} nats over {dense['tokens']} next tokens of {len(measure.documents)} documents")
        clock = time.process_time()
        stats = statistics(model, leaves, calibration)
        say(f"statistics: {time.process_time() - clock:.0f} CPU s")
        known = scores(model, leaves, stats, config)
        last = [name for name in known if name.startswith("fixed") or name == "CoreInfer"]
        others = [name for name in known if name not in last]
        names = chosen(config.only, [*others, "pruning", "CETT", "budgets", *last], ";")
        try:
            rows_of(names, known, model, leaves, stats, results, config)
        except OutOfTime:
            say(f"{config.most_seconds:g} CPU s are over: continue with --resume.")
        write(out, results, config)


def rows_of(
    names: Sequence[str],
    known: Mapping[str, Callable[[float], dict[str, Any]]],
    model: Any,
    leaves: Sequence[str],
    stats: "Statistics",
    results: "Results",
    config: Config,
) -> None:
    """Measure what is asked for and not measured yet."""
    for name in names:
        for share in config.sparsity if name in known else ():
            results.row(name, share, model, partial(known[name], share))
        if name == "pruning":
            pruning(model, leaves, stats, results)
        if name == "budgets":
            results.also("budgets", lambda: budgets(model, leaves, stats, results, config))
        for percent in config.percents if name == "CETT" else ():
            solve = partial(cett_ppl, model, leaves, stats, results, config.dense_before, percent)
            results.also(f"CETT-PPL-{percent:g}%", solve)


class Measure:
    """The loss of a model under edits, per document."""

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Any]]):
        self.batches = [
            {name: jnp.asarray(batch[name]) for name in ("tokens", "weight", "document")} for batch in batches
        ]
        every = np.concatenate([np.asarray(batch["document"])[:, :-1].reshape(-1) for batch in batches])
        weight = np.concatenate([np.asarray(counted(batch)).reshape(-1) for batch in self.batches])
        self.documents, self.place = np.unique(every, return_inverse=True)
        self.counts = np.bincount(self.place, weights=weight, minlength=len(self.documents))
        self.weight = weight

    def __call__(self, model: Any, edits: Mapping[str, Any]) -> list[float]:
        """Summed negative log-likelihood of each document, nats."""
        nll = np.concatenate([np.asarray(_nll(model, edits, batch["tokens"])).reshape(-1) for batch in self.batches])
        return np.bincount(self.place, weights=nll * self.weight, minlength=len(self.documents)).tolist()


@eqx.filter_jit
def _nll(model: Any, edits: Mapping[str, Any], tokens: Any) -> Any:
    log_p = jax.nn.log_softmax(run(model, tokens, edits=edits, keep=()).logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


class OutOfTime(Exception):
    """No new row is to be begun."""


class Results:
    """Rows by (name, sparsity), kept in a file as they come."""

    def __init__(self, path: Path, measure: Measure, most_seconds: float):
        self.path, self.measure, self.most_seconds = path, measure, most_seconds
        self.begun = time.process_time()
        self.content: dict[str, Any] = read_json(path) if path.exists() else {"rows": [], "other": {}}

    def find(self, name: str, share: float) -> dict[str, Any] | None:
        """The row, if it was measured."""
        return next((row for row in self.content["rows"] if (row["score"], row["sparsity"]) == (name, share)), None)

    def row(self, name: str, share: float, model: Any, edits: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Measure a row, or take it from the file."""
        if (found := self.find(name, share)) is not None:
            return found
        if name != "dense":  # what every other row is compared with
            self.check_time()
        clock = time.process_time()
        sums, counts = self.measure(model, edits()), self.measure.counts
        ce = sum(sums) / counts.sum()
        row = {"score": name, "sparsity": share, "ce": ce, "perplexity": math.exp(ce), "tokens": int(counts.sum())}
        self.content["rows"].append(row | {"by_document": sums})
        say(
            f"{name:22s} {share:4.0%}  ce {ce:.4f}  perplexity {math.exp(ce):9.2f}  "
            f"{time.process_time() - clock:.0f} CPU s"
        )
        self.keep()
        return self.content["rows"][-1]

    def also(self, name: str, make: Callable[[], Any]) -> Any:
        """Another result, kept under its name."""
        if name not in self.content["other"]:
            self.check_time()
            self.content["other"][name] = make()
            self.keep()
        return self.content["other"][name]

    def check_time(self) -> None:
        """Raises OutOfTime if the CPU seconds of this run are over."""
        if time.process_time() - self.begun > self.most_seconds:
            raise OutOfTime

    def keep(self) -> None:
        """Write the file."""
        write_json(self.path, self.content)

    def compared(self, first: str, second: str, share: float) -> dict[str, Any] | None:
        """ce of the first minus ce of the second, with an interval over documents."""
        a, b = self.find(first, share), self.find(second, share)
        if a is None or b is None:
            return None
        difference = np.asarray(a["by_document"]) - np.asarray(b["by_document"])
        counts = self.measure.counts
        low, high = ratio_interval(difference, counts, np.arange(len(counts)))
        mean = float(difference.sum() / counts.sum())
        return {"first": first, "second": second, "sparsity": share, "ce difference": mean, "low": low, "high": high}


def statistics(model: Any, leaves: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> Statistics:
    """Sums over the calibration text, gradients among them, and the hidden activations of its tokens."""
    ports = ("hidden", "up", "in")
    wanted = {f"{leaf}/{port}": (f"{leaf}/{port}", BySize()) for leaf in leaves for port in ports}
    found = calibrate(model, batches, wanted)
    hidden = [f"{leaf}/hidden" for leaf in leaves]
    kept: dict[str, list[Any]] = {leaf: [] for leaf in leaves}
    effect: dict[str, Any] = dict.fromkeys(leaves, 0.0)
    stream: dict[str, Any] = dict.fromkeys(leaves, 0.0)
    tokens = 0.0
    for batch in batches:
        arrays = {name: jnp.asarray(batch[name]) for name in ("tokens", "weight", "document")}
        values, gradients, norms = _gradients(model, arrays, tuple(hidden))
        weight = np.asarray(batch["weight"]) > 0
        tokens += weight.sum()
        for leaf, name in zip(leaves, hidden, strict=True):
            value = np.asarray(values[name])[weight]
            kept[leaf].append(value)
            effect[leaf] = effect[leaf] + np.abs(value * np.asarray(gradients[name])[weight]).sum(0)
            stream[leaf] += float(np.asarray(norms[name])[weight].sum())
    return Statistics(
        {leaf: found[f"{leaf}/hidden"] for leaf in leaves},
        {leaf: found[f"{leaf}/up"] for leaf in leaves},
        {leaf: found[f"{leaf}/in"] for leaf in leaves},
        {leaf: effect[leaf] / tokens for leaf in leaves},
        {leaf: jnp.asarray(np.concatenate(kept[leaf])) for leaf in leaves},
        {leaf: stream[leaf] / tokens for leaf in leaves},
    )


@eqx.filter_jit
def _gradients(model: Any, batch: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    """Hidden activations, the gradient of the summed loss by them, and the norm of the stream behind the block."""

    def loss(zeros: Any) -> Any:
        edits = {name: Add(zero) for name, zero in zeros.items()}
        trace = run(model, batch["tokens"], edits=edits, keep=("**/mlp/hidden", "**/resid/post"))
        log_p = jax.nn.log_softmax(trace.logits[:, :-1])
        nll = -jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(nll * counted(batch)), trace.arrays

    shape = (*batch["tokens"].shape, model.config.d_mlp)
    zeros = {name: jnp.zeros(shape, jnp.float32) for name in names}
    gradients, arrays = jax.grad(loss, has_aux=True)(zeros)
    norms = {name: jnp.linalg.norm(arrays[name.replace("mlp/hidden", "resid/post")], axis=-1) for name in names}
    return {name: arrays[name] for name in names}, gradients, norms


def scores(
    model: Any, leaves: Sequence[str], stats: Statistics, config: Config
) -> dict[str, Callable[[float], dict[str, Any]]]:
    """By the name of a row: sparsity -> edits."""
    mlps = {leaf: model.blocks[int(leaf.split("/")[1])].mlp for leaf in leaves}
    down = {leaf: selection.row_norms(mlp.down_proj.weight) for leaf, mlp in mlps.items()}
    both = {
        leaf: selection.row_norms(jnp.concatenate([mlp.gate_proj.weight, mlp.up_proj.weight], axis=1))
        for leaf, mlp in mlps.items()
    }
    rms = {leaf: jnp.asarray(np.sqrt(stats.up[leaf].mean_square()), jnp.float32) for leaf in leaves}
    size = {leaf: jnp.asarray(stats.hidden[leaf].mean_size(), jnp.float32) for leaf in leaves}
    act = model.config.activation
    d_mlp, d_model = model.config.d_mlp, model.config.d_model
    random = np.random.default_rng(config.seed)
    noise = {leaf: jnp.asarray(random.random(d_mlp), jnp.float32) for leaf in leaves}
    ones = lambda size: jnp.ones(size, jnp.float32)

    def rows(port: str, width: int, score: Callable[[str], Any]) -> Callable[[float], dict[str, Any]]:
        def edits(share: float) -> dict[str, Any]:
            k = jnp.asarray(round(width * (1 - share)), jnp.int32)
            return {
                f"{leaf}/{port}": LeaveOut(score(leaf), TopK(k), dense_before=config.dense_before) for leaf in leaves
            }

        return edits

    bases: dict[str, Any] = {}

    def r_sparse(share: float) -> dict[str, Any]:
        """At equal numbers of weights read: k channels and a path of rank r, k d + r (m + d) = (1 - s) m d."""
        most = round((1 - min(config.sparsity)) * (1 - BLEND) * d_mlp * d_model / (d_mlp + d_model))
        rank = round((1 - share) * (1 - BLEND) * d_mlp * d_model / (d_mlp + d_model))
        for leaf in leaves:
            if leaf not in bases:
                bases[leaf] = selection.low_rank_basis(mlps[leaf].down_proj.weight, most)
        k = jnp.asarray(round(d_mlp * (1 - share) * BLEND), jnp.int32)
        path = jnp.arange(most) < rank
        return {
            f"{leaf}/hidden": LeaveOut(BySize(down[leaf]), TopK(k), LowRank(bases[leaf] * path), config.dense_before)
            for leaf in leaves
        }

    return {
        "|a| (TEAL)": rows("hidden", d_mlp, lambda leaf: BySize(ones(d_mlp))),
        "|a||w| (WINA, CETT)": rows("hidden", d_mlp, lambda leaf: BySize(down[leaf])),
        "R-Sparse": r_sparse,
        "|s| (CATS)": rows("pre", d_mlp, lambda leaf: BySize(ones(d_mlp), act)),
        "|s| rms(u) (CHESS)": rows("pre", d_mlp, lambda leaf: BySize(rms[leaf], act)),
        "|s| rms(u)|w|": rows("pre", d_mlp, lambda leaf: BySize(rms[leaf] * down[leaf], act)),
        "input |x| (TEAL)": rows("in", d_model, lambda leaf: BySize(ones(d_model))),
        "input |x||w| (WINA)": rows("in", d_model, lambda leaf: BySize(both[leaf])),
        "CoreInfer": rows("hidden", d_mlp, lambda leaf: Core(0.4, config.seq // 4)),
        "fixed E|a| (AMP)": rows("hidden", d_mlp, lambda leaf: Fixed(size[leaf])),
        "fixed E|a||w|": rows("hidden", d_mlp, lambda leaf: Fixed(size[leaf] * down[leaf])),
        "fixed E|a grad|": rows("hidden", d_mlp, lambda leaf: Fixed(jnp.asarray(stats.effect[leaf], jnp.float32))),
        "fixed MAW": rows(
            "hidden",
            d_mlp,
            lambda leaf: Fixed(selection.peak_to_peak(mlps[leaf].gate_proj.weight, mlps[leaf].up_proj.weight)),
        ),
        "fixed random": rows("hidden", d_mlp, lambda leaf: Fixed(noise[leaf])),
    }


def pruning(model: Any, leaves: Sequence[str], stats: Statistics, results: Results) -> None:
    """All three matrices of every MLP: 50 % without structure, and 2:4."""
    for title, sparsity in (("50 %", 0.5), ("2:4", (2, 4))):
        for name in ("magnitude", "Wanda", "DaSS"):
            share = 0.5 if title == "50 %" else 0.501  # a key of its own; 2:4 is 50 %
            if results.find(name, share) is None:
                masks = prune_masks(model, leaves, stats, name, sparsity)
                results.row(name, share, mask_weights(model, masks), dict)


def prune_masks(
    model: Any, leaves: Sequence[str], stats: Statistics, name: str, sparsity: float | tuple[int, int]
) -> dict[str, Any]:
    """Masks of every MLP's matrices by a published rule."""
    masks = {}
    for leaf in leaves:
        mlp = model.blocks[int(leaf.split("/")[1])].mlp
        read, hidden = (jnp.asarray(part[leaf].norms(), jnp.float32) for part in (stats.inputs, stats.hidden))
        for field in mlp.projections():
            weight = {"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj, "down_proj": mlp.down_proj}[field].weight
            within: Any = "output"
            if name == "magnitude":
                score = selection.magnitude(weight)
                within = "layer" if isinstance(sparsity, float) else "output"
            elif name == "DaSS" and field != "down_proj":
                score, within = selection.dass(weight, hidden), "input"
            else:
                score = selection.wanda(weight, hidden if field == "down_proj" else read)
            masks[f"{leaf}/{field}"] = weight_mask(score, sparsity, within=within)
    return masks


def budgets(
    model: Any, leaves: Sequence[str], stats: Statistics, results: Results, config: Config, step: float = 0.05
) -> dict[str, Any]:
    """Levels by layer for a mean of 50 and 65 %: greedy, error |change of the MLP's output| / |stream behind it|."""
    down = {leaf: model.blocks[int(leaf.split("/")[1])].mlp.down_proj.weight for leaf in leaves}
    table: dict[tuple[str, float], float] = {}

    def error_of(leaf: str, level: float) -> float:
        key = (leaf, round(level, 6))
        if key not in table:
            k = jnp.asarray(round(stats.kept[leaf].shape[1] * (1 - level)), jnp.int32)
            table[key] = float(_output_change(stats.kept[leaf], down[leaf], k)) / stats.stream[leaf]
        return table[key]

    path = greedy_levels(lambda levels: sum(error_of(leaf, levels[leaf]) for leaf in leaves), leaves, 0.65, step=step)
    found = {}
    for mean in (0.5, 0.65):
        levels = next(each for each in path if sum(each.values()) / len(leaves) >= mean - 1e-9)
        edits = {
            f"{leaf}/hidden": LeaveOut(
                BySize(selection.row_norms(down[leaf])),
                TopK(jnp.asarray(round(stats.kept[leaf].shape[1] * (1 - levels[leaf])), jnp.int32)),
                dense_before=config.dense_before,
            )
            for leaf in leaves
        }
        results.row("|a||w|, budget by layer", mean, model, partial(dict, edits))
        found[f"{mean:g}"] = [round(levels[leaf], 3) for leaf in leaves]
    return found


@jax.jit
def _output_change(a: Any, weight: Any, k: Any) -> Any:
    mask = selection.top_k(selection.wina(a, weight), k)
    return jnp.mean(jnp.linalg.norm(jnp.where(mask, 0, a) @ weight, axis=-1))


def cett_ppl(
    model: Any, leaves: Sequence[str], stats: Statistics, results: Results, before: int, percent: float
) -> dict[str, Any]:
    """CETT-PPL-p %: one CETT for all layers, thresholds from the calibration text, loss on held-out text."""
    weights = {leaf: model.blocks[int(leaf.split("/")[1])].mlp.down_proj.weight for leaf in leaves}
    norms = {leaf: selection.row_norms(weight) for leaf, weight in weights.items()}
    dense = results.find("dense", 0.0)
    assert dense is not None
    layers: dict[float, list[float]] = {}

    def measure(target: float) -> tuple[float, float]:
        found = {}
        for leaf in leaves:
            sizes = np.asarray(stats.kept[leaf]) * np.asarray(norms[leaf])
            grid = np.quantile(np.abs(sizes), np.linspace(0, 0.99, 256))
            found[leaf] = cett_threshold(stats.kept[leaf], weights[leaf], target, candidates=grid)
        edits = {
            f"{leaf}/hidden": LeaveOut(
                BySize(norms[leaf]), Above(jnp.asarray(found[leaf].epsilon, jnp.float32)), dense_before=before
            )
            for leaf in leaves
        }
        loss = sum(results.measure(model, edits)) / results.measure.counts.sum()
        layers[target] = [found[leaf].ratio for leaf in leaves]
        ratio = float(np.mean(layers[target]))
        say(f"CETT {target:.4f}: active {ratio:.3f}, perplexity {100 * math.expm1(loss - dense['ce']):+.2f} %")
        return loss, ratio

    found = ppl_percent(measure, dense["ce"], percent, tolerance=5e-3)
    return {"CETT": found.cett, "activation ratio": found.ratio, "perplexity rise %": found.percent} | {
        "ratio by layer": [round(ratio, 3) for ratio in layers.get(found.cett, [])]
    }


def write(out: Path, results: Results, config: Config) -> None:
    """The table as markdown, comparisons, and a page with the chart."""
    rows = results.content["rows"]
    dense = rows[0]
    by_score: dict[str, dict[float, float]] = {}
    for row in rows[1:]:
        by_score.setdefault(row["score"], {})[row["sparsity"]] = row["perplexity"]
    shares = list(config.sparsity)
    table = [
        {"score": name} | {f"{share:.0%}": values.get(share) for share in shares}
        for name, values in by_score.items()
        if set(values) & set(shares) and name not in ("magnitude", "Wanda", "DaSS")
    ]
    weights = [
        {"score": name, "50 %": by_score[name].get(0.5), "2:4": by_score[name].get(0.501)}
        for name in ("magnitude", "Wanda", "DaSS")
        if name in by_score
    ]
    pairs = [
        found
        for first, second in PAIRS
        for share in [*shares, 0.501]
        if (found := results.compared(first, second, share)) is not None
    ]
    results.content["compared"] = pairs
    results.keep()
    other = results.content["other"]
    say(*markdown(dense, table, weights, pairs, other))
    (out / "table.md").write_text("\n".join(markdown(dense, table, weights, pairs, other)) + "\n")
    series = [
        Series(name, tuple((share, values[share] / dense["perplexity"]) for share in shares if share in values), True)
        for name, values in by_score.items()
        if len(set(values) & set(shares)) > 2
    ]
    chart = xy_chart(
        series,
        x_label="share of neurons left out",
        y_label="perplexity, relative to dense",
        title="Perplexity against sparsity",
        log_y=True,
        width=900,
        height=520,
    )
    write_page(
        out / "report.html",
        title="Sparsity",
        subtitle=f"{config.model} on {config.text}",
        summary=f"Dense perplexity {dense['perplexity']:.2f} over {dense['tokens']} next tokens.",
        sections=(
            Section("Perplexity", (), tuple(table), (Chart("By sparsity", "every token, every layer", chart),), True),
            Section("Weights of the MLPs", (), tuple(weights)),
            Section("Differences, nats, 95 % over documents", (), tuple(pairs)),
        ),
        facts={name: str(value) for name, value in settings_of(config, "most_seconds", "cache").items()},
    )


def markdown(
    dense: Mapping[str, Any],
    table: Sequence[Mapping[str, Any]],
    weights: Sequence[Mapping[str, Any]],
    pairs: Sequence[Mapping[str, Any]],
    other: Mapping[str, Any],
) -> list[str]:
    """The results as lines of markdown."""
    lines = [f"Dense perplexity {dense['perplexity']:.2f} over {dense['tokens']} next tokens.", ""]
    for part in (table, weights):
        if part:
            lines += [
                "| " + " | ".join(name.replace("|", "\\|") for name in part[0]) + " |",
                "|" + "---|" * len(part[0]),
                *("| " + " | ".join(_cell(value) for value in row.values()) + " |" for row in part),
                "",
            ]
    if pairs:
        lines += ["| nats: first - second | at | difference | 95 % over documents |", "|---|---|---|---|"]
    for row in pairs:
        at = "2:4" if row["sparsity"] == 0.501 else f"{row['sparsity']:.0%}"
        names = f"{_cell(row['first'])} - {_cell(row['second'])}"
        lines.append(f"| {names} | {at} | {row['ce difference']:+.4f} | [{row['low']:+.4f}, {row['high']:+.4f}] |")
    for name, value in other.items():
        lines += ["", f"{name}: {value}"]
    return lines


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}"


if __name__ == "__main__":
    command(Config, main, __doc__)
