"""What the tests of loading share: files to write, to damage and to compare."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from jaxinterp.core.trees import named_leaves
from jaxinterp.models.files.tokenizer import BYTE_OF
from jaxinterp.models.transformer import Transformer, TransformerConfig

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
TOKENS = jnp.arange(20).reshape(2, 10) % 48
LLAMA = TransformerConfig(
    vocab_size=300, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_mlp=64, context=64, rotary_dimensions=8
)


def assert_same_leaves(actual: Transformer, expected: Transformer) -> None:
    for name, leaf in named_leaves(expected).items():
        np.testing.assert_array_equal(named_leaves(actual)[name], leaf, err_msg=name)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


def edit_tensors(directory: Path, **changes: Any) -> None:
    """Replace tensors of a directory's safetensors file; None removes one."""
    tensors = load_file(directory / "model.safetensors") | {k.replace("__", "."): v for k, v in changes.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / "model.safetensors")


def edit_header(directory: Path, edit: Any) -> None:
    """Let `edit` change the header of a directory's safetensors file; the arrays stay as they are."""
    path = directory / "model.safetensors"
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + size :])


def mesh() -> Mesh:
    assert len(jax.devices()) == 8
    return Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "feature"))


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key weights (d_out, d_in)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: Transformer,
    kind: gguf.GGMLQuantizationType,
    extra: dict[str, Any] | None = None,
    split: int = 0,
) -> None:
    """A Llama GGUF file as llama.cpp's converter lays it out, with a byte-level tokenizer.

    With `split`: in files of so many tensors, `path-00001-of-00003.gguf`, as gguf-split names them.
    """
    config, leaves = model.config, {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = list(BYTE_OF)[: config.vocab_size]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([])
    for name, value in (extra or {}).items():
        writer.add_float32(name, value)

    def add(name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array, np.float32)
        if array.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", leaves["embedding/token"])
    add("output_norm.weight", leaves["final_norm/weight"])
    if not config.tied:
        add("output.weight", leaves["unembedding/weight"].T)
    for layer in range(config.layers):
        ours, theirs = f"blocks/{layer}", f"blk.{layer}"
        add(f"{theirs}.attn_norm.weight", leaves[f"{ours}/attn_norm/weight"])
        add(f"{theirs}.attn_q.weight", llama_cpp_order(leaves[f"{ours}/attn/q_proj/weight"].T, config.heads))
        add(f"{theirs}.attn_k.weight", llama_cpp_order(leaves[f"{ours}/attn/k_proj/weight"].T, config.kv_heads))
        add(f"{theirs}.attn_v.weight", leaves[f"{ours}/attn/v_proj/weight"].T)
        add(f"{theirs}.attn_output.weight", leaves[f"{ours}/attn/o_proj/weight"].T)
        add(f"{theirs}.ffn_norm.weight", leaves[f"{ours}/mlp_norm/weight"])
        for part in ("gate", "up", "down"):
            add(f"{theirs}.ffn_{part}.weight", leaves[f"{ours}/mlp/{part}_proj/weight"].T)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
