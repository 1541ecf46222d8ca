"""In-context regression: a transformer learns from examples in its context, and the context is a weight update.

    python -m experiments.factor_in_context --out runs/in_context

A block (attention, then an MLP, both added to the stream) reads tokens (x_i, y_i) with y_i = w . x_i, then the query
(x, 0), and predicts w . x; every sequence has another w (arXiv 2507.16003, section 4). At several steps of the training
three losses are measured on the same held-out sequences: with the context; of the query alone, with the rank-one
update of its MLP and the shift of the stream; of the query alone as it is. Then the steps |dW_(i+1) - dW_i| as examples
come in one by one, for the trained block and for the one it started as.

Expected: the first two losses are one curve; the steps shrink, and the trained block's follow what its prediction does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxinterp.commands.shell import (
    Columns,
    check_folder,
    check_positive,
    command,
    folder_of_a_run,
    print_table,
    say,
    settings_of,
    write_json,
)
from jaxinterp.methods.factor import context_update as context
from jaxinterp.models.layers import Linear, random_linear
from jaxinterp.models.mlp import MLP


@dataclass(frozen=True)
class Config:
    """One block a seed."""

    out: Path
    """Folder for the results; must be empty or absent."""
    inputs: int = 2
    """Numbers in x."""
    examples: int = 20
    """Examples before the query."""
    width: int = 32
    """Of the stream."""
    hidden: int = 128
    """Neurons."""
    heads: int = 4
    """Of attention."""
    steps: int = 2000
    """Of Adam, with batches of 128 sequences."""
    learning_rate: float = 3e-3
    """Peak of Adam; a cosine to 0."""
    heldout: int = 512
    """Sequences for the losses."""
    seeds: int = 3
    """How many seeds, 0 and on."""


class Block(eqx.Module):
    """Embedding, attention without positions, an MLP, and a read-out of one number."""

    embed: Linear
    query: Float[Array, "heads width size"]
    key: Float[Array, "heads width size"]
    value: Float[Array, "heads width size"]
    back: Float[Array, "heads size width"]
    mlp: MLP
    read: Linear

    def contextual(self, tokens: Float[Array, "seq inputs+1"]) -> Float[Array, " width"]:
        """The stream at the last token behind attention over all: what the MLP reads."""
        x = self.embed(tokens)
        q = jnp.einsum("w,hws->hs", x[-1], self.query)
        k, v = jnp.einsum("tw,hws->hts", x, self.key), jnp.einsum("tw,hws->hts", x, self.value)
        pattern = jax.nn.softmax(jnp.einsum("hs,hts->ht", q, k) / q.shape[-1] ** 0.5, axis=-1)
        return x[-1] + jnp.einsum("ht,hts,hsw->w", pattern, v, self.back)

    def predict(self, stream: Float[Array, " width"]) -> Float[Array, ""]:
        """What is read out behind the MLP."""
        return self.read(stream + self.mlp(stream))[0]

    def __call__(self, tokens: Float[Array, "seq inputs+1"]) -> Float[Array, ""]:
        return self.predict(self.contextual(tokens))

    def patched(self, tokens: Float[Array, "seq inputs+1"]) -> Float[Array, ""]:
        """The query alone, with the context in its weights."""
        with_context, without = self.contextual(tokens), self.contextual(tokens[-1:])
        mlp = context.updated_mlp(self.mlp, with_context, without, with_context - without)
        return eqx.tree_at(lambda block: block.mlp, self, mlp)(tokens[-1:])


def start(key: PRNGKeyArray, config: Config) -> Block:
    """Normal start values of standard deviation 1/sqrt(what is read)."""
    keys = jax.random.split(key, 8)
    size = config.width // config.heads
    into = lambda key: jax.random.normal(key, (config.heads, config.width, size), jnp.float32) / config.width**0.5
    return Block(
        embed=random_linear(keys[0], config.inputs + 1, config.width, bias=True),
        query=into(keys[1]),
        key=into(keys[2]),
        value=into(keys[3]),
        back=jax.random.normal(keys[4], (config.heads, size, config.width), jnp.float32) / config.width**0.5,
        mlp=MLP(
            None,
            random_linear(keys[5], config.width, config.hidden, bias=True),
            random_linear(keys[6], config.hidden, config.width, bias=True),
            "gelu",
        ),
        read=random_linear(keys[7], config.width, 1, bias=True),
    )


def sequences(
    key: PRNGKeyArray, number: int, config: Config
) -> tuple[Float[Array, "number seq inputs+1"], Float[Array, " number"]]:
    """Tokens (x_i, w . x_i) with the query (x, 0) last, and w . x; x and w are standard normal."""
    x_key, w_key = jax.random.split(key)
    x = jax.random.normal(x_key, (number, config.examples + 1, config.inputs), jnp.float32)
    y = jnp.einsum("nti,ni->nt", x, jax.random.normal(w_key, (number, config.inputs), jnp.float32))
    return jnp.concatenate([x, y.at[:, -1].set(0)[..., None]], axis=-1), y[:, -1]


def train(key: PRNGKeyArray, config: Config, points: int = 8) -> tuple[Block, Block, list[dict[str, float]]]:
    """The block before and after, and the three losses at `points` even steps from the start on."""
    start_key, data_key, held_key = jax.random.split(key, 3)
    first = block = start(start_key, config)
    part = max(1, config.steps // points)
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, part * points))
    held = sequences(held_key, config.heldout, config)

    def loss(block: Block, key: Array) -> Array:
        tokens, answers = sequences(key, 128, config)
        return jnp.mean((jax.vmap(block)(tokens) - answers) ** 2)

    @eqx.filter_jit
    def trained(block: Block, state: Any, keys: Array) -> tuple[Block, Any]:
        arrays, rest = eqx.partition(block, eqx.is_array)

        def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], None]:
            arrays, state = carry
            gradient = jax.grad(lambda arrays: loss(eqx.combine(arrays, rest), key))(arrays)
            updates, state = optimizer.update(gradient, state)
            return (eqx.apply_updates(arrays, updates), state), None

        (arrays, state), _ = jax.lax.scan(step, (arrays, state), keys)
        return eqx.combine(arrays, rest), state

    state = optimizer.init(eqx.filter(block, eqx.is_array))
    rows = [losses(block, *held) | {"step": 0}]
    for number in range(points):
        keys = jax.random.split(jax.random.fold_in(data_key, number), part)
        block, state = trained(block, state, keys)
        rows.append(losses(block, *held) | {"step": (number + 1) * part})
    return first, block, rows


@eqx.filter_jit
def _three(block: Block, tokens: Array) -> tuple[Array, Array, Array]:
    return jax.vmap(block)(tokens), jax.vmap(block.patched)(tokens), jax.vmap(block)(tokens[:, -1:])


def losses(
    block: Block, tokens: Float[Array, "number seq inputs+1"], answers: Float[Array, " number"]
) -> dict[str, float]:
    """Mean squared errors with the context, patched, and alone; the largest difference of the first two predictions."""
    with_context, patched, alone = (np.asarray(each, np.float64) for each in _three(block, tokens))
    error = lambda prediction: float(np.mean((prediction - np.asarray(answers)) ** 2))
    return {
        "with context": error(with_context),
        "patched": error(patched),
        "alone": error(alone),
        "apart": float(np.abs(with_context - patched).max() / np.abs(with_context).max()),
    }


def update_steps(block: Block, tokens: Float[Array, "number seq inputs+1"]) -> Float[np.ndarray, " examples"]:
    """|dW_(i+1) - dW_i| over |W|, the mean over sequences, for i = 0 .. examples - 1."""

    @eqx.filter_jit
    def of_one(block: Block, tokens: Array) -> Array:
        lengths = range(tokens.shape[0])
        grown = jnp.stack([block.contextual(jnp.concatenate([tokens[:i], tokens[-1:]])) for i in lengths])
        return context.token_updates(block.mlp.up_proj.weight, grown, grown[0])

    each = eqx.filter_vmap(of_one, in_axes=(None, 0))(block, tokens)
    return np.asarray(jnp.mean(each, axis=0) / jnp.linalg.norm(block.mlp.up_proj.weight), np.float64)


def slope(steps: Float[np.ndarray, " examples"]) -> float:
    """Of log size on log i, from the second step on."""
    return float(np.polyfit(np.log(np.arange(2, len(steps) + 1)), np.log(steps[1:]), 1)[0])


def main(config: Config) -> None:
    """Train, measure, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    check_positive(config, "inputs", "examples", "width", "hidden", "heads", "steps", "heldout", "seeds")
    results = []
    for seed in range(config.seeds):
        first, block, rows = train(jax.random.key(seed), config)
        tokens, _ = sequences(jax.random.key(1000 + seed), 64, config)
        sizes = {name: update_steps(each, tokens) for name, each in (("start", first), ("trained", block))}
        say(f"seed {seed}")
        print_table(COLUMNS, rows)
        found = {f"slope {name}": slope(steps) for name, steps in sizes.items()}
        say(", ".join(f"{name} {value:.2f}" for name, value in found.items()))
        kept = {f"steps {name}": steps.tolist() for name, steps in sizes.items()}
        results.append({"seed": seed, "losses": rows} | found | kept)
    with folder_of_a_run(config.out, settings_of(config)) as out:
        write_json(out / "results.json", results)


COLUMNS: Columns = {
    "step": ("step", "{:d}"),
    "with context": ("with context", "{:.4f}"),
    "patched": ("patched", "{:.4f}"),
    "alone": ("alone", "{:.4f}"),
    "apart": ("apart", "{:.1e}"),
}


if __name__ == "__main__":
    command(Config, main, __doc__)
