"""What a family is: a table of the fields of its config.json and of the tensors in its files; and parts of tables.

Sources of the facts: the configuration and modelling files of Hugging Face transformers 4.57, 5.23 and 5.24.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import PyTree

from jaxinterp.core.json_value import Json
from jaxinterp.models.families import fields as rules
from jaxinterp.models.families.fields import Rule, flag, number
from jaxinterp.models.files.weights import LeafTable
from jaxinterp.models.transformer import TransformerConfig


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
      architectures: values of `architectures` that have this forward pass.
      copied: field of config.json -> field of TransformerConfig.
      rules: fields that need more than copying.
      constants: fields of TransformerConfig that are the same for the whole family.
      defaults: what a field means where the file does not have it.
      required: field -> the values that this implementation computes.
      no_effect: fields of this family without an effect on inference logits, beside `families.NO_EFFECT`.
      tensors: leaf of ours -> (tensor of theirs, layout); `*` is the layer, `#` an expert or a head whose tensors are
        stacked.
      parallel_tensors: those of parallel blocks, where they differ: one norm for both sublayers.
      prefix: what older files leave out of tensor names.
      renamed: how a tensor's name ends in older files -> in newer ones.
      buffers: a regular expression for tensors that carry no weights, or those of a head that is not computed here.
    """

    architectures: tuple[str, ...]
    copied: Mapping[str, str]
    rules: tuple[Rule, ...]
    tensors: LeafTable
    parallel_tensors: LeafTable = field(default_factory=dict)
    constants: Mapping[str, PyTree] = field(default_factory=dict)
    defaults: Mapping[str, Json] = field(default_factory=dict)
    required: Mapping[str, tuple[Json, ...]] = field(default_factory=dict)
    no_effect: tuple[str, ...] = ()
    prefix: str = "model."
    renamed: Mapping[str, str] = field(default_factory=dict)
    buffers: str = r".*\.rotary_emb\.inv_freq"

    def table(self, config: TransformerConfig) -> LeafTable:
        """Where each leaf of a model of this configuration is found."""
        return {**self.tensors, **(self.parallel_tensors if config.parallel else {})}

    def left_out(self, config: TransformerConfig) -> str:
        """A regular expression: `buffers`, and keys and values of layers that take those of a layer before."""
        table, found = self.table(config), [self.buffers]
        for layer in range(config.layers - config.shared_layers, config.layers):
            for part in SHARED_PARTS:
                names = (theirs for ours, (theirs, _) in table.items() if ours.startswith(f"blocks/*/attn/{part}/"))
                found += [re.escape(name.replace("*", str(layer))) for name in names]
        return "|".join(found)


SHARED_PARTS = ("k_proj", "v_proj", "key_norm")
"""Of attention, what a layer that takes the keys and values of another does not have."""

LLAMA_COPIED = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "layers",
    "intermediate_size": "d_mlp",
    "max_position_embeddings": "context",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied",
}
LLAMA_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False}
HEADS = Rule(("num_attention_heads", "num_key_value_heads", "head_dim"), rules.heads)
QWEN_WINDOWS = Rule(
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), rules.window_in_upper_layers
)
QWEN_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA_DEFAULTS = {
    **LLAMA_DEFAULTS,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA_SCALE = Rule(("hidden_size",), lambda fields: {"embedding_scale": number(fields, "hidden_size") ** 0.5})
ALL_BIASES = {"norm_bias": True, "qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
ATTENTION_BIAS = flag("attention_bias", "qkv_bias", "attention_out_bias")
BERT_COPIED = {name: ours for name, ours in LLAMA_COPIED.items() if ours != "norm_epsilon"} | {
    "layer_norm_eps": "norm_epsilon"
}
"""As Llama's, with LayerNorm's name for epsilon."""
GPT_COPIED = {
    "vocab_size": "vocab_size",
    "n_embd": "d_model",
    "n_layer": "layers",
    "n_positions": "context",
    "layer_norm_epsilon": "norm_epsilon",
    "tie_word_embeddings": "tied",
}
GPT_HEADS = Rule(
    ("n_head",),
    lambda fields: rules.heads(
        {"num_attention_heads": number(fields, "n_head"), "hidden_size": number(fields, "n_embd")}
    ),
)
SUMMARY = (
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx"),
)
"""Fields of old GPT files without an effect on logits."""


def mlp_width(name: str, width: str) -> Rule:
    """The MLP's neurons: field `name`, or four times field `width` where it is null."""

    def make(fields: rules.Fields) -> dict[str, PyTree]:
        return {"d_mlp": 4 * number(fields, width) if fields.get(name) is None else number(fields, name)}

    return Rule((name,), make)


def factor(name: str, ours: str, *, divides: bool = False) -> Rule:
    """A positive number that multiplies (or divides) as our field `ours`."""

    def make(fields: rules.Fields) -> dict[str, PyTree]:
        value = number(fields, name, float)
        return {ours: 1 / value if divides else value}

    return Rule((name,), make)
