"""Several processes of one experiment on this machine.

Command: python -m experiments.launch 2 experiments.transcoder --model tiny --mesh data=2 --out runs/two
         (the same as `jaxinterp launch 2 transcoder ...`)
"""

import sys

from jaxinterp.commands.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
