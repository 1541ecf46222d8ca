"""Skip transcoder: a transcoder with a linear path beside the sparse one.

    y ≈ s_out (z D + b_D + x' S) + mean_out,   z = activation(x' E^T + b_E),   x' = (x - mean_in) / s_in

x [tokens, d_in]; y [tokens, d_out]; E [features, d_in], D [features, d_out], S [d_in, d_out], z [tokens, features]. The
loss is the transcoder's; nothing penalises S, which takes the part of the MLP that is linear: sparse features are a
poor way to write it.

Start: E uniform in ±1/sqrt(d_in), D = 0, S = 0, biases 0: as published, where the encoder's bias starts at minus the
mean input's pre-activation (here x is centred).

Defaults: TopK with k = 32, AuxK at 1/32, Adam at 1e-3. EleutherAI's sparsify has no AuxK by default, 32 d features, and
signum at 5e-3 / sqrt(features / 2^14), or Adam at 2e-4 / sqrt(features / 2^14).

Source: Paulo, Shabalin, Belrose 2025 (arXiv 2501.18823) and EleutherAI's sparsify.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxinterp.methods.sparse.transcoder import Transcoder


@dataclass(frozen=True)
class SkipTranscoder(Transcoder):
    """Hyperparameters of a skip transcoder."""

    SKIP: ClassVar[bool] = True
