"""The one reader of a program's text: its arrays, their sizes, its exchanges, its sorts. HLO, and StableHLO's arrays.

An array type is text as HLO writes it: `f32[8,128]`. `preflight.hlo` adds up what a step does; tests and
benchmarks look for an array that must not exist, or count exchanges.
"""

import math
import re

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
"""Collectives, by HLO's names."""

ARRAY = r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\]"


def arrays(text: str) -> list[str]:
    """Every array type with axes that a text names, once, in order: `["f32[8,128]", ...]`."""
    found = {f"{kind}[{axes}]": None for kind, axes in re.findall(ARRAY, text) if axes}
    for axes, kind in re.findall(r"tensor<((?:\d+x)+)([a-z]\w*)", text):  # StableHLO
        found[f"{kind}[{axes.rstrip('x').replace('x', ',')}]"] = None
    return list(found)


def shape_of(array: str) -> tuple[int, ...]:
    """The axes of an array type."""
    return tuple(int(axis) for axis in array[:-1].partition("[")[2].split(",") if axis)


def numbers_of(array: str) -> int:
    """How many numbers an array type holds."""
    return math.prod(shape_of(array))


def size_of(text: str) -> int:
    """Bytes of all array types in a piece of HLO, as often as they are named: `(f32[8,128]{1,0}, s32[8])`."""
    return sum(_bytes(kind) * numbers_of(f"{kind}[{axes}]") for kind, axes in re.findall(ARRAY, text))


def exchanges(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """Every collective of a compiled text: its kind, and the array types of its results.

    The two halves of an asynchronous collective count once; its start returns the operands as well, which are left out.
    """
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match:
            results = [f"{kind}[{axes}]" for kind, axes in re.findall(ARRAY, match[1])]
            found.append((match[2], tuple(results[len(results) // 2 :] if match[3] else results)))
    return found


def sorts(text: str) -> list[tuple[int, ...]]:
    """The axes of what every sort of a compiled text returns first."""
    return [shape_of(arrays(line)[0]) for line in text.splitlines() if re.search(r"= .* sort\(", line)]


def _bytes(kind: str) -> int:
    """Of a number; a boolean takes one."""
    bits = re.search(r"\d+", kind)
    return max(1, int(bits[0]) // 8) if bits else 1
