"""Which implementation runs a pass: the one asked for, or the one that a small table names for platform and shape.

    reference    dense formulas, the oracle
    xla          plain XLA: selection by rounds (CPU) or in two stages, chunked gathers, weight gradients by token (CPU)
                 or by sorted blocks
    dense        the passes as chunked matmuls, where k / M is large; `encode` as in xla
    pallas_tpu   fused encoder and selection, row DMA, sorted weight gradients; TPU only
    mosaic_gpu   gathers and CSC weight gradients by the copy engine; Hopper and later; `encode` as in xla
    pallas_gpu   the same for older CUDA GPUs, through Pallas' Triton backend
    mosaic_gpu_fused  as mosaic_gpu, with the encoder and its selection fused; Hopper; only where it is asked for

`name:interpret` runs a kernel anywhere, slowly: for tests.
"""

import logging
import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

from jaxinterp.core.errors import UserError, suggest
from jaxinterp.kernels import platforms, xla

NAMES = ("reference", "xla", "dense", "pallas_tpu", "mosaic_gpu", "pallas_gpu", "mosaic_gpu_fused")
KERNELS = {"tpu": ("pallas_tpu",), "gpu": ("mosaic_gpu", "pallas_gpu")}
"""Implementations by kernels, by platform; the first that takes the shape on the device is chosen."""
FUSED = {"tpu": "pallas_tpu", "gpu": "mosaic_gpu_fused"}
"""The implementation whose `encode` never writes pre-activations, by platform."""
NEEDS = {name: platform for platform, names in KERNELS.items() for name in names} | {"mosaic_gpu_fused": "gpu"}
UNPROVEN = {"mosaic_gpu_fused": "no GPU has run it; implementation='mosaic_gpu_fused' asks for it"}
"""Kernels that are not chosen by themselves, although they may run: plain XLA selects right on every machine."""

BREAK_EVEN = {"cpu": 1 / 40, "gpu": 1 / 184, "tpu": 1 / 240}
"""k / M above which a dense pass is faster. cpu: measured (benchmarks/topk.py: a sparse pass at k 32 of 12,288 takes
.08 to .10 of a matmul). gpu, tpu: bytes / operations per second of an H200 and a v5e, computed and not measured."""

FUSED_FROM = 2**26
"""Pre-activations (tokens x features) from which a fused encoder is taken; computed, not measured."""

WITHOUT = "JAXINTERP_WITHOUT"
"""The environment variable for a machine on which kernels turn out not to work: none has run on a GPU or a TPU yet."""

_log = logging.getLogger("jaxinterp.kernels")


def find(name: str | None, of: str, **shape: int) -> Callable[..., Any]:
    """The function that runs pass `of`; shape: tokens, features, k, width, and itemsize: bytes of an entry of the rows.

    Raises:
      UserError: `name` is unknown, or cannot run on this platform, with the installed jax or at this shape.
    """
    platform = platforms.current()
    chosen = name or choose(of, platform, platforms.device_kind(), **shape)
    base, _, mode = chosen.partition(":")
    if base not in NAMES or mode not in (("", "interpret") if base in NEEDS else ("",)):
        raise UserError(f"implementation={name!r} is not known: {suggest(base, NAMES)}")
    reason = refusal(chosen, of, platform, **shape)
    if reason:
        raise UserError(f"implementation={name!r} cannot run {of}: {reason}")
    function = getattr(_module(base), of, None)
    if function is None and of == "outer_and_value_sum":
        wider = shape | {"width": shape["width"] + xla.LANES}
        return partial(xla.outer_and_value_sum, outer_sum=find(chosen, "outer_sum", **wider))
    function = function or getattr(xla, of)
    return partial(function, interpret=True) if mode and function.__module__ != xla.__name__ else function


@cache
def choose(of: str, platform: str, kind: str = "", **shape: int) -> str:
    """The name of the implementation for a pass and a shape; says so once, to the logger `jaxinterp.kernels`.

    Kernels that the environment's JAXINTERP_WITHOUT names (`mosaic_gpu,pallas_gpu`) are left out.

    kind: the device's, by which a choice is remembered: described devices of several kinds may follow one another.
    """
    wanted = KERNELS.get(platform, ())
    if of == "encode":
        large = shape["tokens"] * shape["features"] >= FUSED_FROM
        wanted = (FUSED[platform],) if large and platform in FUSED else ()
    elif shape["k"] / shape["features"] > BREAK_EVEN.get(platform, 1):
        wanted = ("dense",)
    without = os.environ.get(WITHOUT, "").split(",")
    reasons = {
        name: f"{WITHOUT} names it" if name in without else refusal(name, of, platform, **shape) or UNPROVEN.get(name)
        for name in wanted
    }
    chosen = next((name for name, reason in reasons.items() if not reason), "xla")
    said = ", ".join(f"{name} {size}" for name, size in shape.items())
    refused = "".join(f", because {name}: {reason}" for name, reason in reasons.items() if reason)
    _log.info("%s on %s (%s): %s%s", of, kind or platform, said, chosen, refused)
    return chosen


def refusal(chosen: str, of: str, platform: str, **shape: int) -> str | None:
    """Why an implementation cannot run a pass; None where it can."""
    base, _, mode = chosen.partition(":")
    if base not in NEEDS:
        return None
    needed = NEEDS[base]
    if platform != needed and not mode:
        return (
            f"it needs a {needed.upper()}, and this is a {platform.upper()}: leave implementation out, or take 'xla'."
        )
    return _module(base).refusal(of, **shape)


def _module(name: str) -> Any:
    return import_module(f"jaxinterp.kernels.{name}")
