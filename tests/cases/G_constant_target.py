"""Kind G: an MLP whose output is constant (pruned, zeroed or ablated before saving), through the command line.

Right: one line before training, exit code 2, no folder; and undefined numbers are `null` in JSON.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import equinox as eqx
import jax.numpy as jnp

from jaxinterp import load
from jaxinterp.models.load import Subject, save_subject

T = Path(tempfile.mkdtemp())
(T / "text").mkdir()
for i in range(120):
    (T / f"text/{i}.txt").write_text(" ".join(f"the {i + j} quick brown foxes jump over lazy dogs." for j in range(12)))
tiny = load("tiny")
mlp = tiny.model.blocks[1].mlp
name = "down_proj" if "down_proj" in vars(mlp) else "down"  # as it was called at 099a747


def place(model):
    return getattr(model.blocks[1].mlp, name).weight


constant = eqx.tree_at(place, tiny.model, jnp.zeros_like(place(tiny.model)))
save_subject(Subject(constant, tiny.tokenizer, "constant"), T / "constant")
sizes = "--site blocks/1/mlp --features 64 --k 4 --tokens 2560 --seq 64 --batch-size 256"
sizes += " --heldout-tokens 1024 --ce-tokens 512 --pages 2"
command = [sys.executable, "-m", "experiments.transcoder", *sizes.split(), "--model", T / "constant"]
done = subprocess.run([*command, "--text", T / "text", "--out", T / "out"], capture_output=True, text=True)
print("exit code", done.returncode)
print("stderr:", done.stderr.strip().splitlines()[-1][:400] if done.stderr.strip() else "")
if (T / "out/log.jsonl").exists():
    last = json.loads((T / "out/log.jsonl").read_text().splitlines()[-1])
    print("last row of the log: fvu", last.get("fvu"), "l0", last.get("l0"))


def strict(word):
    raise ValueError(f"{word} is no JSON")


if (T / "out/scoreboard.json").exists():
    try:
        json.loads((T / "out/scoreboard.json").read_text(), parse_constant=strict)
        print("scoreboard.json is JSON")
    except ValueError as error:
        print("scoreboard.json:", error)
else:
    print("no scoreboard.json; folder left:", (T / "out").exists())
