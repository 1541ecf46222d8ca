"""The keys and types of a batch file by SAEDashboard's own dataclasses, and the check of one that we wrote.

    python tests/interchange/make_neuronpedia_golden.py DASHBOARD              writes goldens/neuronpedia.json
    python tests/interchange/make_neuronpedia_golden.py DASHBOARD --check F    our file through their dataclasses

DASHBOARD is a folder with sae-dashboard 0.8.0 unpacked (pip install --no-deps --target DASHBOARD sae-dashboard==0.8.0):
its module neuronpedia_dashboard.py needs NumPy only.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "neuronpedia_golden.json"


def classes(root: Path) -> Any:
    path = root / "sae_dashboard" / "neuronpedia" / "neuronpedia_dashboard.py"
    spec = importlib.util.spec_from_file_location("neuronpedia_dashboard", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dashboard", type=Path)
    parser.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    module = classes(arguments.dashboard)
    if arguments.check:
        ours = json.loads(arguments.check.read_text())
        theirs = module.NeuronpediaDashboardBatch(**ours).to_dict()
        same = json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)
        print(f"{len(ours['features'])} features: {'the same' if same else 'different'} through their dataclasses")
        return int(not same)
    activation = {"bin_min": -1.0, "bin_max": 2.0, "bin_contains": -1.0, "tokens": ["a"], "values": [0.5]}
    numbers = (
        "neuron_alignment_values",
        "neuron_alignment_l1",
        "neg_values",
        "pos_values",
        "freq_hist_data_bar_values",
    )
    numbers += ("freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values")
    feature = {"feature_index": 3, "neuron_alignment_indices": [1], "neg_str": ["a"], "pos_str": ["b"]}
    feature |= {name: [0.5] for name in numbers} | {"frac_nonzero": 0.25, "n_prompts_total": 4, "n_tokens_in_prompt": 8}
    feature |= {"dataset": "text", "activations": [activation | {"qualifying_token_index": 0}]}
    batch = module.NeuronpediaDashboardBatch("m", 1, "s", None, [feature])
    GOLDEN.write_text(json.dumps(batch.to_dict(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
