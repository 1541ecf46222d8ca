"""Generation with a key/value cache against one compiled program without, padded to the full length: time per token.

    python -m benchmarks.generate --model smollm2-135m --tokens 64

Both are one program (a `lax.while_loop`), greedy, same prompt, same run; each is compiled first and then timed
`--repeats` times; the median counts. The two must write the same tokens.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

from jaxinterp.models.generate import Generation, generate
from jaxinterp.models.load import load

PROMPT = "The river rises in the hills above the town and runs for about forty miles before it reaches the sea."


def timed(function: Callable[[], Generation], repeats: int) -> tuple[float, Generation]:
    """Median seconds after a first call that compiles, and what came out."""
    out = function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), out


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    subject = load(given.model)
    runs = {
        name: timed(
            lambda cache=cache: generate(subject, PROMPT, max_tokens=given.tokens, cache=cache),
            given.repeats,
        )
        for name, cache in (("cached", True), ("anew", False))
    }
    count = len(runs["cached"][1].tokens[0])
    row = {f"{name}_ms_per_token": round(1000 * seconds / count, 2) for name, (seconds, _) in runs.items()}
    same = runs["cached"][1].tokens == runs["anew"][1].tokens
    ratio = runs["anew"][0] / runs["cached"][0]
    print(json.dumps({"model": given.model, "tokens": count, **row, "times_faster": round(ratio, 2), "same": same}))


if __name__ == "__main__":
    main()
