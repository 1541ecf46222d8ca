"""CETT-PPL-p % of any models: how many neurons must stay for a perplexity at most p percent higher.

Command: python -m experiments.cett --out runs/cett                     bilinear-4x128 and minilm-l6, two CPU minutes
         python -m experiments.cett --models smollm2-135m --out runs/smol
         python -m experiments.cett --models runs/laws/silu-0/model --out runs/own

One CETT for all layers, by bisection; thresholds from the training part of the text, the loss on held-out text. An
encoder predicts nothing and has no perplexity: its measure is 1 - cosine of a text's embedding with the unchanged one,
and p percent means .01 p of it. Position 0 stays dense and counts nowhere. Source: 2411.02335, section 3.

Resumable: a model that is in results.json is not measured again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.commands.shell import (
    check_distinct,
    check_folder,
    check_positive,
    command,
    folder_of_a_run,
    read_json,
    say,
    settings_of,
    write_json,
)
from jaxinterp.data.activations import counted, on_device
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.evaluation.pooled import POOLED
from jaxinterp.evaluation.sparsity.curves import cett_curves, cett_ppl, edits_at, hidden_activations
from jaxinterp.models.load import load
from jaxinterp.models.run import run


@dataclass(frozen=True)
class Config:
    """Sizes."""

    out: Path
    """Folder for results; must be empty or absent unless --resume."""
    models: tuple[str, ...] = ("bilinear-4x128", "minilm-l6")
    """What `load` takes."""
    text: str = "docs"
    """Text; thresholds come from its training part."""
    cache: Path = Path("runs/tokens")
    """Folder for the text's tokens."""
    windows: int = 16
    """Held-out windows."""
    calibration: int = 8
    """Windows for thresholds."""
    seq: int = 64
    percents: tuple[float, ...] = (1.0, 5.0)
    tolerance: float = 4e-3
    """Of the CETT."""
    max_tokens: int = 500_000
    """Of the text."""
    resume: bool = False


def main(config: Config) -> None:
    """One model after another."""
    check_positive(config, "windows", "calibration", "seq")
    check_distinct("models", config.models)
    record = settings_of(config, "cache")
    check_folder(config.out, record, resume=config.resume)
    with folder_of_a_run(config.out, record) as out:
        path = out / "results.json"
        results: dict[str, Any] = read_json(path) if path.exists() else {}
        for name in config.models:
            if name not in results:
                results[name] = rows_of(name, config)
                write_json(path, results)
            for row in results[name]:
                say(
                    f"{name}: {row['measure']} {row['percent']:g} %: {row['ratio']:.3f} of the neurons stay, CETT "
                    f"{row['cett']:.3f}, rise {row['rise']:.2f} %"
                )


def rows_of(name: str, config: Config) -> list[dict[str, Any]]:
    """The rows of one model."""
    subject = load(name)
    model: Any = subject.model
    train, heldout = load_text(
        config.text, subject.tokenizer, seq=config.seq, max_tokens=config.max_tokens, cache=config.cache
    )
    rows = 4
    batches = take(heldout, config.windows * config.seq, seed=0, rows=rows)
    hidden = hidden_activations(model, take(train, config.calibration * config.seq, seed=0, rows=rows), dense_before=1)
    curves = cett_curves(model, hidden)
    loss = Perplexity(model, batches) if model.config.head else Similarity(model, batches)
    dense, found = loss({}), []
    for percent in config.percents:
        at = cett_ppl(model, curves, loss, dense, percent, tolerance=config.tolerance, dense_before=1)
        found.append(
            {
                "measure": loss.name,
                "dense": dense,
                "percent": percent,
                "ratio": at.ratio,
                "cett": at.cett,
                "rise": at.percent,
                "zeros": float(np.mean([np.mean(a == 0) for a in hidden.values()])),
                "ratio by layer": [round(layer.ratio, 3) for layer in at.layers.values()],
            }
        )
    half = {leaf: curve.at(0.5) for leaf, curve in curves.items()}  # far off, so that the measure is seen to move
    rise = 100 * math.expm1(loss(edits_at(model, half, dense_before=1)) - dense)
    ratio = float(np.mean([layer.ratio for layer in half.values()]))
    return [*found, {"measure": f"{loss.name}, CETT .5", "percent": rise, "ratio": ratio, "cett": 0.5, "rise": rise}]


class Perplexity:
    """Cross-entropy of the next token."""

    name = "perplexity"

    def __init__(self, model: Any, batches: list[Any]):
        self.model, self.batches = model, [on_device(batch) for batch in batches]

    def __call__(self, edits: Mapping[str, Any]) -> float:
        sums = [_nll(self.model, edits, batch) for batch in self.batches]
        return sum(float(total) for total, _ in sums) / sum(float(count) for _, count in sums)


class Similarity:
    """log(1 + mean over texts of 1 - cosine with the unchanged embedding), so that exp(rise) - 1 is that distance."""

    name = "distance of embeddings"

    def __init__(self, model: Any, batches: list[Any]):
        self.model, self.batches = model, [on_device(batch) for batch in batches]
        self.clean = [_embedded(model, {}, batch["tokens"]) for batch in self.batches]

    def __call__(self, edits: Mapping[str, Any]) -> float:
        sums = np.zeros(2)
        for batch, clean in zip(self.batches, self.clean, strict=True):
            found = POOLED.compare(_embedded(self.model, edits, batch["tokens"]), clean, batch)
            weight = np.asarray(found["counted"])
            sums += [float(np.sum((1 - np.asarray(found["similarity"])) * weight)), weight.sum()]
        return math.log1p(sums[0] / sums[1])


@eqx.filter_jit
def _nll(model: Any, edits: Any, batch: Any) -> Any:
    log_p = jax.nn.log_softmax(run(model, batch["tokens"], edits=edits, keep=()).logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    counts = counted(batch)
    return jnp.sum(nll * counts), jnp.sum(counts)


@eqx.filter_jit
def _embedded(model: Any, edits: Any, tokens: Any) -> Any:
    return POOLED.read(run(model, tokens, edits=edits))


if __name__ == "__main__":
    command(Config, main, __doc__)
