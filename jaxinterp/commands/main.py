"""`jaxinterp`: the command line. `python -m jaxinterp` is the same.

jaxinterp transcoder --out runs/demo             train a method, score it, write a report; the other methods likewise
jaxinterp train --method gated --out runs/gated  the same with the method as an option
jaxinterp sweep --out runs/k --sweep k=16,32     many settings in one program
jaxinterp explore runs/demo                      its features in a browser: search, your own text, steering, labels
jaxinterp graph --prompt "the end of the"        an attribution graph, to click through; trains the transcoders it needs
jaxinterp preflight v5e:2x2 --model tiny         compile for hardware that is not here: does it fit, how long is a step
jaxinterp launch 2 transcoder --out runs/two     several processes on this machine
"""

import sys
import textwrap
from collections.abc import Callable, Sequence

from jaxinterp.core.errors import suggest
from jaxinterp.core.version import VERSION


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for, and exit: 0, 2 for a mistake in it, 75 for a run that was asked to stop."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0].replace("-", "_") if words else "--help"
    if name == "__version":
        print(f"jaxinterp {VERSION}")
        sys.exit(0)
    if name in COMMANDS:
        COMMANDS[name](words[1:])
        return
    from jaxinterp.commands.methods import CLASSES

    if name in CLASSES:
        _train(["--method", name, *words[1:]], name)
        return
    if name in ("__help", "_h", "--help"):
        names = textwrap.fill(", ".join(CLASSES), 100, initial_indent="methods: ", subsequent_indent="         ")
        print(f"{(__doc__ or '').strip()}\n\n{names}\nEach takes --help. jaxinterp {VERSION}.")
        sys.exit(0)
    known = [*COMMANDS, *CLASSES]
    print(f"error: no command {words[0]!r}; commands: {', '.join(known)}.{suggest(name, known)}", file=sys.stderr)
    sys.exit(2)


def _train(words: list[str], name: str = "train") -> None:
    from jaxinterp.commands import train
    from jaxinterp.commands.methods import CLASSES, described
    from jaxinterp.commands.presets import table
    from jaxinterp.commands.shell import command, value_of

    method, model = value_of(words, "method") or "skip_transcoder", value_of(words, "model") or "smollm2-135m"
    default = train.default_of(model, method) if method in CLASSES else None
    own = f"--set takes, of {method}:\n{described(method)}" if method in CLASSES else ""
    names = ", ".join(CLASSES)
    description = f"{train.__doc__}\nMethods: {names}.\n\nPresets:\n{table()}\n\n{own}"
    command(train.Config, train.main, description, words=words, default=default, name=f"jaxinterp {name}")


def _sweep(words: list[str]) -> None:
    from jaxinterp.commands import sweep
    from jaxinterp.commands.shell import command

    command(sweep.Config, sweep.main, sweep.__doc__, words=words, name="jaxinterp sweep")


def _explore(words: list[str]) -> None:
    from jaxinterp.commands import explore
    from jaxinterp.commands.shell import command

    command(explore.Config, explore.main, explore.__doc__, words=words, name="jaxinterp explore")


def _graph(words: list[str]) -> None:
    from jaxinterp.commands import graph
    from jaxinterp.commands.shell import command

    command(graph.Config, graph.main, graph.__doc__, words=words, name="jaxinterp graph")


def _preflight(words: list[str]) -> None:
    target = [] if words and not words[0].startswith("-") else ["auto"]
    _train(["--preflight", *target, *words], "preflight")


def _launch(words: list[str]) -> None:
    from jaxinterp.commands.launch import main as launch

    a_module = len(words) > 1 and "." in words[1]  # others are commands of jaxinterp; experiments.NAME is a module
    sys.exit(launch(words if a_module or len(words) < 2 else [words[0], "jaxinterp", *words[1:]]))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "sweep": _sweep,
    "explore": _explore,
    "graph": _graph,
    "preflight": _preflight,
    "launch": _launch,
}

if __name__ == "__main__":
    main()
