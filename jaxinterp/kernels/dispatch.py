"""Which implementation runs a pass: the one asked for, or the one that a small table names for platform and shape.

    reference    dense formulas, the oracle
    xla          plain XLA: two-stage selection, chunked gathers, weight gradients by token (CPU) or by sorted blocks
    dense        the passes as chunked matmuls, where k / M is large; `encode` as in xla
    pallas_tpu   fused encoder and selection, row DMA, sorted weight gradients; TPU only
    pallas_gpu   gathers and CSC weight gradients; CUDA only, through Pallas' Triton backend; `encode` as in xla

`name:interpret` runs a Pallas implementation anywhere, slowly: for tests.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.kernels import platforms, xla

NAMES = ("reference", "xla", "dense", "pallas_tpu", "pallas_gpu")

BREAK_EVEN = {"cpu": 1 / 40, "gpu": 1 / 184, "tpu": 1 / 240}
"""k / M above which a dense pass is faster. cpu: measured (benchmarks/topk.py: a sparse pass at k 32 of 12,288 takes
.08 to .10 of a matmul). gpu, tpu: bytes / operations per second of an H200 and a v5e, computed and not measured."""

FUSED_FROM = 2**26
"""Pre-activations (tokens x features) from which the fused TPU encoder is taken; computed, not measured."""

_log = logging.getLogger("jaxinterp.kernels")


def find(name: str | None, of: str, **shape: int) -> Callable[..., Any]:
    """The function that runs pass `of`; shape: tokens, features, k, width, and itemsize: bytes of an entry of the rows.

    Raises:
      UserError: `name` is unknown, or cannot run on this platform, with the installed jax or at this shape.
    """
    platform = platforms.current()
    chosen = name or choose(of, platform, **shape)
    base, _, mode = chosen.partition(":")
    if base not in NAMES or mode not in (("", "interpret") if base.startswith("pallas") else ("",)):
        raise UserError(f"implementation={name!r} is not known: {suggest(base, NAMES)}")
    reason = refusal(chosen, of, platform, **shape)
    if reason:
        raise UserError(f"implementation={name!r} cannot run {of}: {reason}")
    function = getattr(_module(base), of, None)
    if function is None and of == "outer_and_value_sum":
        wider = shape | {"width": shape["width"] + xla.LANES}
        return partial(xla.outer_and_value_sum, outer_sum=find(chosen, "outer_sum", **wider))
    function = function or getattr(xla, of)
    own = function.__module__.startswith(_module(base).__name__)
    return partial(function, interpret=True) if mode and own else function


@cache
def choose(of: str, platform: str, **shape: int) -> str:
    """The name of the implementation for a pass and a shape; says so once, to the logger `jaxinterp.kernels`."""
    kernels = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(platform)
    if of == "encode":
        wanted = "pallas_tpu" if platform == "tpu" and shape["tokens"] * shape["features"] >= FUSED_FROM else "xla"
    elif shape["k"] / shape["features"] > BREAK_EVEN.get(platform, 1):
        wanted = "dense"
    else:
        wanted = kernels or "xla"
    reason = refusal(wanted, of, platform, **shape)
    chosen = "xla" if reason else wanted
    said = ", ".join(f"{name} {size}" for name, size in shape.items())
    _log.info("%s on %s (%s): %s%s", of, platform, said, chosen, f", because {wanted}: {reason}" if reason else "")
    return chosen


def refusal(chosen: str, of: str, platform: str, **shape: int) -> str | None:
    """Why an implementation cannot run a pass; None where it can."""
    base, _, mode = chosen.partition(":")
    if not base.startswith("pallas"):
        return None
    needed = base.removeprefix("pallas_")
    if platform != needed and not mode:
        return (
            f"it needs a {needed.upper()}, and this is a {platform.upper()}: leave implementation out, or take 'xla'."
        )
    return _module(base).refusal(of, **shape)


def _module(name: str) -> Any:
    return import_module(f"jaxinterp.kernels.{name}")
