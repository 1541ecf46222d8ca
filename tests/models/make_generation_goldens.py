"""Make generation_goldens.json: what transformers writes greedily with the tiny models of tests/parity/goldens.

    python tests/models/make_generation_goldens.py

Needs torch and transformers (pip install "jaxinterp[convert]"); the test needs neither.
"""

import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
NAMES = ("gpt2-untied", "llama-llama3", "gemma2-uncapped", "qwen2-window")
MOST = 14


def main() -> None:
    import torch
    import transformers

    found = {}
    for name in NAMES:
        directory = HERE.parent / "parity" / "goldens" / name
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
        draw = np.random.default_rng(len(name))
        prompts = [draw.integers(1, 48, size).tolist() for size in (3, 7, 5)]
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MOST,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            rows.append(out[0, len(prompt) :].tolist())
        found[name] = {"prompts": prompts, "tokens": rows}
    (HERE / "generation_goldens.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
