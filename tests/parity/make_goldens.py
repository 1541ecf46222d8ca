"""Make the goldens of the parity test: tiny random models of every family, and what transformers makes of them.

`expected.npz` holds tokens, logits, and the hidden states behind the embedding, in the middle and at the end, under our
names; of an encoder, its last hidden state under the name `final`, computed with the padding at the end of some inputs
masked.

    python tests/parity/make_goldens.py           writes goldens/<name>/{config.json, *.safetensors, expected.npz}
    python tests/parity/make_goldens.py --check   makes them anew in a temporary folder and compares: the fresh ones
                                                  through our loader, and the committed logits with the fresh ones

Needs torch (the CPU build is enough) and transformers: pip install "jaxinterp[convert]". The test itself
(test_goldens.py) needs neither. Weights come from NumPy, seeded by the model's name, and are scaled so that logits are
of order one, attention is uneven, and norms and biases are far from their usual 1 and 0: a mistake must show.
"""

import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from configurations import LATER, PACKED

HERE = Path(__file__).parent / "goldens"
TOLERANCE = 1e-4
BATCH, SEQ, SHORT, VOCAB = 2, 20, 12, 48

COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.02, "pad_token_id": None}
LLAMA = COMMON | {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX = COMMON | {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = {"vocab_size": VOCAB, "max_position_embeddings": 24, "hidden_size": 16, "intermediate_size": 24}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": VOCAB, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def local_rope(theta: float, local_theta: float, **more: Any) -> dict[str, Any]:
    """Gemma 3: one kind of rotary positions for layers without a window, another for those with one."""
    full = rope(theta, **more)["rope_parameters"]
    local = rope(local_theta)["rope_parameters"]
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


LLAMA3 = rope(
    1000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=24,
)

# name -> (class, configuration, size of a file above which the weights are split, or None)
GOLDENS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, None),
    "gpt2-untied": (
        "GPT2LMHeadModel",
        GPT2 | {"n_inner": 20, "activation_function": "relu", "layer_norm_epsilon": 0.1, "tie_word_embeddings": False},
        None,
    ),
    "gpt2-gelu": (
        "GPT2LMHeadModel",
        GPT2 | {"activation_function": "gelu", "layer_norm_epsilon": 1e-2, "n_head": 2},
        None,
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", NEOX | rope(10_000.0, partial_rotary_factor=0.25), None),
    "gpt-neox-sequential": (
        "GPTNeoXForCausalLM",
        NEOX
        | rope(500.0, partial_rotary_factor=1.0)
        | {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 0.1,
            "tie_word_embeddings": True,
        },
        None,
    ),
    "gpt-neox-linear": (
        "GPTNeoXForCausalLM",
        NEOX | rope(100.0, partial_rotary_factor=0.5, rope_type="linear", factor=4.0) | {"layer_norm_eps": 1e-3},
        None,
    ),
    "llama": ("LlamaForCausalLM", LLAMA | rope(10_000.0) | {"rms_norm_eps": 1e-5}, None),
    "llama-tied": (
        "LlamaForCausalLM",
        LLAMA
        | rope(500.0)
        | {
            "num_key_value_heads": 2,
            "head_dim": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 0.1,
            "tie_word_embeddings": True,
        },
        None,
    ),
    "llama-llama3": (
        "LlamaForCausalLM",
        LLAMA | LLAMA3 | {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        "20KB",  # in several files, with an index
    ),
    "llama-linear": (
        "LlamaForCausalLM",
        LLAMA | rope(100.0, rope_type="linear", factor=4.0) | {"hidden_act": "relu", "num_attention_heads": 2},
        None,
    ),
    "mistral-window": (
        "MistralForCausalLM",
        LLAMA | rope(1000.0) | {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 8},
        None,
    ),
    "mistral-full": (
        "MistralForCausalLM",
        LLAMA
        | rope(10_000.0)
        | {"num_key_value_heads": 4, "sliding_window": None, "hidden_act": "gelu", "tie_word_embeddings": True},
        None,
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        LLAMA | rope(1_000_000.0) | {"num_key_value_heads": 2, "tie_word_embeddings": True},
        None,
    ),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        LLAMA
        | rope(1000.0)
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "rms_norm_eps": 1e-2,
        },
        None,
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        LLAMA | rope(1_000_000.0) | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
        None,
    ),
    "qwen3-bias": (
        "Qwen3ForCausalLM",
        LLAMA
        | rope(100.0)
        | {
            "num_key_value_heads": 4,
            "head_dim": 6,
            "attention_bias": True,
            "rms_norm_eps": 0.05,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        None,
    ),
    "gemma": ("GemmaForCausalLM", LLAMA | rope(10_000.0) | {"num_key_value_heads": 1, "head_dim": 6}, None),
    "gemma-bias": (
        "GemmaForCausalLM",
        LLAMA
        | rope(500.0)
        | {
            "num_key_value_heads": 4,
            "head_dim": 4,
            "attention_bias": True,
            "rms_norm_eps": 0.1,
            "tie_word_embeddings": False,
        },
        None,
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        LLAMA
        | rope(10_000.0)
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 3,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        None,
    ),
    "gemma2-uncapped": (
        "Gemma2ForCausalLM",
        LLAMA
        | rope(200.0)
        | {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "hidden_activation": "gelu",
            "attention_bias": True,
            "rms_norm_eps": 0.05,
            "tie_word_embeddings": False,
        },
        None,
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        LLAMA
        | local_rope(10_000.0, 100.0)
        | {
            "num_hidden_layers": 7,
            "num_key_value_heads": 2,
            "head_dim": 6,
            "sliding_window": 4,
            "query_pre_attn_scalar": 3,
        },
        None,
    ),
    "gemma3-linear": (
        "Gemma3ForCausalLM",
        LLAMA
        | local_rope(1000.0, 50.0, rope_type="linear", factor=4.0)
        | {
            "num_key_value_heads": 4,
            "head_dim": 8,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 5.0,
            "hidden_activation": "gelu",
            "attention_bias": True,
            "rms_norm_eps": 0.05,
            "tie_word_embeddings": False,
        },
        None,
    ),
    "olmo2": ("Olmo2ForCausalLM", LLAMA | rope(500_000.0) | {"num_key_value_heads": 2}, None),
    "olmo2-bias": (
        "Olmo2ForCausalLM",
        LLAMA
        | rope(100.0)
        | {"num_key_value_heads": 4, "attention_bias": True, "rms_norm_eps": 0.05, "tie_word_embeddings": True},
        None,
    ),
    "phi3": ("Phi3ForCausalLM", LLAMA | rope(10_000.0) | {"num_key_value_heads": 4, "sliding_window": 5}, None),
    "phi3-grouped": (
        "Phi3ForCausalLM",
        LLAMA
        | rope(100.0, partial_rotary_factor=0.5)
        | {"hidden_size": 32, "num_key_value_heads": 1, "rms_norm_eps": 0.1, "tie_word_embeddings": True},
        None,
    ),
    "bert": ("BertModel", BERT | {"pad_token_id": 3}, None),
    "bert-masked-lm": (
        "BertForMaskedLM",
        BERT | {"hidden_act": "relu", "layer_norm_eps": 0.1, "type_vocab_size": 3, "num_attention_heads": 2},
        None,
    ),
}
GOLDENS |= LATER


def randomise(model: Any, seed: int, later: bool = False) -> None:
    """Standard deviations: weights 1.3 / sqrt(d_in), embeddings 0.7, biases 0.3, norms 0.4 about their middle.

    Those of later families are numbers that bfloat16 holds.
    """
    import torch

    rng = np.random.default_rng(seed)
    norms = {name: type(module).__name__ for name, module in model.named_modules()}
    norms = {name: kind for name, kind in norms.items() if "norm" in kind.lower()}
    about_zero = "Gemma" in type(model).__name__ and "Gemma4" not in type(model).__name__
    for name, parameter in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        values = rng.standard_normal(tuple(parameter.shape))
        if kind in ("bias", "sinks") or kind.endswith("_bias"):
            values = 0.3 * values
        elif owner in norms:
            zero = about_zero or (norms[owner].startswith("Qwen3_5") and not norms[owner].endswith("Gated"))
            values = (0.0 if zero else 1.0) + 0.4 * values
        elif kind == "A_log":
            values = -1.5 + 0.5 * values
        elif parameter.ndim == 1:
            values = 1 + 0.4 * values
        elif isinstance(model.get_submodule(owner), torch.nn.Embedding):
            values = 0.7 * values
        else:
            conv1d = type(model.get_submodule(owner)).__name__ == "Conv1D"
            values = 1.3 * values / parameter.shape[0 if conv1d else 1] ** 0.5
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values.astype(np.float32)))
            if later:
                parameter.copy_(parameter.to(torch.bfloat16))


def pack_experts(model: Any, seed: int) -> dict[str, Any]:
    """Random MXFP4 blocks, put into the model as transformers dequantises them; what their file keeps instead."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng, kept = np.random.default_rng(seed), {}
    for name, parameter in model.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = parameter.shape
        blocks = torch.from_numpy(rng.integers(0, 256, (experts, outputs, inputs // 32, 16), dtype=np.uint8))
        scales = torch.from_numpy(rng.integers(121, 126, blocks.shape[:-1], dtype=np.uint8))
        with torch.no_grad():
            parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
        kept |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return kept


def store_packed(directory: Path, packed: dict[str, Any]) -> None:
    """The blocks in place of the matrices that they mean, and what config.json says of them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    meant = {name.rpartition("_")[0] for name in packed}
    save_file(
        {name: each for name, each in tensors.items() if name not in meant} | packed, directory / "model.safetensors"
    )
    config = json.loads((directory / "config.json").read_text())
    whole = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"modules_to_not_convert": whole, "quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def three_depths(hidden: tuple[Any, ...], model: Any) -> dict[str, np.ndarray]:
    """The residual stream behind the embedding, in the middle, and behind the final norm, under our names."""
    middle = len(hidden) // 2
    found = {"embed": hidden[0], f"blocks/{middle - 1}/resid/post": hidden[middle]}
    if hidden[-1].shape == hidden[0].shape:  # OPT may map the last one to another size
        found["final"] = hidden[-1]
    return {name: array.numpy() for name, array in found.items()}


def make(name: str, directory: Path) -> None:
    """Write one golden into `directory`."""
    import torch
    import transformers

    class_name, settings, split = GOLDENS[name]
    model_class = getattr(transformers, class_name)
    model = model_class(model_class.config_class(**settings, attn_implementation="eager")).eval()
    seed, later = zlib.crc32(name.encode()), name in LATER
    randomise(model, seed, later)
    for number, (kind, buffer) in enumerate(model.named_buffers()):
        if kind.endswith("layer_scalar"):  # of Gemma 4's layers
            buffer.fill_(0.75 + 0.25 * (number % 3))
    packed = pack_experts(model, seed) if name == PACKED else {}
    limit = 40 if "ConditionalGeneration" in class_name else VOCAB  # ids beyond are those of images
    tokens = np.random.default_rng(seed + 1).integers(0, limit, (BATCH, SHORT if later else SEQ))
    kind, expected, depths = "logits", None, {}
    with torch.no_grad():
        if class_name.startswith("Bert"):
            tokens[0, -6:] = model.config.pad_token_id
            mask = torch.from_numpy(tokens != model.config.pad_token_id)
            kind, encoder = "final", getattr(model, "bert", model)
            expected = encoder(torch.from_numpy(tokens), attention_mask=mask.long()).last_hidden_state.numpy()
        else:
            # transformers 5.24 cannot run Llama 4's wrapper on text alone (no attribute image_outputs)
            runs = model.language_model if class_name == "Llama4ForConditionalGeneration" else model
            answer = runs(torch.from_numpy(tokens), output_hidden_states=True)
            expected, depths = answer.logits.numpy(), three_depths(answer.hidden_states, model)
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    model = model.to(torch.bfloat16) if later else model
    model.save_pretrained(directory, **({"max_shard_size": split} if split else {}))
    if packed:
        store_packed(directory, packed)
    (directory / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(directory / "expected.npz", tokens=tokens.astype(np.int32), **{kind: expected}, **depths)
    size = sum(path.stat().st_size for path in directory.iterdir())
    print(
        f"{name:22s} {size / 1000:6.1f} kB   {kind}: deviation {expected.std():.2f}, "
        f"largest {np.abs(expected).max():.2f}"
    )


def relative_error(actual: np.ndarray, expected: np.ndarray, counts: np.ndarray) -> float:
    """Largest difference over largest value, where a position counts."""
    return float(np.abs(actual - expected)[counts].max() / np.abs(expected)[counts].max())


def check() -> bool:
    """Make every golden anew; compare it with our forward pass, and the committed one with it."""
    from jaxinterp.models.load import load
    from jaxinterp.models.run import run

    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name in GOLDENS:
            make(name, Path(folder) / name)
            fresh = np.load(Path(folder) / name / "expected.npz", allow_pickle=False)
            committed = np.load(HERE / name / "expected.npz", allow_pickle=False)
            model = load(Path(folder) / name, dtype="float32").model
            trace = run(model, fresh["tokens"])
            counts = fresh["tokens"] != (-1 if model.config.padding is None else model.config.padding)
            errors = (0.0, 0.0)
            for kind in sorted(set(fresh) - {"tokens"}):
                ours = np.asarray(trace.logits if kind == "logits" else trace[kind])
                found = (relative_error(each, fresh[kind], counts) for each in (ours, committed[kind]))
                errors = tuple(map(max, errors, found))
            print(f"{'':22s} ours against transformers {errors[0]:.1e}, committed against fresh {errors[1]:.1e}")
            good = good and max(errors) < TOLERANCE
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("names", nargs="*", help="which ones to write (default: all)")
    arguments = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    if arguments.check:
        sys.exit(0 if check() else 1)
    for name in arguments.names or GOLDENS:
        make(name, HERE / name)


if __name__ == "__main__":
    main()
