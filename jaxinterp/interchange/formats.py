"""Read and write dictionaries of other libraries: `read(path)`, `write(dictionary, folder, format="saelens")`.

    format               a folder with                                     read   written
    saelens              cfg.json, sae_weights.safetensors                 yes    yes
    sparsify             cfg.json, sae.safetensors                         yes    yes
    circuit_tracer       config.yaml, layer_<n>.safetensors                yes    yes
    circuit_tracer_clt   config.yaml, W_enc_<n>, W_dec_<n>.safetensors     yes    yes (as circuit_tracer)
    gemma_scope          params.npz                                        yes    no
    gemma_scope_2        params.safetensors, config.json                   yes    no
    gemma_scope_2_clt    params_layer_<n>.safetensors                      yes    no
    llama_scope          hyperparams.json, checkpoints/final.safetensors   yes    no
    dictionary_learning  ae.pt, config.json                                yes    no
    qwen_scope, hook_z, goodfire, openai: one .pt file                     yes    no

`read("org/name", path)` fetches from the hub (`hub.py`); a release of the directory is read by its name (`directory`).

Files are data: no code of theirs runs, nothing is allocated for a size that the file has not. What cannot be
represented exactly is refused with the name of the field. See docs/interchange.md.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.core.promotion import ordinary
from jaxinterp.data.activations import harvest
from jaxinterp.decompositions.activations import BatchTopK
from jaxinterp.decompositions.cross_layer import CrossLayer, PerLayer
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.decompositions.per_token import PerToken
from jaxinterp.interchange import beside, circuit_tracer, saelens, sparsify
from jaxinterp.interchange.centring import settle_centring
from jaxinterp.interchange.contents import Contents, behind_gain, build, finished, of_head
from jaxinterp.interchange.hub import fetch_dictionary
from jaxinterp.interchange.probe import check_reconstruction, typical_scale
from jaxinterp.interchange.readers import READERS, WHOLE, Format, locate
from jaxinterp.interchange.releases import Place, lookup, place
from jaxinterp.interchange.saelens_fields import BANDWIDTH
from jaxinterp.models.files.hub import Hub
from jaxinterp.models.sites import LEAVES, check_site

Read = Dictionary | PerToken | PerLayer | CrossLayer


@dataclass(frozen=True)
class Writer:
    """The files of a format, and what writes them."""

    files: tuple[str, ...]
    write: Callable[[Any, Path], Path]
    takes: tuple[type, ...] = (Dictionary,)


WRITERS: dict[str, Writer] = {
    "saelens": Writer((saelens.WEIGHTS, saelens.CONFIG, beside.NAME), saelens.write_saelens),
    "sparsify": Writer((sparsify.WEIGHTS, sparsify.CONFIG, beside.NAME), sparsify.write_sparsify),
    "circuit_tracer": Writer(
        (circuit_tracer.CONFIG,), circuit_tracer.write_circuit_tracer, (Dictionary, PerLayer, CrossLayer)
    ),
}


@ordinary()
def read(
    path: str | Path,
    file: str | None = None,
    *,
    format: Format | None = None,
    site: str | Sites | None = None,
    subject: Any = None,
    tokens: grain.MapDataset | None = None,
    scaling_factor: float | None = None,
    centred: bool | None = None,
    force: bool = False,
    revision: str | None = None,
    token: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
) -> Read:
    """A dictionary of another library.

    Args:
      path: its folder, or the file in it that holds the arrays; or a name of `directory()`; or "org/name",
        a repository of the hub. Of circuit-tracer and of Gemma Scope 2's cross-layer transcoders, a folder is all
        layers (`PerLayer`, `CrossLayer`).
      file: the file or folder in that repository.
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
      revision, token, cache, offline: of the hub, as in `load`.
    Returns:
      The dictionary; `target_mean` and `target_variance` are the file's own, where it has none those of `tokens` (give
        training text), and NaN without either.
    Raises:
      UserError: the file is damaged or hostile, says something that cannot be represented, or belongs elsewhere.
    """
    if tokens is not None and subject is None:
        raise UserError("tokens are given without subject: pass the model whose activations shall be tried.")
    if file is None and isinstance(path, str) and not Path(path).exists() and (named := lookup(path)) is not None:
        known = place(*named)
        hub = Hub(revision, token, cache, offline)
        fetched = fetch_dictionary(known.repository, known.path, hub)
        return read_place(known, fetched, site, subject, tokens, scaling_factor, centred, force=force)
    if file is not None:
        path = fetch_dictionary(str(path), file, Hub(revision, token, cache, offline))
    where, name = locate(Path(path), format)
    if where.is_dir() and not READERS[name].takes_folder:
        _check_whole(where, site=site, tokens=tokens, scaling_factor=scaling_factor, centred=centred)
        return _whole(WHOLE[name](where), subject, where)
    contents = READERS[name].read(where)
    return _finish(contents, where, site, subject, tokens, scaling_factor, centred, force)


def read_place(
    known: Place,
    where: Path,
    site: str | Sites | None = None,
    subject: Any = None,
    tokens: grain.MapDataset | None = None,
    scaling_factor: float | None = None,
    centred: bool | None = None,
    *,
    force: bool = False,
) -> Read:
    """What the directory says where the files of an entry do not; `where`: its file or folder, other options as `read`.

    Raises:
      UserError: as `read`.
    """
    found, name = locate(where, known.format)
    if known.overrides:
        contents = saelens.read_saelens(found, known.overrides)
    else:
        contents = READERS[name].read(found)
    if contents.factor is None and scaling_factor is None:
        scaling_factor = known.scaling_factor
    if contents.hooks is None and site is None:
        site = known.site
    if centred is None and (known.centred is not None or contents.centred is None):
        centred = bool(known.centred)  # SAELens's directory says it where it is so
    return _finish(contents, found, site, subject, tokens, scaling_factor, centred, force)


def _finish(
    contents: Contents,
    where: Path,
    site: str | Sites | None,
    subject: Any,
    tokens: grain.MapDataset | None,
    scaling_factor: float | None,
    centred: bool | None,
    force: bool,
) -> Read:
    """The dictionary at its site, in the model's own units, and tried."""
    if contents.factor is None and scaling_factor is None and tokens is not None:
        scaling_factor = _measured(contents, site, subject, tokens, where)
    contents = _scaled(contents, scaling_factor, where)
    sites = _settle(contents, site, subject, where)
    if contents.head is not None:
        contents = of_head(contents, _width(subject, str(sites.reads), contents.head))
    if contents.per_token != "layer_norm":  # which takes the mean off anyway, and puts it back
        contents = settle_centring(contents, centred, sites, subject, str(where))
    if contents.before_gain and str(sites.reads).endswith("/in"):
        contents = _behind_norm(contents, sites, subject)
    dictionary = build(contents, sites)
    if subject is not None:
        _check_widths(dictionary, subject, where)
    if tokens is None:
        return finished(dictionary, contents)
    tried = check_reconstruction(dictionary, subject, tokens, str(where), force=force, per_token=contents.per_token)
    return finished(tried, contents)


def _check_whole(where: Path, **given: Any) -> None:
    """Raises UserError where an option is given that a folder of all layers has no place for."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{where} holds all layers of a model: leave {name}= out, or read one of its files.")


def _whole(found: Any, subject: Any, where: Path) -> PerLayer | CrossLayer:
    """All layers of a folder; transcoders of one layer each become a `PerLayer`."""
    if isinstance(found, CrossLayer):
        return found
    sites = [_settle(contents, None, subject, where) for contents in found]
    found = [
        _behind_norm(contents, site, subject) if contents.before_gain and str(site.reads).endswith("/in") else contents
        for contents, site in zip(found, sites, strict=True)
    ]
    layers = circuit_tracer.layers_of(found, sites)
    for part in layers.parts if subject is not None else ():
        _check_widths(part, subject, where)
    return layers


def _measured(contents: Contents, site: Any, subject: Any, tokens: grain.MapDataset, where: Path) -> float:
    """sqrt(d) / mean length of the activations of `tokens`, as SAELens estimates it; a warning says the number."""
    sites = _settle(contents, site, subject, where)
    factor = typical_scale(subject, str(sites.reads), tokens)
    warnings.warn(
        f"{where}: the scale of its activations is missing; sqrt(d) / mean length on the given tokens is {factor:.4g}, "
        "which is used: pass scaling_factor= where you know it.",
        stacklevel=4,
    )
    return factor


def _width(subject: Any, name: str, head: int) -> int:
    """The width of an array of the subject, heads beside each other.

    Raises:
      UserError: there is no subject.
    """
    if subject is None:
        raise UserError(f"hook_head_index={head}: pass subject=, which says how many heads lie beside this one.")
    check_site(subject.model, name)
    window = {"tokens": jnp.zeros((1, 2), jnp.int32), "weight": jnp.ones((1, 2), jnp.float32)}
    rows = jax.eval_shape(lambda window: harvest(subject.model, window, (name,)), window)
    return int(rows.arrays[name].shape[-1])


@ordinary()
def write(dictionary: Any, folder: str | Path, *, format: Format) -> Path:
    """Write a `Dictionary` for another library; means and scales are folded into the weights.

    Read back, it is the same to the last bit where there was nothing to fold.

    Raises:
      UserError: the format is unknown or read only, one of its files is there already, or it has no such dictionary.
    """
    if format not in WRITERS:
        raise UserError(f"format={format!r} cannot be written; those that can: {', '.join(WRITERS)}.")
    if not isinstance(dictionary, WRITERS[format].takes):
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


def _settle(contents: Contents, site: str | Sites | None, subject: Any, where: Path) -> Sites:
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


def _behind_norm(contents: Contents, sites: Sites, subject: Any) -> Contents:
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


def _check_widths(dictionary: Dictionary, subject: Any, where: Path) -> None:
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
