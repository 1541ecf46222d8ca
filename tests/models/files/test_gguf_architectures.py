"""GGUF files of every architecture, laid out as llama.cpp's converter does, give the logits of the folder they are of.

Names come from the gguf package's own table; what the converter does beside renaming is done here again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.files import gguf_architectures
from jaxinterp.models.files.safetensors_file import open_directory
from jaxinterp.models.load import load
from tests.models.model_files import GOLDENS, llama_cpp_order

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
# golden, architecture, what is changed in its configuration so that a GGUF file can say it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral-full": ("llama", {"hidden_act": "silu"}),
    "llama-linear": ("llama", {"hidden_act": "silu"}),
    "llama-llama3": ("llama", {"hidden_act": "silu"}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 6}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 6}),
    "phi3-grouped": ("phi3", {}),
    "phi3-longrope": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "olmo2": ("olmo2", {}),
}
NORMS = ("norm.weight", "layernorm.weight")


def metadata_of(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """What set_gguf_parameters of llama.cpp's converter writes."""
    if kind == "gpt2":
        return {
            **{"block_count": config["n_layer"], "context_length": config["n_positions"]},
            **{"embedding_length": config["n_embd"], "feed_forward_length": 4 * config["n_embd"]},
            **{"attention.head_count": config["n_head"]},
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
    rope = config.get("rope_parameters") or ROPE
    rope = rope.get("full_attention", rope)
    said = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if config.get("head_dim"):
        said |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    if rope.get("partial_rotary_factor"):
        size = config["hidden_size"] // config["num_attention_heads"]
        said |= {"rope.dimension_count": int(rope["partial_rotary_factor"] * size)}
    if rope["rope_type"] == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind in ("gemma2", "gemma3", "phi3") and config.get("sliding_window"):
        said |= {"attention.sliding_window": config["sliding_window"]}
    if rope["rope_type"] == "longrope":
        before = rope["original_max_position_embeddings"]
        said |= {"rope.scaling.original_context_length": before}
        ratio = config["max_position_embeddings"] / before
        said |= {"rope.scaling.attn_factor": float(np.sqrt(1 + np.log(ratio) / np.log(before)))}
    if kind == "gemma2":
        said |= {f"{cap}_logit_softcapping": config[f"{cap}_logit_softcapping"] for cap in ("attn", "final")}
    return said


def converted(name: str, array: np.ndarray, kind: str, config: dict[str, Any], permute: bool) -> np.ndarray:
    """What modify_tensors of llama.cpp's converter does to an array."""
    if kind.startswith("gemma") and name.endswith(NORMS):
        return array + 1
    if kind == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return array.T
    if permute and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads"] if "q_proj" in name else config["num_key_value_heads"]
        return llama_cpp_order(array, heads)
    return array


def write(path: Path, directory: Path, kind: str, *, permute: bool, shifted: bool = True) -> None:
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, kind)
    for field, value in metadata_of(config, kind).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{kind}.{field}", value)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    names = gguf.get_tensor_name_map(numbers[kind], layers)
    for name, stored in open_directory(directory).items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        array = converted(name, stored.read(slice(None), None), kind if shifted else "llama", config, permute)
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        writer.add_tensor(theirs, np.ascontiguousarray(array, np.float32))
    rope = config.get("rope_parameters") or {}
    for length in ("short", "long") if rope.get("rope_type") == "longrope" else ():
        writer.add_tensor(f"rope_factors_{length}.weight", np.asarray(rope[f"{length}_factor"], np.float32))
    if rope.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """What generate_extra_tensors of llama.cpp's converter writes: by what each frequency is divided."""
    rope, found = config["rope_parameters"], []
    size, before = config["head_dim"], rope["original_max_position_embeddings"]
    for n in range(0, size, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (n / size)
        smooth = (before / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        if length < before / rope["high_freq_factor"]:
            found.append(1.0)
        elif length > before / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(found, np.float32)


def directory_of(golden: str, folder: Path) -> Path:
    """A copy of the golden with its configuration changed."""
    directory = folder / golden
    shutil.copytree(GOLDENS / golden, directory)
    config = json.loads((directory / "config.json").read_text()) | CASES[golden][1]
    if CASES[golden][0] == "gemma3":  # what llama.cpp knows and no file says
        config["rope_parameters"]["sliding_attention"]["rope_theta"] = 10_000.0
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def error(golden: str, folder: Path, *, permute: bool | None = None, shifted: bool = True) -> float:
    """The largest difference of logits, over the largest logit."""
    directory, kind = directory_of(golden, folder), CASES[golden][0]
    write(folder / "x.gguf", directory, kind, permute=kind == "llama" if permute is None else permute, shifted=shifted)
    with pytest.warns(UserWarning, match="the subject has no tokenizer"):
        subject = load(folder / "x.gguf")
    tokens = jnp.asarray(np.load(GOLDENS / golden / "expected.npz")["tokens"])
    expected, actual = np.asarray(load(directory).model(tokens)), np.asarray(subject.model(tokens))
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("golden", CASES)
def test_logits_are_those_of_the_folder(golden: str, tmp_path: Path) -> None:
    assert error(golden, tmp_path) < 1e-5


@pytest.mark.parametrize("golden", ["qwen3", "llama"])
def test_a_permutation_that_the_converter_does_not_do_shows(golden: str, tmp_path: Path) -> None:
    assert error(golden, tmp_path, permute=golden != "llama") > 1e-2


def test_norms_that_the_converter_did_not_shift_show(tmp_path: Path) -> None:
    assert error("gemma", tmp_path, shifted=False) > 1e-2


def test_every_architecture_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(gguf_architectures.ARCHITECTURES)


def test_stretched_positions_are_refused() -> None:
    with pytest.raises(UserError, match=r"rope\.scaling\.type='yarn'"):
        gguf_architectures.scaling_of({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "qwen3")
    with pytest.raises(UserError, match=r"longrope.*are missing"):
        gguf_architectures.ARCHITECTURES["phi3"].more(
            {"rope.scaling.original_context_length": 4096}, {"context": 131072, "layers": 1}
        )


def test_newer_files_say_which_layers_have_a_window() -> None:
    gemma, olmo = (gguf_architectures.ARCHITECTURES[kind].more for kind in ("gemma3", "olmo2"))
    config = {"d_model": 4, "heads": 2, "head_dim": 2, "layers": 3, "rotary_base": 5e5}
    said = {gguf_architectures.WINDOW: 8}
    assert olmo(said, config | {"layers": 4})["windows"] == (8, 8, 8, None)
    assert olmo(said | {gguf_architectures.PATTERN: 2}, config)["windows"] == (8, None, 8)
    assert gemma(said | {gguf_architectures.PATTERN: [False, True, True]}, config)["windows"] == (None, 8, 8)
    assert gemma(said | {gguf_architectures.LOCAL_BASE: 100.0}, config)["local_rotary_base"] == 100.0
    with pytest.raises(UserError, match="has 2 entries for 3 layers"):
        gemma(said | {gguf_architectures.PATTERN: [True, False]}, config)
