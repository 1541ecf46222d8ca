"""Kind K: what is said. Right: each line says what was asked for, with the way out; nothing silent is done.

Which checkpoint it is, `--tokens 1000`, `--model gpt2`, `--preflight h101`, values of presets in --help, hidden files,
names from a hub's cache, a begin token that is null, a batch larger than the text.
"""

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers

from jaxinterp import fit, load, load_text
from jaxinterp.errors import UserError
from jaxinterp.methods import Transcoder

T = Path(tempfile.mkdtemp())


def line(label, *words):
    done = subprocess.run([sys.executable, "-m", "experiments.transcoder", *words], capture_output=True, text=True)
    said = [text for text in done.stderr.splitlines() if "Warning" not in text]
    print(f"{label}: code {done.returncode}: {said[-1][:330] if said else done.stdout[:100]}")


line("--tokens 1000", "--model", "tiny", "--tokens", "1000", "--out", str(T / "a"))
line("--model gpt2", "--model", "gpt2", "--out", str(T / "b"))
line("--preflight h101", "--model", "tiny", "--preflight", "h101:8", "--out", str(T / "c"))
shown = subprocess.run(
    [sys.executable, "-m", "experiments.transcoder", "--help"], capture_output=True, text=True
).stdout
words = " ".join(shown.replace("│", " ").split())
print(
    "--help says (default: None) times:",
    words.count("(default: None)"),
    "; Q4_1:",
    "Q4_1" in words,
    "; 4608:",
    "4608" in words,
)

for name in (*(f"{i}.txt" for i in range(12)), ".ipynb_checkpoints/a-checkpoint.txt", "._a.txt"):
    (T / "text" / name).parent.mkdir(parents=True, exist_ok=True)
    (T / "text" / name).write_text(f"this is {name} " * 400)
subject = load("tiny")
train, held = load_text(str(T / "text"), subject.tokenizer, seq=64)
seen = "".join(subject.tokenizer.decode(window["tokens"].tolist()) for part in (train, held) for window in part)
print("hidden files are read:", "checkpoint" in seen or "._a" in seen)


def llama(where, bos):
    where.mkdir(parents=True)
    rng = np.random.default_rng(0)
    w = lambda *shape: rng.normal(size=shape).astype(np.float32)
    b = "model.layers.0."
    arrays = {"model.embed_tokens.weight": w(257, 16), "model.norm.weight": w(16), "lm_head.weight": w(257, 16)}
    arrays |= {b + "input_layernorm.weight": w(16), b + "post_attention_layernorm.weight": w(16)}
    arrays |= {b + f"self_attn.{n}_proj.weight": w(16, 16) for n in "qkvo"}
    arrays |= {b + f"mlp.{n}_proj.weight": w(32, 16) for n in ("gate", "up")} | {b + "mlp.down_proj.weight": w(16, 32)}
    save_file(arrays, where / "model.safetensors")
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    (where / "config.json").write_text(json.dumps(fields))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": bos}))
    return where


with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    found = load(llama(T / "models--owner--small/snapshots/a4f1c0", None))
print("name from a hub's cache:", found.name)
print("bos_token null:", [str(one.message)[-90:] for one in told if "bos" in str(one.message)] or "not a word")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    try:
        fit(Transcoder(features=8, k=2), subject, train[:3], site="blocks/1/mlp", steps=1, batch_size=256)
    except UserError as error:
        print("refused:", error)
print(
    "a batch larger than the text:",
    [str(one.message)[:100] for one in told if "batch" in str(one.message)] or "not a word",
)
print("jax", jax.__version__)
