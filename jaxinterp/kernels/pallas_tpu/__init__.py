"""The sparse passes as Pallas kernels for TPUs; forward only, on one device.

    encode       the encoder and the selection of its k largest outputs, fused; exact
    gather       gather_sum and sampled_dot: selected rows move from HBM one by one, many at a time
    outer        outer_sum, alone or with the sums of the values: entries sorted by feature, each row written once

Every function takes `interpret`: True runs it anywhere with the semantics of JAX, `pltpu.InterpretParams()` with those
of a TPU (copies that arrive late, memory that is not initialised).
"""

from jaxinterp.kernels.pallas_tpu.encode import encode
from jaxinterp.kernels.pallas_tpu.encode import refusal as encode_refusal
from jaxinterp.kernels.pallas_tpu.gather import gather_sum, sampled_dot
from jaxinterp.kernels.pallas_tpu.outer import BLOCK, CHUNK, order, outer_and_value_sum, outer_sum

__all__ = ["encode", "gather_sum", "order", "outer_and_value_sum", "outer_sum", "refusal", "sampled_dot"]

MOST_K = 1024
MOST_WIDTH = 8192
MOST_FEATURES = 2**24 - 1  # features pass through float32 on their way from lanes to sublanes
MOST_STEPS = 2**16  # of outer_sum: their chunks and blocks lie in the small scalar memory


def refusal(of: str, *, tokens: int, features: int, k: int, width: int, itemsize: int = 4) -> str | None:
    """Why a pass cannot run at a shape; None where it can."""
    if of == "encode":
        return encode_refusal(of, tokens=tokens, features=features, k=k, width=width, itemsize=itemsize)
    if of not in __all__:
        return None
    if k > MOST_K:
        return f"k={k} rows per token are above {MOST_K}: take 'dense'."
    if width > MOST_WIDTH:
        return f"rows of {width} numbers are above {MOST_WIDTH}, and do not fit the memory of a core: take 'xla'."
    if of.startswith("outer") and features > MOST_FEATURES:
        return f"features={features} are above {MOST_FEATURES}: spread them over a mesh axis `feature`, or take 'xla'."
    if of.startswith("outer") and tokens * k // CHUNK + features // BLOCK > MOST_STEPS:
        return f"{tokens} tokens with k={k} and {features} features need too many steps: take fewer tokens, or 'xla'."
    return None
