"""From a config.json to our configuration: every family is a table of `tables.py`, read here.

A field is copied, read by a rule, required to have a certain value, or known to have no effect on what the model
computes; any other field is refused by name. Null is the default of a field that has one, and says nothing in a field
that is not known. A weight is found under the name that the table gives for our leaf; any
other tensor in a file is refused by name, too.
"""

import typing
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.core.json_value import Json
from jaxinterp.models.families.base import Family
from jaxinterp.models.families.fields import number, refused
from jaxinterp.models.families.tables import FAMILIES
from jaxinterp.models.families.wrappers import WRAPPERS, text_fields
from jaxinterp.models.files.weights import StoredTensor, split_experts
from jaxinterp.models.transformer import TransformerConfig

NO_EFFECT = {
    name
    for group in (
        # bookkeeping
        "architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash",
        "tokenizer_class task_specific_params id2label label2id num_labels problem_type finetuning_task prefix",
        # training
        "initializer_range attention_dropout gradient_checkpointing neftune_noise_alpha use_reentrant_checkpointing",
        "resid_pdrop embd_pdrop attn_pdrop hidden_dropout embedding_dropout classifier_dropout hidden_dropout_prob",
        "attention_probs_dropout_prob",
        # what other tools left
        "is_llama_config is_qwen2_config transformers.js_config transformers_js_config model_max_length max_new_tokens",
        "_from_model_config original_model base_model license language tokenizer_name",
        # how it is computed, not what
        "use_cache cache_implementation attn_implementation _attn_implementation _attn_implementation_autoset",
        "_attn_implementation_internal use_flash_attn use_flash_attention_2 _flash_attn_2_enabled",
        "pretraining_tp chunk_size_feed_forward torchscript use_bfloat16 tf_legacy_loss return_dict use_return_dict",
        "output_attentions output_hidden_states",
        # special tokens and generation
        "unk_token_id cls_token_id mask_token_id",
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length min_length do_sample",
        "early_stopping num_beams temperature top_k top_p typical_p repetition_penalty length_penalty bad_words_ids",
        "no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences output_scores num_beam_groups",
        "return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens",
        "exponential_decay_length_penalty begin_suppress_tokens diversity_penalty",
    )
    for name in group.split()
}
"""Fields that any config.json may have and that leave inference logits as they are."""

NO_EFFECT_PREFIXES = ("unsloth_",)
"""How the names of such fields begin."""

SAME_AS = {"sliding_window_size": "sliding_window"}
"""Second names of fields, which transformers does not read: a warning says where they differ."""

OWN_NULL = {
    *("sliding_window", "sliding_window_pattern", "layer_types", "head_dim", "num_key_value_heads", "n_inner"),
    *("rope_theta", "rope_scaling", "rope_parameters", "pad_token_id", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}
"""Fields in which null is a value of its own (no window, no cap) and not the default."""

REQUIRED: dict[str, tuple[Json, ...]] = {
    "add_cross_attention": (False,),
    "auto_map": (None,),
    "cross_attention_hidden_size": (None,),
    "is_decoder": (False, True, None),
    "is_encoder_decoder": (False,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "tie_word_embeddings": (False, True),
    "use_bidirectional_attention": (None, False),
    "use_mrope": (False,),
}
"""Fields that any config.json may have, and the values that are computed here."""


ANYWHERE = frozenset((*NO_EFFECT, *REQUIRED))

MOST_LAYERS = 10_000
"""More than any model has: a damaged file must not make lists of every layer's window that fill the memory."""


def family_of(fields: Mapping[str, Json], families: Mapping[str, Family] | None = None) -> Family:
    """The family that a config.json names in `model_type` and `architectures`; of a wrapper, its text model's.

    Args:
      families: those of the caller by `model_type`, beside the package's own.
    Raises:
      UserError: it is not supported, or `families` has a name of the package's own.
    """
    twice = sorted({*(families or {})} & {*FAMILIES, *WRAPPERS})
    if twice:
        raise UserError(f"families: model_type {twice[0]!r} is supported already: give yours another name.")
    fields = text_fields(fields, ANYWHERE)
    name, every = fields.get("model_type"), {**FAMILIES, **(families or {})}
    if not isinstance(name, str) or name not in every:
        known = [*every, *WRAPPERS]
        raise UserError(
            f"model_type={name!r} is not supported; supported: {', '.join(known)}.{suggest(str(name), known)}"
        )
    family = every[name]
    architectures = fields.get("architectures") or []
    if not isinstance(architectures, list):
        raise refused("architectures", architectures, "a list of names")
    for architecture in architectures:
        if architecture not in family.architectures:
            raise refused("architectures", architecture, f"{', '.join(family.architectures)} for model_type {name!r}")
    return family


def family_config(family: Family, fields: Mapping[str, Json]) -> TransformerConfig:
    """The configuration that the fields of a config.json describe.

    Raises:
      UserError: a field is unknown, missing, malformed, or has a value that is not supported.
    """
    fields = text_fields(fields, ANYWHERE)
    ruled = {name for rule in family.rules for name in rule.reads}
    required = {name: values for name, values in REQUIRED.items() if name not in ruled} | dict(family.required)
    known = {*family.copied, *ruled, *required, *NO_EFFECT, *family.no_effect}
    fields = _without_nulls(family, fields, known)
    for name, value in fields.items():
        if name.startswith(NO_EFFECT_PREFIXES):
            continue
        if SAME_AS.get(name) in known:
            other = SAME_AS[name]
            used = (dict(family.defaults) | dict(fields)).get(other)
            if value != used:
                warnings.warn(f"config field {name}={value!r} is not {other}={used!r}, which is used.", stacklevel=3)
        elif name not in known:
            raise UserError(
                f"unknown config field {name}={value!r}: this family is supported with "
                f"{', '.join(sorted({*family.copied, *ruled, *family.required}))}; a field that changes the "
                f"computation must not be ignored.{suggest(name, known)}"
            )
        if name in required and not _is_among(value, required[name]):
            raise refused(name, value, ", ".join(repr(allowed) for allowed in required[name]))
    filled = dict(family.defaults) | dict(fields)
    ours = dict(family.constants)
    for name, copy in family.copied.items():
        kind = typing.get_type_hints(TransformerConfig)[copy]
        if kind is bool:
            ours[copy] = bool(filled[name])  # one of REQUIRED's truth values
        else:
            ours[copy] = number(filled, name, kind, *([MOST_LAYERS] if copy == "layers" else []))
    for rule in family.rules:
        ours |= rule.make(filled)
    return TransformerConfig(**ours)


def is_tied(family: Family, fields: Mapping[str, Json]) -> bool:
    """Whether the file's head is its embedding, also where the head has a bias and so is a leaf of its own here."""
    fields = text_fields(fields, ANYWHERE)
    said = fields.get("tie_word_embeddings")
    return bool(dict(family.defaults).get("tie_word_embeddings") if said is None else said)


def _without_nulls(family: Family, fields: Mapping[str, Json], known: Collection[str]) -> dict[str, Json]:
    """The fields but those whose null says nothing: the default is meant, or there is no such field here."""

    def says_nothing(name: str) -> bool:
        if name not in known:
            return True
        return name in family.defaults and name not in OWN_NULL and family.defaults[name] is not True

    return {name: value for name, value in fields.items() if value is not None or not says_nothing(name)}


def _is_among(value: Any, allowed: tuple[Json, ...]) -> bool:
    """Whether a value is allowed; where nothing is (null, false, an empty object), every form of nothing is."""
    nothing: tuple[Json, ...] = (None, False, {}, [], "")
    switch = True in allowed  # null of a switch may mean either
    return value in allowed or (value in nothing and not switch and any(choice in nothing for choice in allowed))


def canonical_names(family: Family, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under the names that the family's table uses, whichever version wrote the file.

    Raises:
      UserError: a file has the same weight under two names.
    """
    bare = not any(name.startswith(family.prefix) for name in tensors)
    named: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        newer = name
        for older, ending in family.renamed.items():
            newer = newer.removesuffix(older) + ending if newer.endswith(older) else newer
        newer = family.prefix + newer if bare and not newer.startswith("lm_head.") else newer
        if newer in named:
            raise UserError(f"{tensor.file}: tensors {named[newer].name!r} and {name!r} are two names of one weight.")
        named[newer] = tensor
    return split_experts(named) if any("#" in name for name, _ in family.tensors.values()) else named
