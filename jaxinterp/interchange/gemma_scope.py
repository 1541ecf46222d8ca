"""Gemma Scope: `params.npz` with W_enc (d_in, features), W_dec (features, d_out), b_enc, b_dec, threshold.

    a = x W_enc + b_enc,   y = (a 1[a > threshold]) W_dec + b_dec

The file says nothing else. Where it was trained stands in the names of its folders, as they are published:
`gemma-scope-2b-pt-mlp/layer_20/width_16k/average_l0_71/params.npz`. MLP outputs are what the MLP adds to the residual
stream, behind the post-norm; transcoders read the normalised residual stream before the norm's gain (their training
folded it into the MLP). Those of the embedding are in other units than the published model's and are refused.

Sources: Lieberum et al. 2024, arXiv 2408.05147; the model cards; names of arrays as SAELens 6.54 accepts them.
"""

import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.gates import JumpReLU
from jaxinterp.interchange.arrays import AxesByName, read_checked
from jaxinterp.interchange.contents import Contents
from jaxinterp.interchange.names import Hooks
from jaxinterp.interchange.npz_file import open_npz
from jaxinterp.interchange.saelens_fields import BANDWIDTH

NAME = "params.npz"
LAYOUT: AxesByName = {
    "W_enc": ("d_in", "features"),
    "W_dec": ("features", "d_out"),
    "b_enc": ("features",),
    "b_dec": ("d_out",),
    "threshold": ("features",),
}
OTHER_NAMES = {"w_enc": "W_enc", "w_dec": "W_dec"}
KINDS = {
    "res": ("resid/post", "resid/post"),
    "mlp": ("mlp/added", "mlp/added"),
    "att": ("attn/z", "attn/z"),
    "transcoders": ("mlp/in", "mlp/added"),
}
"""What is read and written, by the last part of the repository's name."""

EMBEDDING = re.compile(
    r"/embedding/width_\w+(/average_l0_\w+)?$|gemma-scope-[^/]*(/snapshots/\w+)?/embedding(/(?!.*gemma-scope-)|$)"
)
"""Of the embedding: by the folders as they are published, wherever they lie; not by what they lie in."""


def read_gemma_scope(path: Path) -> Contents:
    """What a `params.npz` and the names of the folders above it say.

    Raises:
      UserError: it is damaged, has other arrays, a scale that the equation has no place for, or is of the embedding.
    """
    spelled = Path(os.path.abspath(path))  # the file itself may be a link into a hub's cache, without these names
    if any(EMBEDDING.search(folder.as_posix()) for folder in (spelled.parent, path.parent.resolve())):
        raise UserError(f"{path}: dictionaries of the embedding are in other units than the model's: not supported.")
    stored = {OTHER_NAMES.get(name, name): tensor for name, tensor in open_npz(path).items()}
    layout = LAYOUT | ({"scaling_factor": ("features",)} if "scaling_factor" in stored else {})
    arrays = read_checked(stored, layout, path, sizes={})
    if not np.all(arrays.get("scaling_factor", 1) == 1):
        raise UserError(f"{path}: tensor 'scaling_factor' is not 1, and no published reader says what it scales.")
    names = "/".join(spelled.parts[-8:])
    kind, layer = (
        re.search(r"gemma-scope-[\w.-]*?-(res|mlp|att|transcoders)\b", names),
        re.search(r"layer_(\d+)/", names),
    )
    hooks = None
    if kind and layer:
        reads, writes = (f"blocks/{int(layer[1])}/{port}" for port in KINDS[kind[1]])
        hooks = Hooks(reads, writes, f"the folders' names {kind[0]!r}, {layer[0]!r}")
    return Contents(
        encoder=np.ascontiguousarray(arrays["W_enc"].T),
        encoder_bias=arrays["b_enc"],
        decoder=arrays["W_dec"],
        decoder_bias=arrays["b_dec"],
        activation=JumpReLU(jnp.asarray(arrays["threshold"]), "raw", BANDWIDTH),
        subtracts=False,
        transcoder=None if hooks is None else hooks.reads != hooks.writes,
        hooks=hooks,
        no_site="the folders' names say neither gemma-scope-...-{res,mlp,att,transcoders} nor layer_N",
        post_norms=True,
        before_gain=True,
    )
