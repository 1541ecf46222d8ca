"""A decomposition of one MLP of a language model, its scoreboard and its report: what `make demo` runs.

Command: python -m experiments.transcoder --out runs/demo        (the same as `jaxinterp train`, which explains it)
"""

import sys

from jaxinterp.commands.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
