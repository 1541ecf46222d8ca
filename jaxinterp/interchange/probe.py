"""Whether a dictionary that was read explains what it should: FVU and L0 on a subject's activations.

    fvu = sum |y - ŷ|^2 / sum |y - mean(y)|^2

A file read in the wrong way gives numbers, not errors. So other readings of the same arrays are tried: another
activation always; a transposed weight, the bias subtracted or not, a scale, the sites around where the file's own
reading leaves more than `GOOD` unexplained. The import is refused where

    fvu > 1                     it explains nothing here, or
    fvu' < fvu / far, fvu' < 1  another reading explains far more: the file looks like that

Where another reading explains a little more (`NOTABLE`), or the site of another layer does, a warning says so: the file
is read as it says. `force` turns a refusal into a warning. What is read is never changed.

with far = 2 where fewer features are active or fvu > `POOR`, 8 elsewhere, 1.25 for a transposed weight, and 0.95 for a
quarter of the active features where those are more than a quarter of all. A sound dictionary passes: taking codes away
never halves what it leaves unexplained, a transposed weight is never the better one, other sites and scales are far
better only where its own explains little, and codes that can nearly all go are no codes.
"""

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import grain
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import harvested
from jaxinterp.data.text.load_text import take
from jaxinterp.decompositions.activations import ReLU
from jaxinterp.decompositions.codes import DenseCodes
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.decompositions.per_token import Kind, PerToken
from jaxinterp.decompositions.per_token import per_token as scales_of
from jaxinterp.models.sites import sites as sites_of

GOOD, POOR, WORST = 0.1, 0.3, 1.0
NEARLY, TURNED, FAR, FARTHER, DENSE = 0.95, 1.25, 2.0, 8.0, 0.25
NOTABLE, LITTLE = 0.95, 0.001
"""Another reading is reported if it leaves at most this share of the variance that the given one leaves."""

TOKENS, TRIED = 4096, 512
"""Tokens that the dictionary itself is measured on, and other readings of it."""

SCALES = tuple(2.0**power for power in range(-6, 7) if power)

PORTS = (
    "resid/pre",
    "attn/in",
    "attn/z",
    "attn/out",
    "resid/mid",
    "mlp/in",
    "mlp/hidden",
    "mlp/out",
    "mlp/added",
    "resid/post",
)

Rows = Float[Array, "tokens _d"]


@dataclass(frozen=True)
class Probe:
    """How a dictionary does on a subject: fraction of variance unexplained, active features a token, tokens."""

    fvu: float
    l0: float
    tokens: int


@dataclass(frozen=True)
class _Reading:
    """Another reading of a file: what it means, in words, and the dictionary and arrays that it gives.

    `told`: whether explaining a little more is worth a warning; another activation often does.
    """

    words: str
    dictionary: Dictionary
    x: Rows
    y: Rows
    k: Any = None
    turned: bool = False
    told: bool = True

    def measured(self) -> tuple[float, float]:
        """(fvu, l0)."""
        fvu, l0 = _quality(self.dictionary, self.x, self.y, self.k)
        return float(fvu), float(l0)

    def explains_more(self, fvu: float, l0: float, was: float, l0_was: float) -> bool:
        """Whether it explains far more than the file's own reading."""
        if self.k is not None and l0_was > DENSE * self.dictionary.features and l0 < DENSE * l0_was:
            far = NEARLY
        else:
            far = TURNED if self.turned else (FAR if l0 < l0_was or was > POOR else FARTHER)
        return fvu < min(was / far, WORST)


@ordinary()
def probe(dictionary: Dictionary | PerToken, subject: Any, tokens: grain.MapDataset, *, count: int = TOKENS) -> Probe:
    """FVU and L0 of a dictionary on about `count` tokens of the subject's activations."""
    reads, writes = _names(dictionary)
    rows = _harvest(subject.model, tokens, (reads, writes), count)
    fvu, l0 = _quality(dictionary, rows[reads], rows[writes], None)
    return Probe(float(fvu), float(l0), rows[reads].shape[0])


def check_reconstruction(
    dictionary: Dictionary,
    subject: Any,
    tokens: grain.MapDataset,
    where: str,
    *,
    force: bool = False,
    per_token: Kind | None = None,
) -> Dictionary:
    """The dictionary as it is; with its target's moments on these tokens, where it came without.

    Args:
      force: warn where it would be refused.
      per_token: by which scale of its own each token is divided before; all is measured in these units, and the
        target's moments are those of the activations as they are.
    Raises:
      UserError: it explains nothing here, or another reading of the file explains far more.
    """
    reads, writes = _names(dictionary)
    raw = _harvest(subject.model, tokens, (reads, writes), TOKENS)
    rows = _divided(raw, per_token)
    x, y = rows[reads], rows[writes]
    fvu = float(_quality(dictionary, x, y, None)[0])
    around = _around(subject.model, reads, writes)
    names = tuple(sorted({reads, writes, *(name for pair in around for name in pair)}))
    tried = _divided(_harvest(subject.model, tokens, names, TRIED), per_token)
    readings = list(_activations(dictionary, tried[reads], tried[writes]))
    readings += _orientations(dictionary, tried[reads], tried[writes])
    readings += _elsewhere(dictionary, tried, around)
    if not fvu <= GOOD:
        readings += _scales(dictionary, tried[reads], tried[writes])
    _compare(_Reading("", dictionary, tried[reads], tried[writes]), readings, where, force)
    if not np.isnan(float(dictionary.target_variance)):
        return dictionary
    y = raw[writes]
    mean = jnp.mean(y, axis=0)
    variance = jnp.mean(jnp.sum((y - mean) ** 2, axis=-1))
    return replace(dictionary, target_mean=mean, target_variance=variance)


def typical_scale(subject: Any, name: str, tokens: grain.MapDataset) -> float:
    """sqrt(d) / mean length of an array on about `TOKENS` tokens."""
    rows = _harvest(subject.model, tokens, (name,), TOKENS)[name]
    return float(jnp.sqrt(rows.shape[1]) / jnp.mean(jnp.linalg.norm(rows, axis=1)))


def _divided(rows: dict[str, Rows], kind: Kind | None) -> dict[str, Rows]:
    """The rows in units of each token's own scale."""
    return rows if kind is None else {name: scales_of(array, kind)[0] for name, array in rows.items()}


def _compare(own: _Reading, readings: list[_Reading], where: str, force: bool) -> None:
    """Raises UserError if another reading explains far more than the file's own, or that one explains nothing.

    Where another one explains a little more, or all is forced, it warns.
    """
    reads, writes = _names(own.dictionary)
    (fvu, l0), best, best_fvu, near, near_fvu = own.measured(), None, np.inf, None, np.inf
    for reading in readings:
        other, active = reading.measured()
        if other < best_fvu and reading.explains_more(other, active, fvu, l0):
            best, best_fvu = reading, other
        if reading.told and other < min(near_fvu, NOTABLE * fvu, fvu - LITTLE):
            near, near_fvu = reading, other
    measured = f"{where}: at {reads!r} -> {writes!r}, FVU={fvu:.2f} with {l0:.0f} features active"
    doubt = ""
    if best is not None:
        doubt = f"{measured}; {best_fvu:.2f} {best.words}"
    elif not fvu <= WORST:
        doubt = (
            f"{measured}: worse than the mean, and so is every other activation, orientation, scale and site around: "
            "it is of another model, or damaged"
        )
    if doubt and not force:
        raise UserError(f"{doubt}. Pass force=True to read it as the file says.")
    if doubt:
        warnings.warn(f"{doubt}. It is read as the file says.", stacklevel=4)
    elif near is not None:
        measured = f"{where}: at {reads!r} -> {writes!r}, FVU={fvu:.3f}"
        warnings.warn(f"{measured}; {near_fvu:.3f} {near.words}. It is read as the file says.", stacklevel=4)


def _activations(dictionary: Dictionary, x: Rows, y: Rows) -> Iterator[_Reading]:
    """The same arrays with another activation."""
    activation = dictionary.activation
    if isinstance(activation, ReLU):
        for power in range((dictionary.features // 2).bit_length()):
            k = 2**power
            yield _Reading(
                f"with the {k} largest codes: the activation looks like TopK, not ReLU",
                dictionary,
                x,
                y,
                jnp.asarray(k),
                told=False,
            )
    else:
        relu = replace(dictionary, activation=ReLU())
        words = f"with a ReLU: the activation looks like ReLU, not {type(activation).__name__}"
        yield _Reading(words, relu, x, y, told=False)
    if isinstance(activation, JumpReLU) and activation.parametrisation == "raw":
        log = JumpReLU(activation.threshold_parameter, "log", activation.bandwidth)
        yield _Reading(
            "with exp(threshold): threshold looks like its logarithm", replace(dictionary, activation=log), x, y
        )


def _orientations(dictionary: Dictionary, x: Rows, y: Rows) -> Iterator[_Reading]:
    """A weight transposed, where its shape allows it; the bias subtracted or not."""
    for name in ("encoder", "decoder", "skip"):
        matrix = getattr(dictionary, name)
        if matrix is not None and matrix.shape[0] == matrix.shape[1]:
            turned = replace(dictionary, **{name: matrix.T})
            yield _Reading(f"with the {name} transposed: it looks transposed", turned, x, y, turned=True)
    if dictionary.sites.reads == dictionary.sites.writes:
        bias, mean = dictionary.decoder_bias * dictionary.output_scale, dictionary.input_mean
        other = jnp.zeros_like(mean) if jnp.any(mean != 0) else bias
        words = "not subtracted" if jnp.any(mean != 0) else "subtracted"
        yield _Reading(
            f"with the decoder's bias {words} from the input: that looks wrong",
            replace(dictionary, input_mean=other),
            x,
            y,
        )


def _scales(dictionary: Dictionary, x: Rows, y: Rows) -> Iterator[_Reading]:
    """The same arrays for activations times a number: powers of two, and what makes their mean length sqrt(d)."""
    typical = [float(jnp.sqrt(rows.shape[1]) / jnp.mean(jnp.linalg.norm(rows, axis=1))) for rows in (x, y)]
    same = dictionary.sites.reads == dictionary.sites.writes
    pairs = [(scale, scale) for scale in SCALES] + [(typical[0], typical[1])]
    for scale_in, scale_out in pairs:
        words = (
            f"with activations times {scale_in:.3g}: a scale is missing, pass scaling_factor={scale_in:.3g}"
            if same
            else f"with inputs times {scale_in:.3g} and outputs times {scale_out:.3g}: scales are missing, take them "
            "into the file's weights"
        )
        scaled = replace(
            dictionary,
            input_mean=dictionary.input_mean / scale_in,
            input_scale=dictionary.input_scale / scale_in,
            output_scale=dictionary.output_scale / scale_out,
        )
        yield _Reading(words, scaled, x, y)


def _elsewhere(dictionary: Dictionary, rows: dict[str, Rows], around: list[tuple[str, str]]) -> Iterator[_Reading]:
    """The same dictionary at other sites of the same widths."""
    for reads, writes in around:
        x, y = rows[reads], rows[writes]
        if (x.shape[-1], y.shape[-1]) == (dictionary.encoder.shape[1], dictionary.decoder.shape[1]):
            place = repr(reads) if reads == writes else f"{reads!r} -> {writes!r}"
            yield _Reading(f"at {place}: the site looks wrong, pass site=", dictionary, x, y)


def _around(model: PyTree, reads: str, writes: str) -> list[tuple[str, str]]:
    """Pairs to try: the same ports in other layers, other ports in the same layer."""
    known = set(sites_of(model))
    pattern = re.compile(r"blocks/(\d+)/(.+)")
    here = [pattern.fullmatch(name) for name in (reads, writes)]
    pairs: list[tuple[str, str]] = []
    if here[0] is not None and here[1] is not None:
        layers = sorted({int(found[1]) for name in known if (found := pattern.fullmatch(name))})
        first, shift = int(here[0][1]), int(here[1][1]) - int(here[0][1])
        pairs += [(f"blocks/{n}/{here[0][2]}", f"blocks/{n + shift}/{here[1][2]}") for n in layers]
        ports = [f"blocks/{first}/{port}" for port in PORTS]
        if reads == writes:
            pairs += [(port, port) for port in ports]
        else:
            pairs += [(port, writes) for port in ports] + [(reads, port) for port in ports]
    return [pair for pair in dict.fromkeys(pairs) if pair != (reads, writes) and set(pair) <= known]


def _names(dictionary: Dictionary | PerToken) -> tuple[str, str]:
    return str(dictionary.sites.reads), str(dictionary.sites.writes)


def _harvest(model: PyTree, tokens: grain.MapDataset, names: tuple[str, ...], count: int) -> dict[str, Rows]:
    """At most `count` rows of tokens that have weight, by site name."""
    return {name: array[:count] for name, array in harvested(model, take(tokens, count), names).items()}


@eqx.filter_jit
def _quality(dictionary: Dictionary | PerToken, x: Rows, y: Rows, k: Any) -> tuple[Array, Array]:
    """(fvu, l0); with k, of the k largest codes of each token."""
    codes = dictionary.encode(x)
    if k is not None:
        values = codes.dense()
        smallest = jnp.take_along_axis(jnp.sort(values, axis=-1), values.shape[-1] - k[None, None], axis=-1)
        codes = DenseCodes(jnp.where(values >= smallest, values, 0.0))
    output = dictionary.decode(codes, x)
    spread = jnp.sum((y - jnp.mean(y, axis=0)) ** 2)
    return jnp.sum((y - output) ** 2) / spread, jnp.mean(codes.active())
