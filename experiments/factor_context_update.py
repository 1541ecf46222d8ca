"""A context as a weight update: every block of a model patched, and the query alone computes what the context did.

    python -m experiments.factor_context_update --out runs/context

For each context (a piece of text; the query is its last token) the blocks are patched one after another, each by the
rank-one update of arXiv 2507.16003 with the bias for the stream, until the query alone, without its context, goes
through all of them. Measured: the greatest relative error of the logits, whether the best token is the same, and what
the query alone says unpatched. Then |dW_(i+1) - dW_i| of each block as the context grows token by token: the paper
expects the steps to shrink (slope of log size against log length below 0).

Expected: relative error <= 1e-5 in float32, the same best token always, a negative median slope. An error above 1e-3
is a fault of the machinery.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinterp.commands.shell import check_folder, command, folder_of_a_run, say, settings_of, write_json
from jaxinterp.data.text.load_text import load_text, take
from jaxinterp.methods.factor import context_update as context
from jaxinterp.models.load import load
from jaxinterp.models.run import run


@dataclass(frozen=True)
class Config:
    """One model, one text."""

    out: Path
    """Folder for the results; must be empty or absent."""
    model: str = "smollm2-135m"
    """A transformer of the package."""
    text: str = "docs"
    """Where contexts come from."""
    contexts: int = 5
    """How many."""
    length: int = 24
    """Tokens of a context, the query included."""


@eqx.filter_jit
def streams(model: Any, tokens: Any) -> tuple[dict[str, Array], Array]:
    """(what every MLP reads and the stream before it, at the last position; the logits there)."""
    trace = run(model, tokens)
    ports = ("mlp/in", "resid/mid")
    arrays = {name: value[:, -1] for name, value in trace.arrays.items() if name.endswith(ports)}
    return arrays, trace.logits[:, -1]


@eqx.filter_jit
def grown(model: Any, tokens: Any) -> dict[str, Array]:
    """What every MLP reads at the query behind 0, 1, 2, ... tokens of context; tokens [lengths, seq], padded behind."""
    trace = run(model, tokens)
    places = jnp.arange(tokens.shape[0])
    return {name: value[places, places] for name, value in trace.arrays.items() if name.endswith("mlp/in")}


def patched(model: Any, layer: int, z_context: Array, z: Array, shift: Array) -> Any:
    """The model with the MLP of one block updated."""
    new = context.updated_mlp(model.blocks[layer].mlp, z_context, z, shift)
    return _with_mlp(model, layer, new)


def _with_mlp(model: Any, layer: int, mlp: Any) -> Any:
    return eqx.tree_at(lambda tree: tree.blocks[layer].mlp, model, mlp)


def with_biases(model: Any) -> Any:
    """The model with a bias of 0 where an output projection has none: all patched models are one program."""
    for layer, block in enumerate(model.blocks):
        if block.mlp.down_proj.bias is None:
            zero = jnp.zeros(block.mlp.down_proj.weight.shape[1])
            mlp = eqx.tree_at(lambda one: one.down_proj.bias, block.mlp, zero, is_leaf=lambda leaf: leaf is None)
            model = _with_mlp(model, layer, mlp)
    return model


def main(config: Config) -> None:
    """Patch, compare, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    subject = load(config.model)
    original: Any = with_biases(subject.model)
    train, _ = load_text(config.text, subject.tokenizer, seq=config.length, max_tokens=200_000)
    rows = take(train, config.contexts * config.length, rows=config.contexts)[0]["tokens"]
    results = []
    for number, row in enumerate(np.asarray(rows)):
        query = jnp.asarray(row[None, -1:])
        wanted, whole_logits = streams(original, jnp.asarray(row[None]))
        _, alone_logits = streams(original, query)
        model = original
        for layer in range(len(model.blocks)):
            leaf = f"blocks/{layer}/mlp"
            own, _ = streams(model, query)
            shift = wanted[f"blocks/{layer}/resid/mid"] - own[f"blocks/{layer}/resid/mid"]
            pair = wanted[f"{leaf}/in"][0], own[f"{leaf}/in"][0]
            model = patched(model, layer, *pair, shift[0])
        _, logits = streams(model, query)
        scale = float(jnp.abs(whole_logits).max())
        # One row a length of context: the last i tokens before the query, then the query, then padding.
        lengths = np.zeros((config.length, config.length), np.int32)
        for i in range(config.length):
            lengths[i, : i + 1] = row[config.length - 1 - i :]
        reads = grown(original, jnp.asarray(lengths))
        slopes = []
        for layer, block in enumerate(original.blocks):
            z = reads[f"blocks/{layer}/mlp/in"]
            first = block.mlp.up_proj if block.mlp.gate_proj is None else block.mlp.gate_proj
            steps = np.asarray(context.token_updates(first.weight, z, z[0]))[1:]
            slopes.append(float(np.polyfit(np.log(np.arange(2, len(steps) + 2)), np.log(steps + 1e-30), 1)[0]))
        results.append(
            {
                "context": number,
                "relative_error": float(jnp.abs(logits - whole_logits).max()) / scale,
                "same_best_token": bool(jnp.argmax(logits) == jnp.argmax(whole_logits)),
                "unpatched_relative_error": float(jnp.abs(alone_logits - whole_logits).max()) / scale,
                "unpatched_same_best_token": bool(jnp.argmax(alone_logits) == jnp.argmax(whole_logits)),
                "slope_median": float(np.median(slopes)),
                "slopes_below_0": float(np.mean(np.array(slopes) < 0)),
            }
        )
        say(str(results[-1]))
    with folder_of_a_run(config.out, settings_of(config)) as out:
        write_json(out / "results.json", results)


if __name__ == "__main__":
    command(Config, main, __doc__)
