"""How long a new user waits: import, load, the first `run`, the first step of `fit`, each in a fresh process.

Command: python -m benchmarks.first_calls                 (three processes with an empty cache of programs; the median)
         python -m benchmarks.first_calls --model smollm2-135m

One line of JSON: seconds since the process started work, by what was done.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

CALLS = """
import json, sys, time
times, clock = {}, time.perf_counter()
def note(name):
    global clock
    times[name] = time.perf_counter() - clock
    clock = time.perf_counter()
import jaxinterp
from jaxinterp import fit, load, load_text, run
from jaxinterp.methods import Transcoder
note("import")
subject = load(sys.argv[1])
note("load")
run(subject.model, subject.tokens("the cat sat on the mat")).logits.block_until_ready()
note("first run")
run(subject.model, subject.tokens("the cat sat on the mat")).logits.block_until_ready()
note("second run")
import numpy as np, grain
rows = np.random.default_rng(0).integers(97, 122, (64, 64)).astype(np.int32)
window = lambda row: {"tokens": row, "weight": np.ones(64, np.float32), "document": np.zeros(64, np.int32)}
text = grain.MapDataset.source([window(row) for row in rows])
clock = time.perf_counter()
fit(Transcoder(features=128, k=8), subject, text, site="blocks/1/mlp", steps=1, batch_size=256, log_every=1)
note("first fit step")
print(json.dumps(times))
"""


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    found = []
    for _ in range(options.times):
        with tempfile.TemporaryDirectory() as cache:
            environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
            command = [sys.executable, "-c", CALLS, options.model]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    print(json.dumps({name: round(statistics.median(one[name] for one in found), 2) for name in found[0]}))


if __name__ == "__main__":
    main()
