"""A model as a Hugging Face directory: config.json, model.safetensors, tokenizer.json.

For models of the Llama layout: Llama (SmolLM2 among them), Mistral, Qwen 2 and 3, whatever they were loaded from or
trained as. Which one it is follows from the configuration: the first family whose reader here makes the same
configuration of the fields that are written. A configuration that none describes is refused by field, so that a file
never says less than the model does.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.core.trees import named_leaves
from jaxinterp.models.families.configs import family_config
from jaxinterp.models.families.fields import ACTIVATION_NAMES
from jaxinterp.models.families.tables import FAMILIES, Family
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.weights import leaf_shapes, look_up
from jaxinterp.models.transformer import Transformer, TransformerConfig
from jaxinterp.storage.files import check_empty, write_file, write_text
from jaxinterp.storage.json_text import json_text

WRITABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type`, in the order in which they are tried."""


def save_huggingface(subject: Subject, directory: str | Path) -> None:
    """Write the subject so that `load(directory)` and transformers read it.

    Weights keep their dtype. Zeros of a pruned model are stored as zeros.

    Raises:
      UserError: the directory has files in it, a leaf was replaced or has other sizes than the configuration says
        (layers with different numbers of neurons), or no writable family has this configuration.
    """
    directory = check_empty(directory, overwrite=False)
    model = subject.model
    if not isinstance(model, Transformer):
        raise UserError(f"a {type(model).__name__} cannot be written as a Hugging Face directory, only a Transformer.")
    leaves, shapes = named_leaves(model), leaf_shapes(model.config)
    for name in sorted({*leaves, *shapes}):
        if name not in shapes or name not in leaves or leaves[name].shape != shapes[name]:
            has, wants = (each[name].shape if name in each else None for each in (leaves, _as_arrays(shapes)))
            raise UserError(
                f"leaf {name!r} has shape {has}, the configuration says {wants}: keep equally many neurons and heads "
                "in every layer, or mask them instead; a replaced leaf is saved on its own."
            )
    family, fields = huggingface_config(model.config)
    tensors = {}
    for name, leaf in leaves.items():
        theirs, layout = look_up(family.tensors, name)
        array = np.asarray(jax.device_get(leaf))
        tensors[theirs] = np.ascontiguousarray(array.T if layout.transposed else array)
    dtypes = sorted({str(array.dtype) for array in tensors.values()})
    if len(dtypes) > 1:
        raise UserError(f"weights have dtypes {', '.join(dtypes)}: load the model in one.")
    fields |= {"torch_dtype": dtypes[0]}
    tokenizer = subject.tokenizer
    if tokenizer is not None:
        fields |= {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end}
        write_text(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
        names = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end}
        described: dict[str, Json] = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
            key: tokenizer.backend.id_to_token(id) for key, id in names.items() if id is not None
        }
        if tokenizer.chat_template is not None:
            described["chat_template"] = tokenizer.chat_template
        write_text(directory / "tokenizer_config.json", json_text(described, indent=2) + "\n")
    write_file(directory / "model.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_text(directory / "config.json", json_text(fields, indent=2) + "\n")


def huggingface_config(config: TransformerConfig) -> tuple[Family, dict[str, Json]]:
    """The family and the fields of a config.json that mean this configuration.

    Raises:
      UserError: none does; the message names the fields in which the nearest family differs.
    """
    closest: tuple[str, dict[str, Json]] | None = None
    for name in WRITABLE:
        fields = _fields(config, name)
        try:
            read = family_config(FAMILIES[name], fields)
        except UserError:
            continue
        wrong = {
            field.name: (getattr(config, field.name), getattr(read, field.name))
            for field in dataclasses.fields(TransformerConfig)
            if getattr(config, field.name) != getattr(read, field.name)
        }
        if not wrong:
            return FAMILIES[name], fields
        if closest is None or len(wrong) < len(closest[1]):
            closest = name, wrong
    if closest is None:
        raise UserError("no writable family can express this configuration: save it with save_subject.")
    what = ", ".join(f"{field}={ours!r} (it has {theirs!r})" for field, (ours, theirs) in closest[1].items())
    raise UserError(f"no writable family has this configuration; {closest[0]} differs in {what}: use save_subject.")


def _fields(config: TransformerConfig, name: str) -> dict[str, Json]:
    activation = next((theirs for theirs, ours in ACTIVATION_NAMES.items() if ours == config.activation), None)
    windows = set(config.windows) - {None}  # a file has one size
    fields: dict[str, Json] = {
        "architectures": [FAMILIES[name].architectures[0]],
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "rope_theta": config.rotary_base,
        "rope_scaling": _rope_scaling(config),
    }
    if name == "llama":
        fields |= {"attention_bias": config.attention_out_bias, "mlp_bias": config.mlp_bias}
    if name == "qwen3":
        fields |= {"attention_bias": config.attention_out_bias}
    if name == "mistral":
        fields |= {"sliding_window": next(iter(windows)) if len(windows) == 1 else None}
    if name in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": bool(windows)}
        if len(windows) == 1:
            types = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
            fields |= {"sliding_window": next(iter(windows)), "layer_types": [*types]}
    return fields


def _rope_scaling(config: TransformerConfig) -> dict[str, Json] | None:
    scaling = config.rotary_scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.kind != "llama3":
        raise UserError(f"rotary_scaling of kind {scaling.kind!r} is not written: save the model with save_subject.")
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _as_arrays(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
