"""The shapes of a subject model, without its weights: enough to compile a program for it."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.core.trees import fill_leaves, named_leaves
from jaxinterp.models.families.configs import family_config, family_of
from jaxinterp.models.files.gguf_file import gguf_config, open_gguf
from jaxinterp.models.files.quantised import without_quantisation
from jaxinterp.models.files.subject import OWN_FORM, read_own_config
from jaxinterp.models.files.tokenizer import read_json
from jaxinterp.models.files.weights import Shardings, shardings_of, skeleton
from jaxinterp.models.files.wheels import installed_path
from jaxinterp.models.load import KNOWN, TINY
from jaxinterp.models.tiny import tiny_subject
from jaxinterp.models.transformer import Transformer, TransformerConfig

PUBLISHED: dict[str, dict[str, Json]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    },
}
"""The config.json of models for their shapes alone: no weight, and no wheel that carries some, needs to be here."""


def model_shapes(source: str | Path, *, dtype: DTypeLike = jnp.bfloat16, sharding: Shardings = None) -> Transformer:
    """The model of `jax.ShapeDtypeStruct`s that `load` would fill; no weight is read.

    Args:
      source: what `load` takes; of a directory only its config is read; or a name of PUBLISHED.
      dtype: of all weights.
      sharding: as in `load`.
    Raises:
      UserError: there is no such source, or its configuration is not supported.
    """
    whole = tiny_subject().model if source == TINY else skeleton(_config(source))
    placed = shardings_of(whole, sharding)
    leaves = {
        name: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed[name])
        for name, leaf in named_leaves(whole).items()
    }
    return fill_leaves(whole, leaves)


def _config(source: str | Path) -> TransformerConfig:
    if str(source) in PUBLISHED:
        fields = PUBLISHED[str(source)]
        return family_config(family_of(fields), fields)
    path = installed_path(str(source)) or Path(source)
    if path.suffix == ".gguf" and path.is_file():
        reader, tensors = open_gguf(path)
        return gguf_config(reader, tensors, path)
    if (path / OWN_FORM).is_file():
        return read_own_config(path)
    if (path / "config.json").is_file():
        fields, _ = without_quantisation(read_json(path / "config.json"))
        return family_config(family_of(fields), fields)
    names = list(dict.fromkeys([*KNOWN, *PUBLISHED]))
    raise UserError(
        f"no shapes of model {str(source)!r}: neither a folder with a config.json, nor a .gguf file, nor one of "
        f"{', '.join(names)}.{suggest(str(source), names)}"
    )
