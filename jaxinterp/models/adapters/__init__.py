"""Models that were written with other libraries, under the names of our own.

    from_penzai(model)                          a model built with Penzai's layers
    from_nnx(model, places)                     a Flax NNX model
    from_linen(module, variables, places)       a Flax Linen model

Each gives a callable pytree with the leaves `blocks/3/mlp`, to be used wherever a model is taken. `to_penzai` goes the
other way; `read_flax` and `fill_nnx` read Flax checkpoints.
"""

from jaxinterp.models.adapters.flax_files import fill_nnx, read_flax
from jaxinterp.models.adapters.flax_places import Places
from jaxinterp.models.adapters.linen_model import from_linen
from jaxinterp.models.adapters.nnx_model import from_nnx
from jaxinterp.models.adapters.penzai_model import from_penzai
from jaxinterp.models.adapters.penzai_weights import to_penzai

__all__ = ["Places", "fill_nnx", "from_linen", "from_nnx", "from_penzai", "read_flax", "to_penzai"]
