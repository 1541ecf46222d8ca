"""The sparse top-k core: select, encode, decode and their backward passes.

    api          the differentiable functions, and the two passes that gradients are made of
    rank         what a selection goes by: the value, its size, a threshold, another score
    threshold    one threshold for a whole batch (BatchTopK)
    sharded      the passes on a mesh: the only `shard_map`
    dispatch     which implementation runs a pass: reference, xla, dense, pallas_tpu, mosaic_gpu, pallas_gpu,
                 mosaic_gpu_fused
    certificate  what fused encoders do for tokens that they cannot vouch for
    runs         entries in the order of their features, for the weight gradients of the GPU kernels

Nothing here (but the reference) builds a `tokens x features` or a `tokens x k x d` array for the whole batch.
"""

from jaxinterp.kernels import rank
from jaxinterp.kernels.api import (
    encode_groups,
    encode_ranked,
    encode_topk,
    sampled_dot,
    select_topk,
    sparse_decode,
    sparse_outer,
    sum_by_feature,
)
from jaxinterp.kernels.platforms import as_products
from jaxinterp.kernels.threshold import keep_largest, kth_largest

__all__ = [
    "as_products",
    "encode_groups",
    "encode_ranked",
    "encode_topk",
    "keep_largest",
    "kth_largest",
    "rank",
    "sampled_dot",
    "select_topk",
    "sparse_decode",
    "sparse_outer",
    "sum_by_feature",
]
