"""Models that read images as well: their text model is one of the families, and only it is read.

`config.json` keeps the text model's fields in `text_config`. What is left out is named in `Subject.source`: the fields
and the tensors of the parts that see.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.models.files.weights import StoredTensor


@dataclass(frozen=True)
class Wrapper:
    """One kind of model around a text model.

    Attributes:
      text: the `model_type` of the text model.
      architectures: values of `architectures` that have this forward pass.
      prefixes: how the names of the text model's tensors begin -> how its family calls them.
      left_out: a regular expression for the tensors of other parts.
      fields: those of other parts and of special tokens; `text_config` and what every config.json may have besides.
      tied: what `tie_word_embeddings` means where the file does not have it.
      unused: fields of the text model that transformers does not apply inside this wrapper.
    """

    text: str
    architectures: tuple[str, ...]
    prefixes: Mapping[str, str]
    left_out: str
    fields: tuple[str, ...]
    tied: bool
    unused: tuple[str, ...] = ()


WRAPPERS: dict[str, Wrapper] = {
    "gemma3": Wrapper(
        text="gemma3_text",
        architectures=("Gemma3ForConditionalGeneration", "Gemma3Model"),
        prefixes={
            "model.language_model.": "model.",
            "language_model.model.": "model.",
            "language_model.lm_head.": "lm_head.",
        },
        left_out=r"(model\.)?(vision_tower|multi_modal_projector)\..*",
        fields=(
            *("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"),
            *("boi_token_id", "eoi_token_id", "image_token_id"),
        ),
        tied=True,
        unused=("final_logit_softcapping",),
    ),
    "gemma4": Wrapper(
        text="gemma4_text",
        architectures=("Gemma4ForConditionalGeneration", "Gemma4Model"),
        prefixes={"model.language_model.": "model."},
        left_out=r"model\.(vision_tower|audio_tower|embed_vision|embed_audio)\..*",
        fields=(
            *("vision_config", "audio_config", "boi_token_id", "eoi_token_id", "image_token_id", "video_token_id"),
            *("boa_token_id", "eoa_token_id", "eoa_token_index", "audio_token_id"),
            *("vision_soft_tokens_per_image", "audio_ms_per_token"),
        ),
        tied=True,
    ),
    "llama4": Wrapper(
        text="llama4_text",
        architectures=("Llama4ForConditionalGeneration",),
        prefixes={"language_model.model.": "model.", "language_model.lm_head.": "lm_head."},
        left_out=r"(vision_model|multi_modal_projector)\..*",
        fields=(
            *("vision_config", "boi_token_index", "eoi_token_index", "image_token_index"),
            *("boi_token_id", "eoi_token_id", "image_token_id"),
        ),
        tied=False,
    ),
}

for suffix, name in (("", "Qwen3_5"), ("_moe", "Qwen3_5Moe")):
    WRAPPERS[f"qwen3_5{suffix}"] = Wrapper(
        text=f"qwen3_5{suffix}_text",
        architectures=(f"{name}ForConditionalGeneration", f"{name}Model"),
        prefixes={"model.language_model.": "model."},
        left_out=r"model\.visual\..*|mtp\..*",
        fields=(
            *("vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            "language_model_only",
        ),
        tied=False,
    )


def text_fields(fields: Mapping[str, Json], known: frozenset[str]) -> Mapping[str, Json]:
    """The fields of the text model; all fields, where the model is not a wrapper.

    Args:
      known: fields that any config.json may have.
    Raises:
      UserError: `text_config` is missing or of another model, or a field beside it is unknown.
    """
    name = fields.get("model_type")
    wrapper = WRAPPERS.get(name) if isinstance(name, str) else None
    if wrapper is None:
        return fields
    for architecture in fields.get("architectures") or []:
        if architecture not in wrapper.architectures:
            raise UserError(
                f"config field architectures={architecture!r} is not supported; supported: "
                f"{', '.join(wrapper.architectures)} for model_type {name!r}."
            )
    text = fields.get("text_config")
    if not isinstance(text, Mapping):
        raise UserError(f"config field text_config={text!r} should be an object: the fields of the text model.")
    if text.get("model_type", wrapper.text) != wrapper.text:
        raise UserError(
            f"config field text_config.model_type={text.get('model_type')!r} is not supported; supported: "
            f"{wrapper.text!r} for model_type {name!r}."
        )
    beside = {"text_config", "architectures", "tie_word_embeddings", *wrapper.fields}
    for field, value in fields.items():
        if field not in beside and field not in known and value is not None:
            raise UserError(
                f"unknown config field {field}={value!r} beside text_config: a field that changes the computation "
                f"must not be ignored.{suggest(field, beside)}"
            )
    tied = fields.get("tie_word_embeddings")
    others = {"architectures": None, "model_type": wrapper.text, **dict.fromkeys(wrapper.unused)}
    return {**text, **others, "tie_word_embeddings": wrapper.tied if tied is None else tied}


def text_tensors(
    fields: Mapping[str, Json], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of the text model under its family's names, and what was left out, in words ("" for nothing).

    Raises:
      UserError: a file has the same weight under two names.
    """
    wrapper = WRAPPERS.get(str(fields.get("model_type")))
    if wrapper is None:
        return dict(tensors), ""
    found: dict[str, StoredTensor] = {}
    parts: dict[str, int] = {}
    for name, tensor in tensors.items():
        if re.fullmatch(wrapper.left_out, name):
            part = name.removeprefix("model.").split(".")[0]
            parts[part] = parts.get(part, 0) + 1
            continue
        begins = next((prefix for prefix in wrapper.prefixes if name.startswith(prefix)), "")
        newer = wrapper.prefixes.get(begins, "") + name.removeprefix(begins)
        if newer in found:
            raise UserError(f"{tensor.file}: tensors {found[newer].name!r} and {name!r} are two names of one weight.")
        found[newer] = tensor
    left = [f"{count} tensors {part}.*" for part, count in parts.items()]
    left += [f"field {name}" for name in wrapper.fields if fields.get(name) is not None]
    return found, f"the text model of {fields['model_type']}; left out: {', '.join(left) or 'nothing'}"
