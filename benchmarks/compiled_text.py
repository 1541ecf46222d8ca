"""What compiled programs share: chips and shapes that are compiled for, and what the text of a program says."""

import re
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHAPES = ((768, 24576, 32), (2304, 65536, 64), (4096, 131072, 64))  # width, features, k
TOKENS = 8192
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
ENVIRONMENT = {  # keeps libtpu from asking a cloud for its TPU
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so that two compilers do not get in each other's way
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def mesh(devices: Any, data: int, feature: int) -> Any:
    import jax
    import numpy as np

    types = (jax.sharding.AxisType.Auto,) * 2
    return jax.sharding.Mesh(np.array(devices).reshape(data, feature), ("data", "feature"), axis_types=types)


def arrays(text: str) -> set[str]:
    """Every array type of a compiled text."""
    return {f"{kind}[{sizes}]" for kind, sizes in re.findall(r"\b(pred|bf16|[fsu]\d+)\[([\d,]+)\]", text)}


def size(array: str) -> tuple[int, int]:
    """Numbers and bytes of an array type."""
    kind, sizes = array[:-1].split("[")
    numbers = 1
    for part in sizes.split(","):
        numbers *= int(part)
    return numbers, numbers * BYTES.get(kind, 8)


def collectives(text: str) -> list[tuple[str, int]]:
    """Every collective with the bytes of its result; the two halves of an asynchronous one count once."""
    found = []
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line)
        if match:
            results = re.findall(r"\b(?:pred|bf16|[fsu]\d+)\[[\d,]+\]", match[1])
            results = results[len(results) // 2 :] if match[3] else results  # a start returns its operands as well
            found.append((match[2], sum(size(array)[1] for array in results)))
    return found


def sorted_lengths(text: str) -> set[int]:
    """How many numbers each sort, or `top_k`, of a program puts in order."""
    found = set()
    for line in text.splitlines():
        match = re.search(r"= \(?\w+\[([\d,]+)\].*? sort\(.*dimensions=\{(\d+)\}", line)
        if match:
            found.add(int(match[1].split(",")[int(match[2])]))
        match = re.search(r" topk\(\w+\[([\d,]+)\]| topk\(.*?\), k=|custom_call_target=\"(?:TopK|__gpu\$TopK)\"", line)
        if match:
            operands = re.findall(r"\w+\[([\d,]+)\]", line)
            found.add(max(int(sizes.split(",")[-1]) for sizes in operands))
    return found
