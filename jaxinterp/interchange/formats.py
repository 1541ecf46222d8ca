"""Read and write dictionaries of other libraries: `read(path)`, `write(dictionary, folder, format="saelens")`.

    format               a folder with                       read   written
    saelens              cfg.json, sae_weights.safetensors   yes    yes
    sparsify             cfg.json, sae.safetensors           yes    yes
    gemma_scope          params.npz                          yes    no
    dictionary_learning  ae.pt, config.json                  yes    no

Files are data: no code of theirs runs, nothing is allocated for a size that the file has not. What cannot be
represented exactly is refused with the name of the field. See docs/interchange.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import harvest
from jaxinterp.decompositions.activations import BatchTopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.interchange import beside, dictionary_learning, gemma_scope, saelens, sparsify
from jaxinterp.interchange.centring import settle_centring
from jaxinterp.interchange.contents import Contents, behind_gain, build
from jaxinterp.interchange.probe import check_reconstruction
from jaxinterp.interchange.saelens_fields import BANDWIDTH
from jaxinterp.models.load import Subject
from jaxinterp.models.sites import LEAVES, check_site

Format = Literal["saelens", "sparsify", "gemma_scope", "dictionary_learning"]


@dataclass(frozen=True)
class Reader:
    """The file by which a format is known, whether the reader takes it or its folder, and the reader."""

    file: str
    takes_folder: bool
    read: Callable[[Path], Contents]


READERS: dict[str, Reader] = {
    "saelens": Reader(saelens.WEIGHTS, True, saelens.read_saelens),
    "sparsify": Reader(sparsify.WEIGHTS, True, sparsify.read_sparsify),
    "gemma_scope": Reader(gemma_scope.NAME, False, gemma_scope.read_gemma_scope),
    "dictionary_learning": Reader(dictionary_learning.NAME, False, dictionary_learning.read_dictionary_learning),
}


@dataclass(frozen=True)
class Writer:
    """The files of a format, and what writes them."""

    files: tuple[str, ...]
    write: Callable[[Dictionary, Path], Path]


WRITERS: dict[str, Writer] = {
    "saelens": Writer((saelens.WEIGHTS, saelens.CONFIG, beside.NAME), saelens.write_saelens),
    "sparsify": Writer((sparsify.WEIGHTS, sparsify.CONFIG, beside.NAME), sparsify.write_sparsify),
}


@ordinary()
def read(
    path: str | Path,
    *,
    format: Format | None = None,
    site: str | Sites | None = None,
    subject: Subject | None = None,
    tokens: grain.MapDataset | None = None,
    scaling_factor: float | None = None,
    centred: bool | None = None,
    force: bool = False,
) -> Dictionary:
    """A dictionary of another library.

    Args:
      path: its folder, or the file in it that holds the arrays.
      format: by default what the names of the files say.
      site: where it belongs, if the file does not say or you know better: an array (`blocks/5/mlp/out`) for an
        autoencoder, a leaf (`blocks/5/mlp`) or `Sites(reads, writes)` for a transcoder.
      subject: the model that it was trained on: its sites are checked, and norms are taken into account.
      tokens: windows of text as `load_text` gives them: the dictionary is tried on the subject's activations and
        refused where it explains nothing or far less than another reading of the same file; where another one explains
        a little more, a warning says so. Nothing that the file says is changed.
      scaling_factor: by what activations were multiplied in training, where that was not taken into the weights.
      centred: whether it was trained on streams whose mean TransformerLens had taken off; True folds that into the
        weights (`centring.py`); None: as the file says.
      force: read a file that `tokens` speak against as it is; the reason becomes a warning.
    Returns:
      The dictionary; `target_mean` and `target_variance` are the file's own, where it has none those of `tokens` (give
        training text), and NaN without either.
    Raises:
      UserError: the file is damaged or hostile, says something that cannot be represented, or belongs elsewhere.
    """
    if tokens is not None and subject is None:
        raise UserError("tokens are given without subject: pass the model whose activations shall be tried.")
    where, name = _locate(Path(path), format)
    contents = _scaled(READERS[name].read(where), scaling_factor, where)
    sites = _settle(contents, site, subject, where)
    contents = settle_centring(contents, centred, sites, subject, str(where))
    if contents.before_gain and str(sites.reads).endswith("/in"):
        contents = _behind_norm(contents, sites, subject)
    dictionary = build(contents, sites)
    if subject is not None:
        _check_widths(dictionary, subject, where)
    if tokens is None or subject is None:
        return dictionary
    return check_reconstruction(dictionary, subject, tokens, str(where), force=force)


@ordinary()
def write(dictionary: Any, folder: str | Path, *, format: Format) -> Path:
    """Write a `Dictionary` for another library; means and scales are folded into the weights.

    Read back, it is the same to the last bit where there was nothing to fold.

    Raises:
      UserError: the format is unknown or read only, one of its files is there already, or it has no such dictionary.
    """
    if format not in WRITERS:
        raise UserError(f"format={format!r} cannot be written; those that can: {', '.join(WRITERS)}.")
    if not isinstance(dictionary, Dictionary):
        raise UserError(f"a {type(dictionary).__name__} has no place in format={format!r}, a Dictionary has.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is there already and no folder; give another.")
    for file in (folder / name for name in WRITERS[format].files):
        if file.exists() or file.is_symlink():
            raise UserError(f"{file} is there already: nothing is overwritten; give another folder.")
    return WRITERS[format].write(dictionary, folder)


@ordinary()
def as_jumprelu(dictionary: Dictionary) -> Dictionary:
    """A BatchTopK dictionary as the JumpReLU that it is outside training, without the limit to four times k a token.

    Raises:
      UserError: its activation is another.
    """
    activation = dictionary.activation
    if not isinstance(activation, BatchTopK):
        raise UserError(
            f"activation={type(activation).__name__} is not a BatchTopK: there is nothing to turn into JumpReLU."
        )
    threshold = jnp.full(dictionary.features, jnp.maximum(activation.threshold, 0.0), jnp.float32)
    return replace(dictionary, activation=JumpReLU(threshold, "raw", BANDWIDTH))


def _locate(path: Path, format: str | None) -> tuple[Path, str]:
    """What the reader of the format takes, and the format."""
    if format is not None and format not in READERS:
        raise UserError(f"format={format!r} is unknown; known: {', '.join(READERS)}.{suggest(format, READERS)}")
    if not path.exists():
        raise UserError(f"nothing is at {path}.")
    if path.is_file():
        named = [name for name, reader in READERS.items() if path.name == reader.file]
        suffix = {".npz": "gemma_scope", ".pt": "dictionary_learning"}.get(path.suffix)
        chosen = format or (named[0] if named else suffix)
        if chosen is None:
            raise UserError(f"{path} has an unknown format; pass its folder, or format=.")
        reader = READERS[chosen]
        if reader.takes_folder and path.name != reader.file:
            raise UserError(f"{path}: format={chosen!r} has its arrays in {reader.file!r}.")
        return (path.parent if reader.takes_folder else path), chosen
    found = [name for name, reader in READERS.items() if (path / reader.file).is_file()]
    if format is None and len(found) > 1:
        raise UserError(f"{path} has files of {' and '.join(found)}: pass format=.")
    if not found or (format is not None and format not in found):
        files = [READERS[format].file] if format else [reader.file for reader in READERS.values()]
        raise UserError(f"no {' or '.join(files)} in {path}.")
    chosen = format or found[0]
    return (path if READERS[chosen].takes_folder else path / READERS[chosen].file), chosen


def _scaled(contents: Contents, factor: float | None, where: Path) -> Contents:
    """The dictionary with the caller's factor, which must be the file's own where that has one."""
    if factor is not None and contents.factor not in (None, 1.0, factor):
        raise UserError(f"{where}: scaling_factor={factor}, but the file says {contents.factor}: leave one out.")
    if factor is None:
        if contents.factor is None:
            raise UserError(
                f"{where}: normalize_activations='expected_average_only_in' and the scale is missing: activations were "
                "multiplied by a number in training that was not taken into the weights; pass scaling_factor= "
                "(SAELens estimates sqrt(d) / mean length of an activation)."
            )
        return contents
    if not 0 < factor < np.inf:
        raise UserError(f"scaling_factor={factor} must be a positive number.")
    if contents.transcoder:
        raise UserError(f"scaling_factor={factor}: a transcoder has two scales, which no file here leaves out.")
    return replace(contents, factor=float(factor))


def _settle(contents: Contents, site: str | Sites | None, subject: Subject | None, where: Path) -> Sites:
    """Where the dictionary belongs: what the caller says, else what the file says."""
    if site is None:
        if contents.hooks is None:
            raise UserError(f"{contents.no_site or where}: pass site= to say where it belongs.")
        config = getattr(getattr(subject, "model", None), "config", None)
        return contents.hooks.sites(getattr(config, "post_norms", contents.post_norms))
    if isinstance(site, Sites):
        sites = site
    elif site.endswith(LEAVES) and contents.transcoder is None:
        raise UserError(f"site={site!r}: the file does not say whether it is a transcoder; pass Sites(reads, writes).")
    elif site.endswith(LEAVES):
        sites = Sites(f"{site}/in" if contents.transcoder else f"{site}/out", f"{site}/out")
    elif contents.transcoder:
        raise UserError(f"site={site!r} is one array: for a transcoder pass a leaf, or Sites(reads, writes).")
    else:
        sites = Sites(site, site)
    if contents.transcoder is not None and contents.transcoder == (sites.reads == sites.writes):
        kind = "a transcoder" if contents.transcoder else "an autoencoder"
        raise UserError(f"site={site!r} does not fit the file, which holds {kind}.")
    return sites


def _behind_norm(contents: Contents, sites: Sites, subject: Subject | None) -> Contents:
    """The dictionary behind the gain and bias of the norm that its input was taken before."""
    said = contents.hooks.said if contents.hooks else f"site={sites.reads!r}"
    if subject is None:
        raise UserError(
            f"{said}: it reads the normalised array before the norm's gain and bias, and our {sites.reads!r} is behind "
            "them: pass subject=, whose gain is taken into the weights."
        )
    check_site(subject.model, str(sites.reads))
    _, layer, sublayer, _ = str(sites.reads).split("/")
    blocks = getattr(subject.model, "blocks", None)
    block = None if blocks is None else blocks[int(layer)]
    if not hasattr(block, f"{sublayer}_norm"):
        raise UserError(
            f"{said}: a {type(subject.model).__name__} does not show its norms; load the subject with load()."
        )
    norm = getattr(block, f"{sublayer}_norm")
    if norm is None:
        raise UserError(
            f"{said}: this model has no norm before the sublayer blocks/{layer}/{sublayer} (its norms are behind it), "
            "so there is no such array in it: the dictionary is of another model."
        )
    gain = np.asarray(norm.weight, np.float32) + np.float32(norm.offset)
    bias = np.zeros_like(gain) if norm.bias is None else np.asarray(norm.bias, np.float32)
    if gain.shape[0] != contents.encoder.shape[1]:
        raise UserError(f"d_in={contents.encoder.shape[1]}, but {sites.reads!r} of this model has {gain.shape[0]}.")
    return behind_gain(replace(contents, transcoder=sites.reads != sites.writes), gain, bias)


def _check_widths(dictionary: Dictionary, subject: Subject, where: Path) -> None:
    """Raises UserError if a site is not in the model, or has another width than the dictionary."""
    sites = dictionary.sites
    for name in sites.names():
        check_site(subject.model, name)
    window = {"tokens": jnp.zeros((1, 2), jnp.int32), "weight": jnp.ones((1, 2), jnp.float32)}
    rows = jax.eval_shape(lambda window: harvest(subject.model, window, sites.names()), window)
    for kind, name, array in (
        ("d_in", str(sites.reads), dictionary.encoder),
        ("d_out", str(sites.writes), dictionary.decoder),
    ):
        width = rows.arrays[name].shape[-1]
        if array.shape[1] != width:
            raise UserError(
                f"{where}: {kind}={array.shape[1]}, but {name!r} of this model has {width}: wrong site or model."
            )
