"""One method at many settings, in one program, on one scoreboard.

Command: python -m experiments.sweep --out runs/sweep --sweep k=16,32,64        (the same as `jaxinterp sweep`)
"""

import sys

from jaxinterp.commands.main import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
