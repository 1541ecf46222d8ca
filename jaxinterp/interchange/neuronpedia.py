"""Neuronpedia's batch files: what SAEDashboard writes of features for upload, `batch-<n>.json`.

    {model_id, layer, sae_set, sae_id_suffix, features: [{feature_index, activations, logits, histograms, ...}]}

Of every feature: the windows of its highest activations (bin_min -1, bin_contains -1), then up to `examples` of each
of five equal intervals between 0 and the maximum, with the fraction of all tokens that lie in it; the ten most raised
and lowered tokens by the direct path to the logits; histograms of its activations that are not 0 and of these logits;
the coordinates that its write vector is largest at. Correlations with other features and neurons are left empty, as
SAEDashboard does without its tables. Numbers are rounded to three places, as there.

Source: SAEDashboard 0.8.0 (neuronpedia/neuronpedia_dashboard.py, neuronpedia_converter.py).
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.core.promotion import ordinary
from jaxinterp.evaluation.features.peaks import batches, chosen_codes, collect
from jaxinterp.evaluation.features.vectors import direct_logits
from jaxinterp.models.load import Subject
from jaxinterp.storage.files import check_empty, write_text

INTERVALS, BARS, LOGITS, NEURONS = 5, 50, 10, 3

Feature = dict[str, Any]


@ordinary()
def write_neuronpedia(
    decomposition: Any,
    subject: Subject,
    heldout: Any,
    folder: str | Path,
    *,
    model_id: str,
    sae_set: str,
    features: Sequence[int] | None = None,
    tokens: int = 65_536,
    top: int = 20,
    examples: int = 5,
    a_file: int = 64,
    dataset: str = "",
    seed: int = 0,
) -> list[Path]:
    """Write `batch-<n>.json` files into a folder, which must be empty or absent; returns their paths.

    Args:
      decomposition: with read and write vectors, of one layer.
      subject: with a tokenizer.
      heldout: windows of text as `load_text` gives them.
      model_id, sae_set: Neuronpedia's names of the model and of the set of dictionaries.
      features: which ones; None: all.
      tokens: how many are looked at.
      top, examples: windows of the highest activations, and of each interval.
      a_file: features a file.
      dataset: the name of the text.
      seed: which windows of the text.
    Raises:
      UserError: there is no tokenizer, the decomposition is of several layers, or a feature is not there.
    """
    folder, tokenizer = check_empty(folder, overwrite=False), subject.tokenizer
    if tokenizer is None:
        raise UserError(f"subject {subject.name!r} has no tokenizer, and Neuronpedia's files show text.")
    sites = decomposition.sites
    layer = re.match(r"blocks/(\d+)/", sites.reads) if isinstance(sites.reads, str) else None
    if layer is None or not isinstance(sites.writes, str):
        raise UserError(f"{sites}: Neuronpedia's files are of one layer.")
    count = decomposition.decoder.shape[0]
    wanted = np.arange(count) if features is None else np.asarray(list(features), np.int64)
    if wanted.size and not (wanted.min() >= 0 and wanted.max() < count):
        raise UserError(f"features: {int(wanted.max())} is not one of {count}.")
    windows = collect(heldout, tokens, seed)
    written = []
    for number, first in enumerate(range(0, len(wanted), a_file)):
        chosen = wanted[first : first + a_file]
        codes = _codes(decomposition, subject.model, windows, chosen)
        vectors = np.asarray(decomposition.decoder, np.float64)[chosen]
        logits = direct_logits(subject.model, sites.writes, vectors)
        made = [
            _feature(
                int(index),
                codes[..., place],
                windows,
                vectors[place],
                None if logits is None else logits[place],
                tokenizer.token_text,
                top,
                examples,
                dataset,
            )
            for place, index in enumerate(chosen)
        ]
        batch = {"model_id": model_id, "layer": int(layer[1]), "sae_set": sae_set, "sae_id_suffix": None}
        written.append(folder / f"batch-{number}.json")
        write_text(written[-1], json.dumps({**batch, "features": made}))
    return written


def _codes(
    decomposition: Any, model: PyTree, windows: Sequence[Any], chosen: Int[np.ndarray, " chosen"]
) -> Float[np.ndarray, "windows seq chosen"]:
    """The codes of the chosen features at every token."""
    parts = [
        np.asarray(chosen_codes(decomposition, model, batch, jnp.asarray(chosen, jnp.int32)))
        for _, batch in batches(windows, decomposition.decoder.shape[0])
    ]
    return np.concatenate(parts)[: len(windows)]


def _feature(
    index: int,
    codes: Float[np.ndarray, "windows seq"],
    windows: Sequence[Any],
    vector: Float[np.ndarray, " d"],
    logits: Float[np.ndarray, " vocab"] | None,
    piece: Callable[[int], str],
    top: int,
    examples: int,
    dataset: str,
) -> Feature:
    """One feature of a batch, with SAEDashboard's keys."""
    weight = np.stack([np.asarray(window["weight"]) for window in windows]) > 0
    active = codes[(codes != 0) & weight]
    rising = np.zeros(0) if logits is None else logits
    order = np.argsort(rising, kind="stable")
    low, high = order[:LOGITS], order[::-1][:LOGITS]
    largest = np.argsort(-np.abs(vector), kind="stable")[:NEURONS]
    active_values, active_heights = _histogram(active)
    logit_values, logit_heights = _histogram(rising)
    return {
        "feature_index": index,
        "neuron_alignment_indices": [int(each) for each in largest],
        "neuron_alignment_values": _rounded(vector[largest]),
        "neuron_alignment_l1": _rounded(np.abs(vector[largest]) / max(float(np.abs(vector).sum()), 1e-30)),
        **{f"correlated_{kind}": [] for kind in CORRELATED},
        "neg_str": [piece(int(token)) for token in low],
        "neg_values": _rounded(rising[low]),
        "pos_str": [piece(int(token)) for token in high],
        "pos_values": _rounded(rising[high]),
        "frac_nonzero": float(active.size / max(int(weight.sum()), 1)),
        "freq_hist_data_bar_values": active_values,
        "freq_hist_data_bar_heights": active_heights,
        "logits_hist_data_bar_heights": logit_heights,
        "logits_hist_data_bar_values": logit_values,
        "n_prompts_total": len(windows),
        "n_tokens_in_prompt": int(weight.shape[1]),
        "dataset": dataset,
        "decoder_weights_dist": [],
        "activations": _activations(codes, weight, windows, piece, top, examples),
        "vector": [],
    }


CORRELATED = (
    *("neurons_indices", "neurons_l1", "neurons_pearson"),
    *("features_indices", "features_l1", "features_pearson"),
)


def _activations(
    codes: Float[np.ndarray, "windows seq"],
    weight: np.ndarray,
    windows: Sequence[Any],
    piece: Callable[[int], str],
    top: int,
    examples: int,
) -> list[dict[str, Json]]:
    """Windows of the highest activations, then of each interval, from the highest down; each window once a group."""
    counted = np.where(weight, codes, 0.0)
    maximum = float(counted.max(initial=0.0))
    if maximum <= 0:
        return []
    groups: list[tuple[float, float, float, np.ndarray]] = [(-1.0, maximum, -1.0, counted)]
    bounds = np.linspace(0, maximum, INTERVALS + 1)
    for lower, upper in zip(bounds[-2::-1], bounds[:0:-1], strict=True):
        inside = (counted > lower) & (counted <= upper)
        share = float(inside.sum() / max(int(weight.sum()), 1))
        groups.append((float(lower), float(upper), share, np.where(inside, counted, 0.0)))
    found = []
    for number, (lower, upper, share, values) in enumerate(groups):
        peaks, places = values.max(axis=1), values.argmax(axis=1)
        for window in np.argsort(-peaks, kind="stable")[: top if number == 0 else examples]:
            if peaks[window] <= 0:
                break
            found.append(
                {
                    "bin_min": round(lower, 3),
                    "bin_max": round(upper, 3),
                    "bin_contains": round(share, 5),
                    "tokens": [piece(int(token)) for token in windows[window]["tokens"]],
                    "values": _rounded(counted[window]),
                    "qualifying_token_index": int(places[window]),
                }
            )
    return found


def _histogram(values: Float[np.ndarray, " n"]) -> tuple[list[float], list[float]]:
    """(middles, counts) of equal bars; empty where there is nothing."""
    if not values.size:
        return [], []
    counts, edges = np.histogram(values, BARS)
    return _rounded((edges[1:] + edges[:-1]) / 2), [float(count) for count in counts]


def _rounded(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.round(np.asarray(values, np.float64), 3)]
