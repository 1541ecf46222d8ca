"""Massive activations: in which layers, at which positions, in which dimensions; and what removing them does.

Command: python -m experiments.massive_activations --out runs/massive          8 windows of 128 tokens
         python -m experiments.massive_activations --model tiny --out runs/tiny

For every block: the largest |x| of the residual stream behind it, the lower median, how many entries exceed 100, and
how many of these 1,000 medians. Then interventions behind the first block with an entry above 100, and behind the first
with a massive one, at the largest one's position and dimension: zero, its mean over windows, the same dimension at all
other positions, another dimension there.
Cross-entropy in nats over the windows, with the same tokens throughout.

Claims (Sun et al. 2024, arXiv 2402.17762): few, at the first position, in fixed dimensions, about constant over inputs;
they appear once and stay until the last blocks; setting them to zero breaks the model, to their mean does not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.commands.shell import (
    check_folder,
    check_positive,
    command,
    folder_of_a_run,
    say,
    settings_of,
    write_json,
)
from jaxinterp.data.activations import counted, on_device
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.evaluation.sparsity.massive import massive, top_and_median
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites


@dataclass(frozen=True)
class Config:
    """Sizes."""

    out: Path
    """Folder for results; must be empty or absent unless --resume."""
    model: str = "smollm2-135m"
    """A language model."""
    text: str = "docs"
    """Held-out text."""
    windows: int = 8
    seq: int = 128
    least: float = 100.0
    """What counts as large."""
    ratio: float = 1000.0
    """In medians, what counts as massive."""
    seed: int = 0
    resume: bool = False
    """Run again in the same folder."""


class SetEntry(eqx.Module):
    """The edit that sets chosen entries: `value` where position and dimension are chosen."""

    position: Any  # Bool [seq]
    dimension: Any  # Bool [d]
    value: Any

    def __call__(self, x: Any) -> Any:
        return jnp.where(self.position[:, None] & self.dimension, self.value, x).astype(x.dtype)


@eqx.filter_jit
def _measured(model: Any, edits: Any, batch: Any) -> Any:
    """Summed loss and count."""
    log_p = jax.nn.log_softmax(run(model, batch["tokens"], edits=edits, keep=()).logits[:, :-1])
    nll = -jnp.take_along_axis(log_p, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    counts = counted(batch)
    return jnp.sum(nll * counts), jnp.sum(counts)


@eqx.filter_jit
def _streams(model: Any, tokens: Any) -> dict[str, Any]:
    return run(model, tokens, keep="blocks/*/resid/post").arrays


def main(config: Config) -> None:
    """Look, then intervene."""
    check_positive(config, "windows", "seq")
    record = settings_of(config)
    check_folder(config.out, record, resume=config.resume)
    subject = load(config.model)
    model: Any = subject.model
    enough = 400 * config.seq * config.windows
    _, heldout = load_text(config.text, subject.tokenizer, seq=config.seq, max_tokens=enough)
    rows = min(4, config.windows)
    batches = [on_device(batch) for batch in take(heldout, config.windows * config.seq, seed=config.seed, rows=rows)]
    names = [name for name in sites(model, "blocks/*/resid/post")]
    with folder_of_a_run(config.out, record) as out:
        parts = [_streams(model, batch["tokens"]) for batch in batches]
        streams = {name: np.concatenate([np.asarray(part[name], np.float32) for part in parts]) for name in names}
        layers = [layer_row(name, streams[name], config) for name in names]
        for row in layers:
            say(
                f"{row['site']:22s} top {row['largest']:9.0f} median {row['median']:6.2f}  > {config.least:g}: "
                f"{row['large']:4d}  massive: {row['massive']:4d}  at {row['where']}"
            )
        effects = interventions(model, batches, streams, layers, config)
        for effect in effects:
            say(f"{effect['what']:60s} ce {effect['ce']:.4f}")
        write_json(out / "results.json", {"layers": layers, "interventions": effects})


def layer_row(name: str, x: np.ndarray, config: Config) -> dict[str, Any]:
    """What one block's stream holds."""
    every = massive(x, least=config.least, ratio=0.0, most=x.size)
    entries = [entry for entry in every if entry.ratio >= config.ratio]
    top = top_and_median(x, 3)
    places = sorted({(entry.position, entry.dimension) for entry in entries or every})
    return {
        "site": name,
        "largest": top.top[0],
        "third": top.top[2],
        "median": top.median,
        "large": len(every),
        "massive": len(entries),
        "where": places[:6],
        "position 0": sum(entry.position == 0 for entry in every),
    }


def interventions(
    model: Any, batches: list[Any], streams: dict[str, np.ndarray], layers: list[dict[str, Any]], config: Config
) -> list[dict[str, Any]]:
    """Cross-entropy with the largest entry changed behind the first block that has one above `least`."""
    seq, d = next(iter(streams.values())).shape[1:]

    def loss(what: str, name: str, position: Any, dimension: Any, value: float) -> dict[str, Any]:
        edit = SetEntry(jnp.asarray(position), jnp.asarray(dimension), jnp.asarray(value, jnp.float32))
        sums = [_measured(model, {name: edit}, batch) for batch in batches]
        ce = sum(float(total) for total, _ in sums) / sum(float(count) for _, count in sums)
        return {"what": what, "site": name, "ce": ce}

    nowhere, no_dimension = np.zeros(seq, bool), np.zeros(d, bool)
    found = [loss("unchanged", layers[0]["site"], nowhere, no_dimension, 0.0)]
    chosen = [next((row["site"] for row in layers if row[key]), None) for key in ("large", "massive")]
    for name in dict.fromkeys(site for site in chosen if site is not None):
        x = streams[name]
        largest = massive(x, least=config.least, ratio=0.0, most=1)[0]
        at, here = np.arange(seq) == largest.position, np.arange(d) == largest.dimension
        sizes = np.abs(x[:, largest.position]).mean(0)
        next_largest = int(np.argsort(-sizes)[1])
        mean, rest = float(x[:, at][..., here].mean()), float(x[:, ~at][..., here].mean())
        block = name.removesuffix("/resid/post")
        entry = f"{block}: dimension {largest.dimension}"
        found += [
            loss(f"{entry} at position {largest.position}: 0", name, at, here, 0.0),
            loss(f"{entry} at position {largest.position}: its mean {mean:.0f}", name, at, here, mean),
            loss(f"{block}: dimension {next_largest} there, the next: 0", name, at, np.arange(d) == next_largest, 0.0),
            loss(f"{entry} at all other positions: 0", name, ~at, here, 0.0),
            loss(f"{entry} at all other positions: its mean {rest:.2f}", name, ~at, here, rest),
        ]
    return found


if __name__ == "__main__":
    command(Config, main, __doc__)
