"""EleutherAI's sparsify: a folder named by its module (`layers.5.mlp`), `cfg.json` beside `sae.safetensors`.

    a = (x - b_dec [not where transcode]) encoder.weight^T + encoder.bias
    y = ReLU(the k largest a) W_dec + b_dec [+ x W_skip^T where skip_connection]

With `activation: groupmax` the largest a of each of k groups of neighbouring features.

encoder.weight and W_dec are (features, d), W_skip is (d_out, d_in); transcoders have as many outputs as inputs.
`multi_topk` and `normalize_decoder` matter in training only.

Source: sparsify 1.3.3 (sparsify/sparse_coder.py, config.py, fused_encoder.py); `signed` is of earlier versions.
"""

import json
from pathlib import Path

import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.group_max import GroupMax
from jaxinterp.interchange.arrays import AxesByName, read_checked
from jaxinterp.interchange.beside import read_beside, write_beside
from jaxinterp.interchange.contents import Contents, plain, subtracting
from jaxinterp.interchange.fields import check_known, flag, one_of, read_config, size
from jaxinterp.interchange.names import from_module, module_folder
from jaxinterp.models.files.safetensors_file import open_safetensors
from jaxinterp.storage.files import write_arrays, write_text

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
LAYOUT: AxesByName = {
    "encoder.weight": ("features", "d"),
    "encoder.bias": ("features",),
    "W_dec": ("features", "d"),
    "b_dec": ("d",),
}
SKIP: AxesByName = {"W_skip": ("d", "d")}
KNOWN = (
    *("activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "skip_connection"),
    *("transcode", "d_in", "signed"),
)


def read_sparsify(folder: Path) -> Contents:
    """What a sparsify folder says.

    Raises:
      UserError: it is damaged, its activation is neither TopK nor GroupMax with ReLU, or it
        has fields or arrays that are unknown.
    """
    where = folder / CONFIG
    fields = read_config(where)
    check_known(fields, KNOWN, where)
    grouped = one_of({"activation": "topk"} | fields, "activation", where, ("topk", "groupmax")) == "groupmax"
    one_of({"signed": False} | fields, "signed", where, (False,), why=": codes below 0 are not computed here")
    transcoder = flag(fields, "transcode", where, default=False)
    skip = flag(fields, "skip_connection", where, default=False)
    if skip and not transcoder:
        raise UserError(f"{where}: skip_connection=true without transcode: an autoencoder that may copy its input.")
    width = size(fields, "d_in", where)
    features = size(fields, "num_latents", where) if fields.get("num_latents") else None
    if features is None and "expansion_factor" in fields:
        features = width * size(fields, "expansion_factor", where)
    sizes = {"d": width} | ({} if features is None else {"features": features})
    arrays = read_checked(
        open_safetensors(folder / WEIGHTS), LAYOUT | SKIP if skip else LAYOUT, folder / WEIGHTS, sizes=sizes
    )
    module = module_folder(folder)
    hooks, target = read_beside(folder, from_module(module, transcoder=transcoder), width)
    no_site = f"the folder's name {module!r} is not a known module (layers.5, layers.5.mlp, h.3.attn, ...)"
    return Contents(
        encoder=arrays["encoder.weight"],
        encoder_bias=arrays["encoder.bias"],
        decoder=arrays["W_dec"],
        decoder_bias=arrays["b_dec"],
        activation=_activation(grouped, size({"k": 32} | fields, "k", where), len(arrays["encoder.bias"]), where),
        subtracts=not transcoder,
        transcoder=transcoder,
        skip=np.ascontiguousarray(arrays["W_skip"].T) if skip else None,
        hooks=hooks,
        no_site=no_site,
        target=target,
    )


def _activation(grouped: bool, k: int, features: int, where: Path) -> TopK | GroupMax:
    if grouped and features % k:
        raise UserError(f"{where}: k={k} groups do not divide num_latents={features}.")
    return GroupMax(k) if grouped else TopK(k)


def write_sparsify(dictionary: Dictionary, folder: Path) -> Path:
    """Write a sparsify folder, which is made if it is not there; name it by the module, as sparsify does.

    Raises:
      UserError: sparsify has no such dictionary, or the folder's name says another place.
    """
    contents = plain(dictionary)
    activation = contents.activation
    features, width = contents.encoder.shape
    if not isinstance(activation, TopK | GroupMax):
        raise UserError(
            f"activation={type(activation).__name__}: sparsify has TopK and GroupMax only; format='saelens' has others."
        )
    if contents.decoder.shape[1] != width:
        raise UserError(f"d_in={width} is not d_out={contents.decoder.shape[1]}: sparsify has one size for both.")
    if contents.skip is not None and not contents.transcoder:
        raise UserError(
            "an autoencoder with a skip path may copy its input: sparsify is given transcoders with one only."
        )
    named = from_module(module_folder(folder.resolve()), transcoder=bool(contents.transcoder))
    if named is not None and not named.may_be(dictionary.sites):
        raise UserError(
            f"{dictionary.sites} and {named.said} contradict each other: sparsify takes the place from the folder's "
            "name; give another folder."
        )
    if not contents.transcoder:
        contents = subtracting(contents)
    arrays = {
        "encoder.weight": contents.encoder,
        "encoder.bias": contents.encoder_bias,
        "W_dec": contents.decoder,
        "b_dec": contents.decoder_bias,
    }
    if contents.skip is not None:
        arrays["W_skip"] = contents.skip.T
    config = {
        "activation": "topk" if isinstance(activation, TopK) else "groupmax",
        "expansion_factor": max(1, features // width),
        "normalize_decoder": False,
        "num_latents": features,
        "k": activation.k,
        "multi_topk": False,
        "skip_connection": contents.skip is not None,
        "transcode": bool(contents.transcoder),
        "d_in": width,
    }
    write_arrays(folder / WEIGHTS, arrays)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_beside(folder, contents, dictionary.sites)
    return folder
