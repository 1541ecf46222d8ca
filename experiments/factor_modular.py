"""Modular addition: how many nodes and edges does a network need in the local interaction basis, in PCA, in neurons?

    python -m experiments.factor_modular --out runs/modular

A network learns a + b mod p: e = A[a] + B[b], hidden = relu(e W + c), logits = hidden U + u. Its arrays e and hidden
are read in three bases (arXiv 2405.10928): the local interaction basis, computed from the logits backwards; principal
components; and the coordinates themselves (neurons). Nodes: the smallest number of directions with which it still
answers 99.9 % of the pairs that it answered. Edges: the same for the connections e -> hidden and hidden -> logits.

Expected (from the authors' own logs): the same nodes, and none to half fewer edges than PCA.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxinterp.commands.shell import check_folder, command, folder_of_a_run, print_table, say, settings_of, write_json
from jaxinterp.methods.factor import interaction_basis as lib
from jaxinterp.methods.factor.interaction_ablation import least, strongest, with_edges, with_nodes


@dataclass(frozen=True)
class Config:
    """One network a seed."""

    out: Path
    """Folder for the results; must be empty or absent."""
    p: int = 23
    """The modulus."""
    d: int = 32
    """Width of the embedding."""
    hidden: int = 96
    """Neurons."""
    steps: int = 3000
    """Of AdamW on all pairs."""
    weight_decay: float = 0.3
    """Of AdamW; with it the network finds a few frequencies."""
    seeds: int = 3
    """How many seeds, 0 and on."""


class Network(NamedTuple):
    """The network of the module's text; the last row of `up` and `out` is a bias."""

    first: Float[Array, "p d"]
    second: Float[Array, "p d"]
    up: Float[Array, "d+1 hidden"]
    out: Float[Array, "hidden+1 p"]

    def embedded(self, pairs: Int[Array, "pairs 2"]) -> Float[Array, "pairs d+1"]:
        """e, and a constant."""
        return _with_one(self.first[pairs[:, 0]] + self.second[pairs[:, 1]])

    def to_hidden(self, e: Float[Array, "*axes d+1"]) -> Float[Array, "*axes hidden+1"]:
        """hidden, and a constant."""
        return _with_one(jax.nn.relu(e @ self.up))

    def to_logits(self, hidden: Float[Array, "*axes hidden+1"]) -> Float[Array, "*axes p"]:
        """logits."""
        return hidden @ self.out


def _with_one(x: Array) -> Array:
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def train(
    key: PRNGKeyArray, p: int, d: int, hidden: int, steps: int, weight_decay: float
) -> tuple[Network, Float[Array, ""]]:
    """The network after AdamW on all pairs, and its accuracy."""
    pairs, keys = all_pairs(p), jax.random.split(key, 4)
    answer = jnp.sum(pairs, axis=1) % p
    network = Network(
        jax.random.normal(keys[0], (p, d)) / 2, jax.random.normal(keys[1], (p, d)) / 2,
        jnp.zeros((d + 1, hidden)).at[:-1].set(jax.random.normal(keys[2], (d, hidden)) / d**0.5),
        jnp.zeros((hidden + 1, p)).at[:-1].set(jax.random.normal(keys[3], (hidden, p)) / hidden**0.5),
    )  # fmt: skip
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, steps), weight_decay=weight_decay)

    def logits(network: Network) -> Array:
        return network.to_logits(network.to_hidden(network.embedded(pairs)))

    def loss(network: Network) -> Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(network), answer))

    def step(carry: tuple[Network, Any], _: None) -> tuple[tuple[Network, Any], None]:
        network, state = carry
        updates, state = optimizer.update(jax.grad(loss)(network), state, network)
        return (optax.apply_updates(network, updates), state), None

    network = jax.lax.scan(step, (network, optimizer.init(network)), None, length=steps)[0][0]
    return network, jnp.mean(jnp.argmax(logits(network), axis=1) == answer)


def all_pairs(p: int) -> Int[Array, "pairs 2"]:
    """Every (a, b)."""
    return jnp.stack(jnp.meshgrid(jnp.arange(p), jnp.arange(p), indexing="ij"), axis=-1).reshape(-1, 2)


Bases = dict[str, tuple[lib.Basis, lib.Basis]]


def bases(network: Network, e: Float[Array, "pairs d+1"]) -> Bases:
    """For e and hidden: the interaction basis from the logits backwards, principal components, coordinates."""
    hidden = network.to_hidden(e)

    def centred(x: Array) -> tuple[np.ndarray, np.ndarray]:
        wide = np.asarray(x, np.float64)
        mean = wide.mean(axis=0)
        away = wide - mean
        away[:, -1] = 1
        return away.T @ away / len(away), mean

    (gram_h, mean_h), (gram_e, mean_e) = centred(hidden), centred(e)
    options: dict[str, Any] = {"threshold": 1e-10, "relative": True}
    into_logits = lib.jacobian_moment(network.to_logits, hidden)
    of_hidden = lib.interaction_basis(gram_h, into_logits, mean=mean_h, **options)
    into_hidden = lib.jacobian_moment(network.to_hidden, e, jnp.asarray(of_hidden.into, e.dtype))
    of_e = lib.interaction_basis(gram_e, into_hidden, mean=mean_e, **options)
    pca = tuple(lib.principal_basis(g, mean=m, **options) for g, m in ((gram_e, mean_e), (gram_h, mean_h)))
    eyes = tuple(_coordinates(gram) for gram in (gram_e, gram_h))
    return {"interaction": (of_e, of_hidden), "pca": (pca[0], pca[1]), "neurons": (eyes[0], eyes[1])}


def _coordinates(gram: np.ndarray) -> lib.Basis:
    """The coordinates, the constant first, then by variance."""
    order = np.argsort(-np.diagonal(gram), kind="stable")
    order = np.concatenate([[len(gram) - 1], order[order != len(gram) - 1]])
    eye = np.eye(len(gram))[:, order]
    return lib.Basis(eye, eye.T, np.diagonal(gram)[order])


def needed(
    network: Network, e: Float[Array, "pairs d+1"], basis: tuple[lib.Basis, lib.Basis], share: float = 0.999
) -> dict[str, int | None]:
    """Nodes of e and hidden, edges between e and hidden and between hidden and logits."""
    of_e, of_hidden = basis
    hidden = network.to_hidden(e)
    answer = jnp.argmax(network.to_logits(hidden), axis=1)
    same = lambda logits: bool(jnp.mean(jnp.argmax(logits, axis=1) == answer) >= share)
    first = lambda basis, m: jnp.asarray(np.arange(basis.into.shape[1]) < m, e.dtype)
    strength_h = np.asarray(lib.edges(network.to_hidden, e, of_e, of_hidden, points=lib.gradient_points()))
    strength_o = np.asarray(lib.edges(network.to_logits, hidden, of_hidden, None, points=lib.gradient_points()))
    edged_h = jax.jit(lambda keep: network.to_logits(with_edges(network.to_hidden, e, of_e, of_hidden, keep)))
    edged_o = jax.jit(lambda keep: with_edges(network.to_logits, hidden, of_hidden, None, keep))
    noded_e = jax.jit(lambda keep: network.to_logits(network.to_hidden(with_nodes(e, of_e, keep))))
    noded_h = jax.jit(lambda keep: network.to_logits(with_nodes(hidden, of_hidden, keep)))
    return {
        "nodes e": least(of_e.into.shape[1], lambda m: same(noded_e(first(of_e, m)))),
        "nodes hidden": least(of_hidden.into.shape[1], lambda m: same(noded_h(first(of_hidden, m)))),
        "edges e to hidden": least(strength_h.size, lambda m: same(edged_h(strongest(strength_h, m)))),
        "edges hidden to logits": least(strength_o.size, lambda m: same(edged_o(strongest(strength_o, m)))),
    }


def main(config: Config) -> None:
    """Train, count, write `results.json`."""
    check_folder(config.out, settings_of(config), resume=False)
    rows: list[dict[str, Any]] = []
    sizes = {name: getattr(config, name) for name in ("p", "d", "hidden", "steps", "weight_decay")}
    run = jax.jit(lambda key: train(key, **sizes))
    for seed in range(config.seeds):
        network, accuracy = run(jax.random.key(seed))
        e = network.embedded(all_pairs(config.p))
        for name, basis in bases(network, e).items():
            found = needed(network, e, basis)
            rows.append({"seed": str(seed), "basis": name, "accuracy": float(accuracy)} | found)
    columns = {name: (name, "{:d}" if "edges" in name or "nodes" in name else "{}") for name in rows[0]}
    print_table(columns | {"accuracy": ("accuracy", "{:.3f}")}, rows)
    with folder_of_a_run(config.out, settings_of(config)) as out:
        write_json(out / "results.json", rows)
    say("Edges are ordered by their strength at the data (a single gradient), the strongest kept.")


if __name__ == "__main__":
    command(Config, main, __doc__)
