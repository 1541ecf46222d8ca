"""A Neuronpedia batch file of a tiny model, for the tests; and in a folder, for SAEDashboard's own dataclasses:

python -m tests.interchange.written_batches F
PEERS/bin/python tests/interchange/make_neuronpedia_golden.py DASHBOARD --check F/batch-0.json
"""

import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.activations import ReLU
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.interchange import write_neuronpedia
from jaxinterp.models.tiny import tiny_subject

SITE, FEATURES = "blocks/1/mlp/out", 12


def subject_text_dictionary() -> Any:
    """(subject, held-out text, a random dictionary)."""
    subject = tiny_subject()
    rng, d = np.random.default_rng(0), subject.model.config.d_model
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    dictionary = Dictionary(
        encoder=draw(FEATURES, d),
        encoder_bias=draw(FEATURES) - 1,
        decoder=draw(FEATURES, d),
        decoder_bias=draw(d),
        skip=None,
        input_mean=jnp.zeros(d),
        input_scale=jnp.ones(()),
        output_mean=jnp.zeros(d),
        output_scale=jnp.ones(()),
        target_mean=jnp.zeros(d),
        target_variance=jnp.ones(()),
        tokens_since_fired=jnp.zeros(FEATURES, jnp.int32),
        activation=ReLU(),
        sites=Sites(SITE, SITE),
    )
    windows = np.random.default_rng(1).integers(97, 123, (6, 16)).astype(np.int32)
    weight = np.ones((6, 16), np.float32)
    weight[0, :4] = 0
    return subject, [{"tokens": row, "weight": each} for row, each in zip(windows, weight, strict=True)], dictionary


def main(folder: Path) -> None:
    subject, text, dictionary = subject_text_dictionary()
    write_neuronpedia(dictionary, subject, text, folder, model_id="tiny", sae_set="mine", tokens=64, dataset="cats")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
