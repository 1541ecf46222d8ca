"""What a dictionary that was trained on planted samples has found, and what random rows would score.

Everything is measured on samples that the dictionary has not seen, in one encoding with inference thresholds:

    mcc, frr_8, frr_9, sign_errors, code_correlation   as `recovery` has them, FRR at cosine 0.8 and 0.9
    fvu              sum |y - ŷ|^2 / sum |y - mean(y)|^2
    l0               active features per sample
    dead_fraction    features that are active on no sample
"""

from collections.abc import Mapping
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxinterp.evaluation.planted.laboratory import CODES
from jaxinterp.evaluation.planted.recovery import code_correlation, cosines, finite, frr, match, mcc, sign_errors
from jaxinterp.evaluation.stability import compare_seeds
from jaxinterp.models.tiny import unit_rows


class PlantedScores(NamedTuple):
    """The module's numbers (NaN where the dictionary is not finite), and how often each feature is active."""

    numbers: dict[str, float]
    frequency: Float[np.ndarray, " features"]

    @property
    def live(self) -> np.ndarray:
        """Which features are active on some sample."""
        return self.frequency > 0


def planted_scores(
    dictionary: PyTree, planted: Float[Array | np.ndarray, "n d_out"], samples: Mapping[str, Float[Array, "samples _d"]]
) -> PlantedScores:
    """Score a trained dictionary on samples that it has not seen, as it is used: with inference thresholds.

    Args:
      planted: the rows that its write vectors should be.
      samples: by site name, with the planted codes as `h`: what `Plant.draw` gives.
    """
    x, y = samples[dictionary.sites.reads], samples[dictionary.sites.writes]
    codes, squares, spread = _reconstructed(dictionary, x, y)
    decoder, dense = np.asarray(dictionary.decoder), np.asarray(codes)
    frequency = (dense != 0).mean(axis=0)
    sound = finite(decoder, dense)
    numbers = {
        "mcc": mcc(planted, decoder),
        "frr_8": frr(planted, decoder, 0.8),
        "frr_9": frr(planted, decoder, 0.9),
        "sign_errors": sign_errors(planted, decoder),
        "code_correlation": code_correlation(samples[CODES], dense, match(planted, decoder)) if sound else np.nan,
        "fvu": float(squares / spread),
        "l0": float(frequency.sum()) if sound else np.nan,
        "dead_fraction": float((frequency == 0).mean()) if sound else np.nan,
    }
    return PlantedScores(numbers, frequency)


@eqx.filter_jit
def _reconstructed(dictionary: PyTree, x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Dense codes, the squared error and the squares about the mean."""
    codes = dictionary.encode(x)
    return codes.dense(), jnp.sum((y - dictionary.decode(codes, x)) ** 2), jnp.sum((y - jnp.mean(y, axis=0)) ** 2)


def read_cosine(
    read: Float[Array | np.ndarray, "n d_in"], planted: Float[Array | np.ndarray, "n d_out"], dictionary: PyTree
) -> float:
    """The mean cosine of planted with learned read vectors, matched as the write vectors are."""
    if not finite(dictionary.encoder, dictionary.decoder):
        return float("nan")
    pairs = match(planted, dictionary.decoder)
    return float(cosines(read, dictionary.encoder)[pairs.planted, pairs.learned].mean())


def chance_scores(planted: Float[Array | np.ndarray, "n d"], features: int, key: PRNGKeyArray) -> dict[str, float]:
    """What random unit rows score: mcc, frr_8, frr_9, and `stability`, of two such dictionaries with each other."""
    one, other = (unit_rows(each, features, planted.shape[1]) for each in jax.random.split(key))
    return {
        "mcc": mcc(planted, one),
        "frr_8": frr(planted, one, 0.8),
        "frr_9": frr(planted, one, 0.9),
        "stability": compare_seeds([one, other]).cosine,
    }
