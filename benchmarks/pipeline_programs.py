"""Our side of `benchmarks.pipeline`: `training.fit` as a user calls it, and the floors beside it.

Each runs in a worker: `python -m benchmarks.pipeline_programs {fit,floors} JOB`.
"""

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks import topk_programs
from benchmarks.pipeline_job import Job, Turns
from benchmarks.workers import Part, Shape, activations, serve
from jaxinterp.data.activations import Harvest
from jaxinterp.data.tokens import TokenCorpus
from jaxinterp.data.windows import windows
from jaxinterp.kernels import sparse_decode
from jaxinterp.methods import SparseAutoencoder
from jaxinterp.models.load import Subject
from jaxinterp.models.transformer import Transformer, TransformerConfig, initialise
from jaxinterp.training.fit import fit

STEPS = 1_000_000  # more than any run of the benchmark has
WINDOWS = 1024  # of the text, which is read again and again


def model(job: Job) -> Transformer:
    """The subject: random weights of the job's shape and dtype."""
    config = TransformerConfig(
        vocab_size=job.vocab,
        d_model=job.width,
        layers=job.layers,
        heads=job.heads,
        kv_heads=job.kv_heads,
        head_dim=job.head_dim,
        d_mlp=job.d_mlp,
        context=8192,
        rotary_dimensions=job.head_dim,
        rotary_base=100_000.0,
    )
    random = np.random.default_rng(0)

    def filled(leaf: jax.ShapeDtypeStruct) -> Array:  # one by one: a program that fills all needs twice the memory
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, job.dtype)
        scale = 1.0 if leaf.shape[0] == job.vocab else leaf.shape[0] ** -0.5
        return jnp.asarray(scale * random.standard_normal(leaf.shape, np.float32), job.dtype)

    shapes = eqx.filter_eval_shape(initialise, config, jax.random.key(0))
    made: Transformer = jax.tree.map(filled, shapes)
    return made


def text(job: Job) -> Any:
    """Random ids as windows: one document each."""
    ids = job.tokens(WINDOWS)
    starts = np.arange(WINDOWS, dtype=np.int64) * job.seq
    lengths = np.full(WINDOWS, job.seq, np.int64)
    keys = np.arange(WINDOWS, dtype=np.uint64)
    return windows(TokenCorpus("random", ids.reshape(-1), starts, lengths, keys, frozenset(), None), job.seq)


def fitting(job: Job, shape: Shape) -> tuple[dict[str, Any], dict[str, Part]]:
    """`fit`, stopped and let go on by what it calls with every row of numbers: a turn lies between two rows."""
    subject = Subject(model(job), None, "random")
    method = SparseAutoencoder(features=shape.features, k=shape.k)
    last: dict[str, Any] = {}

    def run(turns: Turns) -> None:
        def track(row: Mapping[str, Any]) -> None:
            last.update(row)
            turns.pause()

        site = f"blocks/{job.layer}/mlp"
        rhythm = {"steps": STEPS, "log_every": job.steps, "batch_size": shape.tokens}
        fit(method, subject, text(job), site=site, **rhythm, track=[track], progress=False)

    turns = Turns(run)

    def turn() -> dict[str, Any]:
        turns.turn()
        return {"fvu": last["fvu"], "tokens": job.steps * shape.tokens}

    return {"version": version("jax"), "dtype": job.dtype}, {"job": turn}


def floors(job: Job, shape: Shape) -> tuple[dict[str, Any], dict[str, Part]]:
    """The harvest, its matmuls alone, and the parts of a step alone."""
    subject = model(job)
    ids = jnp.asarray(job.tokens(shape.tokens // job.seq))
    windows = {"tokens": ids, "weight": jnp.ones(ids.shape, jnp.float32)}
    take = Harvest((f"blocks/{job.layer}/mlp/out",))
    harvest = jax.jit(lambda model, windows: take(model, windows).arrays)
    start = jnp.asarray(np.random.default_rng(1).standard_normal((*ids.shape, job.width), np.float32), job.dtype)
    products = jax.jit(layer_products, static_argnums=2)

    def harvest_products() -> None:
        x, *others = start, ()
        for block in subject.blocks[: job.layer + 1]:
            x, *others = products(block, x, job)
        jax.block_until_ready((x, others))

    x = jnp.asarray(activations(shape)[0])
    random = np.random.default_rng(2)
    rows = jnp.asarray(random.standard_normal((shape.features, shape.width), np.float32))
    values = jnp.asarray(random.standard_normal((shape.tokens, shape.k), np.float32))
    indices = jnp.asarray(random.integers(0, shape.features, (shape.tokens, shape.k), np.int32))
    encoder, decoder = jax.jit(lambda x, rows: x @ rows.T), jax.jit(sparse_decode)
    tokens = {"tokens": shape.tokens}

    def part(function: Callable[..., Any], *arguments: Any) -> Part:
        def once() -> dict[str, Any]:
            jax.block_until_ready(function(*arguments))
            return tokens

        return once

    _, of_step = topk_programs.parts(shape)

    def also(name: str) -> Part:
        return lambda: of_step[name]() | tokens

    return {"version": version("jax")}, {
        **{name: also(name) for name in ("encode", "d values", "d rows", "adam")},
        "harvest": part(harvest, subject, windows),
        "harvest matmuls": part(harvest_products),
        "encoder": part(encoder, x, rows),
        "decoder": part(decoder, values, indices, rows),
    }


def layer_products(block: Any, x: Array, job: Job) -> tuple[Array, Array, Array]:
    """The matmuls of one layer and nothing else; (the last, and those that nothing here reads).

    Attention products are those of all pairs of positions, in the layout in which they are fastest here: one matrix a
    window and key head.
    """
    batch, seq, _ = x.shape
    attn, mlp = block.attn, block.mlp
    q, k, v = x @ attn.q_proj.weight, x @ attn.k_proj.weight, x @ attn.v_proj.weight
    group = job.heads // job.kv_heads
    q = q.reshape(batch, job.kv_heads, seq * group, job.head_dim)
    k = k.reshape(batch, job.kv_heads, seq, job.head_dim)
    v = v.reshape(batch, job.kv_heads, seq, job.head_dim)
    scores = jnp.einsum("bnqd,bnkd->bnqk", q, k)
    z = jnp.einsum("bnqk,bnkd->bnqd", scores, v).reshape(batch, seq, -1)
    out = z @ attn.o_proj.weight
    hidden, up = out @ mlp.gate_proj.weight, out @ mlp.up_proj.weight
    return hidden @ mlp.down_proj.weight, up, scores[:1]


def main(which: str, job: Job) -> None:
    """Serve one of the programs."""
    start = {"fit": fitting, "floors": floors}[which]
    serve(lambda: lambda shape: start(job, shape))


if __name__ == "__main__":
    main(sys.argv[1], Job.parse(sys.argv[2]))
