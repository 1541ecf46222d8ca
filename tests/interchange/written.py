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


def main(folder: Path) -> None:
    for name, (format, make) in CASES.items():
        for how in ({}, {"scaled": True}, *([] if "transcoder" in name or "skip" in name else [{"centred": True}])):
            made = make(**how)
            place = write(made, folder / "-".join([name, *how]), format=format)
            codes, outputs = made.encode(INPUTS).dense(), made(INPUTS)
            if name == "heads":  # SAELens wants one axis for the heads here
                (place / "cfg.json").write_text((place / "cfg.json").read_text().replace('"hook_z"', '"none"'))
            np.savez(place / "expected.npz", x=INPUTS, z=codes, y=outputs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
