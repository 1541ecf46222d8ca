"""The sparse top-k core: select, encode, decode and their backward passes.

Four forward-only pieces (`pieces.py`), each run as it is on one device or under `shard_map` on a mesh (`sharded.py`),
and two differentiable functions made of them (`topk.py`). Nothing here builds a `tokens x features` or a
`tokens x k x d` array for the whole batch.
"""

from jaxinterp.kernels.threshold import kth_largest
from jaxinterp.kernels.topk import encode_topk, sparse_decode

__all__ = ["encode_topk", "kth_largest", "sparse_decode"]
