"""transformers loads the directories that we write, pruned ones too, and finds our logits.

    python tests/parity/written.py

Each golden of a writable family is loaded here, pruned in three ways, written by `save_huggingface`, and read by
`AutoModelForCausalLM.from_pretrained`: half of the neurons and half of the groups of heads taken out, half of the
weights of MLPs masked, nothing. Logits must agree to 1e-5 of their largest number, nothing may be missing in the file
or left over, and those of the other two must differ by more than 1e-2: the comparison can fail.

Needs torch and transformers, as make_goldens.py does; `make parity` runs both.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "goldens"
WRITTEN = ("llama", "llama-linear", "llama-llama3", "llama-tied", "mistral-full", "mistral-window", "phi3")
WRITTEN += ("qwen2", "qwen2-window", "qwen3", "qwen3-bias")
"""Goldens whose configuration a writable family can say; Phi 3's comes out as a Mistral."""
TOLERANCE, DIFFERENT = 1e-5, 1e-2


def variants(model: Any) -> dict[str, Any]:
    """The model as it is, with neurons and heads taken out, and with weights masked."""
    from jaxinterp.models.pruning import keep_heads, keep_neurons, mask_weights, weight_mask
    from jaxinterp.models.selection import magnitude

    config, blocks = model.config, range(model.config.layers)
    small = keep_neurons(model, {f"blocks/{i}/mlp": list(range(0, config.d_mlp, 2)) for i in blocks})
    groups = list(range(0, config.kv_heads, 2))
    small = keep_heads(small, {f"blocks/{i}/attn": groups for i in blocks})
    masks = {}
    for i, block in enumerate(model.blocks):
        for name in ("gate_proj", "up_proj", "down_proj"):
            score = magnitude(getattr(block.mlp, name).weight)
            masks[f"blocks/{i}/mlp/{name}"] = weight_mask(score, (2, 4), within="output")
    return {"whole": model, "taken out": small, "2:4": mask_weights(model, masks)}


def theirs(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """The logits of transformers, which must find all that it wants in the directory and nothing else."""
    import torch
    import transformers

    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: found for key, found in loaded.items() if found and key != "error_msgs"}
    if wrong or loaded.get("error_msgs"):
        raise SystemExit(f"{folder.name}: transformers says {loaded}")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()


def check() -> bool:
    """Print and compare."""
    import dataclasses

    from jaxinterp.models.files.write_huggingface import save_huggingface
    from jaxinterp.models.load import load
    from jaxinterp.models.run import run

    good = True
    with tempfile.TemporaryDirectory() as folder:
        for name in WRITTEN:
            subject = load(HERE / name, dtype="float32")
            tokens = np.load(HERE / name / "expected.npz", allow_pickle=False)["tokens"]
            found = {}
            for kind, model in variants(subject.model).items():
                where = Path(folder) / f"{name} {kind}"
                save_huggingface(dataclasses.replace(subject, model=model), where)
                ours = np.asarray(run(model, tokens).logits)
                found[kind] = theirs(where, tokens)
                error = np.abs(found[kind] - ours).max() / np.abs(ours).max()
                change = np.abs(found[kind] - found["whole"]).max() / np.abs(ours).max()
                good = good and error < TOLERANCE and (kind == "whole" or change > DIFFERENT)
                print(
                    f"{name:16s} {kind:10s} ours against transformers {error:.1e}, against the whole model {change:.1e}"
                )
    return good


if __name__ == "__main__":
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    sys.exit(0 if check() else 1)
