"""Dictionaries of every kind that a format can hold, for the tests; and in a folder, for the other libraries to load:

python -m tests.interchange.written F      writes F/<case>/{its files, expected.npz}
PEERS/bin/python tests/interchange/make_goldens.py --check F
"""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.decompositions.activations import ReLU, TopK
from jaxinterp.decompositions.cross_layer import CrossLayer, Layer
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import Gated, JumpReLU
from jaxinterp.interchange import Format, write

FEATURES, D, D_OUT = 24, 12, 10
MLP = Sites("blocks/3/mlp/in", "blocks/3/mlp/out")


def draw(seed: int, *shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.5, jnp.float32)


def dictionary(
    activation: Any,
    sites: Sites,
    *,
    d_out: int = D,
    skip: bool = False,
    centred: bool = False,
    scaled: bool = False,
    known: bool = True,
) -> Dictionary:
    """A random dictionary: `centred` subtracts the decoder's bias, `scaled` has means and scales of every sort."""
    bias = draw(1, d_out)
    return Dictionary(
        encoder=draw(2, FEATURES, D),
        encoder_bias=draw(3, FEATURES),
        decoder=draw(4, FEATURES, d_out),
        decoder_bias=bias,
        skip=draw(5, D, d_out) if skip else None,
        input_mean=bias if centred else (draw(6, D) if scaled else jnp.zeros(D)),
        input_scale=jnp.asarray(1.7 if scaled else 1.0),
        output_mean=draw(7, d_out) if scaled else jnp.zeros(d_out),
        output_scale=jnp.asarray(0.6 if scaled else 1.0),
        target_mean=draw(8, d_out) if known else jnp.full(d_out, jnp.nan),
        target_variance=jnp.asarray(2.5 if known else jnp.nan),
        tokens_since_fired=jnp.zeros(FEATURES, jnp.int32),
        activation=activation,
        sites=sites,
    )


def jumprelu() -> JumpReLU:
    return JumpReLU(jnp.abs(draw(9, FEATURES)), "raw", 0.001)


def gated() -> Gated:
    return Gated(draw(10, FEATURES), draw(11, FEATURES), draw(12, FEATURES))


def at(site: str) -> Sites:
    return Sites(site, site)


CASES: dict[str, tuple[Format, Any]] = {
    "standard": ("saelens", lambda **how: dictionary(ReLU(), at("blocks/2/resid/post"), **how)),
    "topk": ("saelens", lambda **how: dictionary(TopK(4), at("blocks/2/mlp/out"), **how)),
    "jumprelu": ("saelens", lambda **how: dictionary(jumprelu(), at("blocks/2/mlp/added"), **how)),
    "gated": ("saelens", lambda **how: dictionary(gated(), at("blocks/2/mlp/hidden"), **how)),
    "heads": ("saelens", lambda **how: dictionary(ReLU(), at("blocks/2/attn/z"), **how)),
    "transcoder": ("saelens", lambda **how: dictionary(ReLU(), MLP, d_out=D_OUT, **how)),
    "skip_transcoder": ("saelens", lambda **how: dictionary(ReLU(), MLP, d_out=D_OUT, skip=True, **how)),
    "jumprelu_transcoder": ("saelens", lambda **how: dictionary(jumprelu(), MLP, d_out=D_OUT, **how)),
    "jumprelu_skip": ("saelens", lambda **how: dictionary(jumprelu(), MLP, d_out=D_OUT, skip=True, **how)),
    "sparsify_sae": ("sparsify", lambda **how: dictionary(TopK(4), at("blocks/2/resid/post"), **how)),
    "sparsify_transcoder": ("sparsify", lambda **how: dictionary(TopK(4), MLP, **how)),
    "sparsify_skip": ("sparsify", lambda **how: dictionary(TopK(4), MLP, skip=True, **how)),
}
"""(format, a function from the options of `dictionary` to one) by the name of the case."""

INPUTS = draw(20, 7, D)


def cross_layer(activations: Any) -> CrossLayer:
    """A random cross-layer transcoder with means and scales of every sort; layer n writes to all from n on."""
    layers = len(activations)
    parts = [
        Layer(
            encoder=draw(30 + n, FEATURES, D),
            encoder_bias=draw(40 + n, FEATURES),
            decoder=draw(50 + n, FEATURES, layers - n, D),
            decoder_bias=draw(60 + n, D),
            input_mean=draw(70 + n, D),
            input_scale=1 + abs(draw(80 + n, D)),
            output_mean=draw(90 + n, D),
            output_scale=1 + abs(draw(100 + n, D)),
            target_mean=draw(110 + n, D),
            target_variance=jnp.asarray(1.0),
            tokens_since_fired=jnp.zeros(FEATURES, jnp.int32),
            activation=activation,
        )
        for n, activation in enumerate(activations)
    ]
    return CrossLayer(
        tuple(parts), Sites(*(tuple(f"blocks/{n}/mlp/{port}" for n in range(layers)) for port in ("in", "out")))
    )


TRACER: dict[str, Any] = {
    "tracer_relu": lambda **how: dictionary(ReLU(), MLP, **how),
    "tracer_jump_skip": lambda **how: dictionary(jumprelu(), MLP, skip=True, **how),
    "tracer_clt": lambda **how: cross_layer([ReLU()] * 3),
    "tracer_clt_jump": lambda **how: cross_layer([jumprelu()] * 3),
}
"""What circuit-tracer can hold, by name."""


def codes_and_outputs(made: Any) -> tuple[Any, Any, Any]:
    """(x, z, y): of a cross-layer transcoder layer after layer."""
    if isinstance(made, CrossLayer):
        x = draw(21, len(made.layers), 7, D)
        codes = jnp.stack([codes.dense() for codes in made.encode(tuple(x)).layers])
        return x, codes, jnp.stack(made(tuple(x)))
    return INPUTS, made.encode(INPUTS).dense(), made(INPUTS)


def main(folder: Path) -> None:
    for name, (format, make) in CASES.items():
        for how in ({}, {"scaled": True}, *([] if "transcoder" in name or "skip" in name else [{"centred": True}])):
            made = make(**how)
            place = write(made, folder / "-".join([name, *how]), format=format)
            codes, outputs = made.encode(INPUTS).dense(), made(INPUTS)
            if name == "heads":  # SAELens wants one axis for the heads here
                (place / "cfg.json").write_text((place / "cfg.json").read_text().replace('"hook_z"', '"none"'))
            np.savez(place / "expected.npz", x=INPUTS, z=codes, y=outputs)
    for name, make in TRACER.items():
        for how in ({}, {"scaled": True}):
            made = make(**how)
            place = write(made, folder / "-".join([name, *how]), format="circuit_tracer")
            x, codes, outputs = codes_and_outputs(made)
            np.savez(place / "expected.npz", x=x, z=codes, y=outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
