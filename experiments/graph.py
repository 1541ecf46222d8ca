"""From a prompt to an attribution graph that opens in a browser: `jaxinterp graph`, which explains it.

Command: python -m experiments.graph --prompt "the end of the" --out runs/graph
"""

import sys

from jaxinterp.commands.main import main

if __name__ == "__main__":
    main(["graph", *sys.argv[1:]])
