"""What each feature responds to, measured on held-out text: two readings of its windows' codes.

    first    how often every feature fires, and the windows in which it peaks highest
    second   for the features chosen to be shown: histogram, and the activations around those peaks

The codes of a batch are computed under jit (see `peaks`). The first reading keeps, for every feature, a count and the
highest peaks, and sparse codes on the host for the second; dense codes, or more than 256 MiB of sparse ones, are
computed again, in a second pass over the text. Tokens of weight 0 (attention sinks, special tokens) count nowhere and
are shown as silent.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxinterp.core.decomposition import Decomposition, Revivable, Shown
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.core.sites import several
from jaxinterp.evaluation.features.ablation import ablation
from jaxinterp.evaluation.features.peaks import (
    Kept,
    Peaks,
    Window,
    batches,
    chosen_codes,
    collect,
    columns_of,
    measure_and_keep,
)
from jaxinterp.evaluation.features.vectors import direct_logits, neuron_cosines, row_cosines
from jaxinterp.models.load import Subject
from jaxinterp.report.content import FeaturePage, NeuronMatch, TokenContext
from jaxinterp.report.passages import by_quantile, context_at, extremes
from jaxinterp.training.progress import counting

BINS = 30
NEURONS = 6


@dataclass(frozen=True)
class Text:
    """What the second pass finds, one entry a chosen feature: contexts, firings (token, activation), and histogram."""

    contexts: list[list[TokenContext]]
    quantiles: list[tuple[tuple[str, tuple[TokenContext, ...]], ...]]
    firings: list[tuple[np.ndarray, np.ndarray]]
    edges: list[np.ndarray]
    counts: list[np.ndarray]


@ordinary()
def feature_pages(
    decomposition: Decomposition,
    subject: Subject,
    dataset: Iterable[Window],
    *,
    features: int | Sequence[int] = 64,
    contexts: int = 8,
    tokens: int = 50_000,
    seed: int = 0,
    later: int = 0,
    progress: bool = False,
) -> tuple[Float[np.ndarray, " features"], tuple[FeaturePage, ...]]:
    """Measure every feature's density, and choose features to show with all that a report says about them.

    Which features: those that are asked for, `features=[606, 12]`. Of a number of them, the live ones are ordered by
    density and cut into that many groups of equal size, and one of each is drawn at random, so that rare and frequent
    features are shown in the proportion in which they occur. Contexts are the highest peaks (by |activation|), at most
    one from each window, with `AROUND` tokens on either side within the document.

    Args:
      decomposition: has `encoder` and `decoder`, one row a feature, and `sites`.
      dataset: held-out windows {"tokens", "weight", "document"}, each `[seq]`, or batches of them, `[batch, seq]`. Of a
        dataset with a length a random sample is read, of any other iterable the beginning.
      features: how many to show at most; or which ones, by index: dead ones too, without contexts.
      contexts: how many passages each.
      tokens: how much of the dataset to read, in tokens (whole windows, at least one).
      seed: of the sample and the draw.
      later: over how many windows each shown feature is ablated, to say what later layers make of it; 0: not. Two
        forward passes of a window each.
      progress: show how far it is: a bar on a terminal, elsewhere a line every ten seconds.
    Returns:
      The firing frequency per token of every feature, and the chosen features in the order of their index, or in the
      order that was asked for.
    Raises:
      UserError: a number is not positive, a feature is out of range or named twice, there is no window, or the
        decomposition has no read and write vectors.

    Example:
      >>> chosen = {"features": [3, 5], "contexts": 2, "tokens": 1024}
      >>> densities, pages = feature_pages(result.decomposition, subject, heldout, **chosen)
      >>> densities.shape, [page.index for page in pages]
      ((64,), [3, 5])
    """
    if later < 0:
        raise UserError(f"later={later} must not be negative: give how many windows to ablate in, or 0.")
    counts = {"contexts": contexts, "tokens": tokens} | ({"features": features} if isinstance(features, int) else {})
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1.")
    if not isinstance(decomposition, Shown):
        raise UserError(
            f"decomposition={type(decomposition).__name__} has no encoder and decoder rows: feature pages show "
            "dictionaries (transcoder, skip_transcoder, sparse_autoencoder)."
        )
    asked = np.zeros(0, int) if isinstance(features, int) else _asked(features, decomposition.decoder.shape[0])
    windows = collect(dataset, tokens, seed)
    peaks, kept = measure_and_keep(decomposition, subject.model, windows, contexts, progress=progress)
    densities = np.asarray(peaks.fired, np.float64) / max(float(peaks.weight), 1.0)
    chosen = choose(densities, features, seed) if isinstance(features, int) else asked
    if not chosen.size:
        return densities, ()
    return densities, _pages(decomposition, subject, windows, peaks, kept, densities, chosen, later, progress)


def _asked(features: Sequence[int], known: int) -> np.ndarray:
    """The features that were asked for, as indices."""
    for index in features:
        if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < known:
            raise UserError(f"features: {index!r} is not an index of a feature, 0 to {known - 1}.")
    if len(set(features)) < len(features):
        raise UserError(f"features={list(features)} names a feature twice.")
    if not features:
        raise UserError("features=[] names no feature: give indices, such as [606], or how many to show.")
    return np.asarray(features, np.int64)


def choose(densities: Float[np.ndarray, " features"], count: int, seed: int = 0) -> Int[np.ndarray, " chosen"]:
    """`count` live features, one drawn from each of `count` equal groups by density; all where there are fewer."""
    live = np.flatnonzero(densities > 0)
    if live.size <= count:
        return live
    by_density = live[np.argsort(densities[live], kind="stable")]
    draw = np.random.default_rng(seed)
    return np.sort(np.array([draw.choice(group) for group in np.array_split(by_density, count)]))


def _pages(
    decomposition: Shown,
    subject: Subject,
    windows: Sequence[Window],
    peaks: Peaks,
    kept: Sequence[Kept],
    densities: np.ndarray,
    chosen: np.ndarray,
    later: int,
    progress: bool,
) -> tuple[FeaturePage, ...]:
    """The second reading, and what the vectors say, put together."""
    values = np.asarray(peaks.values)[chosen]
    text = _read_text(decomposition, subject, windows, peaks, kept, chosen, progress)
    (reads, *_), (writes, *_) = several(decomposition.sites.reads), several(decomposition.sites.writes)
    encoder = np.asarray(decomposition.encoder, np.float32)[chosen]
    decoder = np.asarray(decomposition.decoder, np.float32)[chosen]
    logits = direct_logits(
        subject.model,
        writes,
        decoder * (float(decomposition.output_scale) if isinstance(decomposition, Revivable) else 1.0),
    )
    write_cosines = neuron_cosines(subject.model, writes, decoder)
    read_cosines = neuron_cosines(subject.model, reads, encoder)
    own = row_cosines(encoder, decoder)
    pages = []
    shown = counting(len(chosen), "ablating the shown features", "features", shown=progress and later > 0)
    with shown as done:
        for row, index in enumerate(chosen):
            done()
            raised, lowered = ((), ()) if logits is None else extremes(subject.tokenizer, logits[row])
            after = _later(decomposition, subject, windows, int(index), text.firings[row], later) if later else ((), ())
            pages.append(
                FeaturePage(
                    index=int(index),
                    density=float(densities[index]),
                    max_activation=float(values[row, 0]),
                    contexts=tuple(text.contexts[row]),
                    histogram_edges=tuple(map(float, text.edges[row])),
                    histogram_counts=tuple(map(int, text.counts[row])),
                    raised=raised,
                    lowered=lowered,
                    neurons=_nearest(
                        None if write_cosines is None else write_cosines[row],
                        None if read_cosines is None else read_cosines[row],
                    ),
                    read_write_cosine=None if own is None else float(own[row]),
                    quantiles=text.quantiles[row],
                    later_raised=after[0],
                    later_lowered=after[1],
                )
            )
    return tuple(pages)


def _read_text(
    decomposition: Shown,
    subject: Subject,
    windows: Sequence[Window],
    peaks: Peaks,
    kept: Sequence[Kept],
    chosen: np.ndarray,
    progress: bool,
) -> Text:
    """The second reading: histograms of the chosen features, and their activations around their peaks."""
    values, where, places = (np.asarray(part)[chosen] for part in (peaks.values, peaks.windows, peaks.places))
    # Codes are positive in most decompositions; where they are not, the range takes in both signs.
    reach = np.abs(values[:, 0])
    signed = bool((values < 0).any())
    edges = [np.linspace(-top if signed else 0.0, top, BINS + 1) for top in reach]
    counts = [np.zeros(BINS, np.int64) for _ in chosen]
    active: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in chosen]
    found: dict[tuple[int, int], TokenContext] = {}
    wanted: dict[int, list[tuple[int, int]]] = {}
    for row, rank in zip(*np.nonzero(values), strict=True):
        wanted.setdefault(int(where[row, rank]), []).append((int(row), int(rank)))

    with counting(len(kept), "reading the shown features' contexts", "batches", shown=progress) as done:
        for number, (first, batch) in enumerate(batches(windows, decomposition.decoder.shape[0])):
            done()
            known = kept[number]
            if known is None:
                codes = np.asarray(chosen_codes(decomposition, subject.model, batch, jnp.asarray(chosen)))
            else:
                codes = columns_of(known, chosen)
            for row in range(len(chosen)):
                flat = codes[..., row].reshape(-1)
                fires = np.flatnonzero(flat)
                active[row].append((first * codes.shape[1] + fires, flat[fires]))
                # Two passes may round differently: an activation a hair above the highest belongs into the last bin.
                counts[row] += np.histogram(np.clip(flat[fires], edges[row][0], edges[row][-1]), edges[row])[0]
            for offset in range(codes.shape[0]):
                for row, rank in wanted.get(first + offset, ()):
                    place, activations = int(places[row, rank]), codes[offset, :, row].copy()
                    activations[place] = values[row, rank]
                    found[row, rank] = context_at(subject.tokenizer, windows[first + offset], activations, place)
    ranks, rows = range(values.shape[1]), range(len(chosen))
    firings = [(np.concatenate([w for w, _ in parts]), np.concatenate([v for _, v in parts])) for parts in active]
    quantiles = [by_quantile(subject.tokenizer, windows, firings[row], {*where[row].tolist()}) for row in rows]
    contexts = [[found[row, rank] for rank in ranks if (row, rank) in found] for row in rows]
    return Text(contexts, quantiles, firings, edges, counts)


def _later(
    decomposition: Shown,
    subject: Subject,
    windows: Sequence[Window],
    feature: int,
    firings: tuple[np.ndarray, np.ndarray],
    count: int,
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """The next tokens that a feature raises and lowers through all later layers, in the windows where it peaks."""
    where, values = firings
    if not len(where):
        return (), ()
    seq = len(windows[0]["tokens"])
    strongest = list(dict.fromkeys((where[np.argsort(-np.abs(values), kind="stable")] // seq).tolist()))[:count]
    fires = np.zeros((len(windows), seq), bool)
    fires.reshape(-1)[where] = True
    chosen = np.resize(strongest, count)  # one shape, one program; a window that comes again does not count again
    fires = fires[chosen] & (np.arange(count) < len(strongest))[:, None]
    tokens = jnp.asarray(np.stack([windows[each]["tokens"] for each in chosen]), jnp.int32)
    raises = ablation(decomposition, subject.model, tokens, feature, jnp.asarray(fires)).raises
    return extremes(subject.tokenizer, np.asarray(raises))


def _nearest(write: np.ndarray | None, read: np.ndarray | None) -> tuple[NeuronMatch, ...]:
    """The neurons with the largest |cosine| to the write vector, or to the read vector where that is all there is."""
    ranked = write if write is not None else read
    if ranked is None:
        return ()
    return tuple(
        NeuronMatch(
            int(index), None if write is None else float(write[index]), None if read is None else float(read[index])
        )
        for index in np.argsort(-np.abs(ranked), kind="stable")[:NEURONS]
    )
