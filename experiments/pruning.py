"""Pruning SmolLM2: neurons, heads, N:M and unstructured weights, in one table; and the model written for transformers.

Command: python -m experiments.pruning --out runs/pruning              8 windows of 64 tokens, about 4 CPU minutes

    neurons       a share of every MLP's neurons goes: least E|a| (AMP), E|a||w|, peak to peak (MAW), random
    heads         a group of query heads with its key/value head goes from every layer: AMP's score, or random
    unstructured  half of the weights of every MLP matrix: magnitude, Wanda, DaSS
    2:4, 4:8      the same by groups

Every row is measured with masks: taking neurons or heads out equals masking them (tests/models/test_pruning.py). The
first row of neurons by E|a||w| is then taken out indeed, written as a Hugging Face directory (OUT/model) and read back.
Position 0 counts in no statistic and no loss. Resumable: rows in results.json stay.

Sources: AMP 2504.21174; MAW 2512.22671; Wanda 2306.11695; DaSS 2405.01943.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from experiments.sparsity_results import Measure, OutOfTime, Results
from experiments.sparsity_searches import prune_masks
from jaxinterp.commands.shell import (
    check_folder,
    check_positive,
    command,
    folder_of_a_run,
    say,
    settings_of,
    write_json,
)
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.evaluation.sparsity.calibrate import Summary, calibrate
from jaxinterp.models import selection
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.write_huggingface import save_huggingface
from jaxinterp.models.leave_out import BySize
from jaxinterp.models.load import load
from jaxinterp.models.pruning import keep_neurons, mask_weights
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites


@dataclass(frozen=True)
class Config:
    """Sizes."""

    out: Path
    """Folder for results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A Llama-like model with gated MLPs."""
    text: str = "docs"
    """Text: statistics come from its training part."""
    cache: Path = Path("runs/tokens")
    """Folder for the text's tokens."""
    windows: int = 8
    """Held-out windows."""
    calibration: int = 8
    """Windows for statistics."""
    seq: int = 64
    neurons: tuple[float, ...] = (0.1, 0.25)
    """Shares of neurons that go."""
    max_tokens: int = 500_000
    """Of the text."""
    most_seconds: float = math.inf
    """CPU seconds after which no new row is begun; continue with --resume."""
    seed: int = 0
    resume: bool = False
    """Continue the run in the output folder."""


@dataclass(frozen=True)
class Sums:
    """Statistics by leaf: what `prune_masks` reads, and AMP's scores of heads."""

    hidden: Mapping[str, Summary]
    inputs: Mapping[str, Summary]
    heads: Mapping[str, np.ndarray]


def main(config: Config) -> None:
    """Statistics, rows, the written model."""
    check_positive(config, "windows", "calibration", "seq")
    for share in config.neurons:
        if not 0 < share < 1:
            raise UserError(f"neurons={share} must lie between 0 and 1.")
    record = settings_of(config, "most_seconds", "cache")
    check_folder(config.out, record, resume=config.resume)
    subject = load(config.model)
    model: Any = subject.model
    if not model.config.gated or model.config.mixture is not None:
        raise UserError(f"model={config.model!r} has no gated MLPs: MAW scores gates.")
    leaves = sites(model, "blocks/*/mlp")
    train, heldout = load_text(
        config.text, subject.tokenizer, seq=config.seq, max_tokens=config.max_tokens, cache=config.cache
    )
    with folder_of_a_run(config.out, record) as out:
        measure = Measure(model, take(heldout, config.windows * config.seq, seed=config.seed, rows=4))
        results = Results(out / "results.json", measure, config.most_seconds)
        results.row("dense", 0.0, model, dict)
        sums = statistics(model, leaves, take(train, config.calibration * config.seq, seed=config.seed, rows=4))
        try:
            for name, share, masks in rows_of(model, leaves, sums, config):
                if results.find(name, share) is None:
                    results.row(name, share, mask_weights(model, masks()), dict)
            results.also("written", lambda: written(subject, sums, leaves, config, results))
        except OutOfTime:
            say(f"{config.most_seconds:g} CPU s are over: continue with --resume.")
        table = table_of(results)
        say(*table)
        (out / "table.md").write_text("\n".join(table) + "\n")
        write_json(out / "results.json", results.content)


def statistics(model: Any, leaves: list[str], batches: Sequence[Mapping[str, Any]]) -> Sums:
    """Sums over the calibration text."""
    wanted = {f"{leaf}/{port}": (f"{leaf}/{port}", BySize()) for leaf in leaves for port in ("hidden", "in")}
    found = calibrate(model, batches, wanted)
    names = sites(model, "blocks/*/attn/z")
    totals: dict[str, Any] = dict.fromkeys(names, 0.0)
    for batch in batches:
        arrays = run(model, jnp.asarray(batch["tokens"]), keep=tuple(names)).arrays
        weight = np.asarray(batch["weight"]) > 0
        for index, name in enumerate(names):
            z = np.asarray(arrays[name])[weight].reshape(int(weight.sum()), model.config.heads, model.config.head_dim)
            totals[name] = totals[name] + np.asarray(selection.amp_heads(z, model.blocks[index].attn.o_proj.weight))
    return Sums(
        {leaf: found[f"{leaf}/hidden"] for leaf in leaves},
        {leaf: found[f"{leaf}/in"] for leaf in leaves},
        {name.removesuffix("/z"): total / len(batches) for name, total in totals.items()},
    )


Row = tuple[str, float, Callable[[], dict[str, Any]]]


def rows_of(model: Any, leaves: list[str], sums: Sums, config: Config) -> list[Row]:
    """(name, key, masks) of every row."""
    rows: list[Row] = [
        (f"neurons, {name}", share, partial(neuron_masks, model, leaves, sums, name, share, config))
        for share in config.neurons
        for name in ("AMP", "E|a||w|", "MAW", "random")
    ]
    one = 1 / model.config.kv_heads
    rows += [(f"heads, {name}", one, partial(head_masks, model, sums, name, config)) for name in ("AMP", "random")]
    levels: tuple[tuple[str, float | tuple[int, int]], ...] = (("half", 0.5), ("2:4", (2, 4)), ("4:8", (4, 8)))
    rows += [
        (f"weights {title}, {name}", 0.5, partial(prune_masks, model, leaves, sums, name, level))
        for title, level in levels
        for name in ("magnitude", "Wanda", "DaSS")
    ]
    return rows


def kept_neurons(
    model: Any, leaves: list[str], sums: Sums, name: str, share: float, seed: int
) -> dict[str, np.ndarray]:
    """The neurons that stay in every MLP, in their order."""
    random, kept = np.random.default_rng(seed), {}
    for index, leaf in enumerate(leaves):
        mlp = model.blocks[index].mlp
        score = sums.hidden[leaf].mean_size()
        if name == "E|a||w|":
            score = score * np.asarray(selection.row_norms(mlp.down_proj.weight))
        elif name == "MAW":
            score = np.asarray(selection.peak_to_peak(mlp.gate_proj.weight, mlp.up_proj.weight))
        elif name == "random":
            score = random.random(len(score))
        kept[leaf] = np.sort(np.argsort(-score, kind="stable")[: round(len(score) * (1 - share))])
    return kept


def neuron_masks(model: Any, leaves: list[str], sums: Sums, name: str, share: float, config: Config) -> dict[str, Any]:
    """Rows of W_down: a neuron that is not read is left out."""
    d_mlp, d_model = model.config.d_mlp, model.config.d_model
    kept = kept_neurons(model, leaves, sums, name, share, config.seed)
    return {
        f"{leaf}/down_proj": jnp.asarray(np.broadcast_to(np.isin(np.arange(d_mlp), index)[:, None], (d_mlp, d_model)))
        for leaf, index in kept.items()
    }


def head_masks(model: Any, sums: Sums, name: str, config: Config) -> dict[str, Any]:
    """Rows of W_O of the group of heads with the least score in every layer."""
    heads, groups, width = model.config.heads, model.config.kv_heads, model.config.head_dim
    random, masks = np.random.default_rng(config.seed), {}
    for leaf, score in sums.heads.items():
        by_group = score.reshape(groups, -1).sum(-1) if name == "AMP" else random.random(groups)
        stays = np.repeat(np.arange(groups) != by_group.argmin(), heads // groups * width)
        masks[f"{leaf}/o_proj"] = jnp.asarray(np.broadcast_to(stays[:, None], (heads * width, model.config.d_model)))
    return masks


def written(subject: Subject, sums: Sums, leaves: list[str], config: Config, results: Results) -> dict[str, Any]:
    """The first row of neurons by E|a||w|, taken out, written, read back and measured."""
    share = config.neurons[0]
    kept = kept_neurons(subject.model, leaves, sums, "E|a||w|", share, config.seed)
    small: Any = keep_neurons(subject.model, {leaf: index.tolist() for leaf, index in kept.items()})
    folder = config.out / "model"
    save_huggingface(Subject(small, subject.tokenizer, "pruned"), folder)
    again = load(folder)
    ce = sum(results.measure(again.model, {})) / results.measure.counts.sum()
    masked = results.find("neurons, E|a||w|", share)
    assert masked is not None
    before, after = (sum(leaf.size for leaf in _arrays(model)) for model in (subject.model, again.model))
    return {"ce": float(ce), "ce by masks": masked["ce"], "numbers before": before, "numbers after": after}


def _arrays(model: Any) -> list[Any]:
    return jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))


def table_of(results: Results) -> list[str]:
    """All rows as markdown."""
    rows = results.content["rows"]
    lines = ["| what goes | share | perplexity | nats above dense |", "|---|---|---|---|"]
    for row in rows:
        name = row["score"].replace("|", "\\|")
        change = row["ce"] - rows[0]["ce"]
        lines.append(f"| {name} | {row['sparsity']:.0%} | {row['perplexity']:.2f} | {change:+.3f} |")
    return [*lines, "", *(f"{name}: {value}" for name, value in results.content["other"].items())]


if __name__ == "__main__":
    command(Config, main, __doc__)
