"""What the benchmarks compile for: chips, shapes, the environment of the TPU compiler, a mesh."""

from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
SHAPES = ((768, 24576, 32), (2304, 65536, 64), (4096, 131072, 64))  # width, features, k
TOKENS = 8192
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
