"""The platform that a computation is being traced for, and the precision of its products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def current() -> str:
    """`cpu`, `gpu` or `tpu`: that of the current mesh, else of the default device, else of the default backend.

    The mesh may be one of described devices (a topology): a program is then traced for hardware that is not there.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.config.values["jax_default_device"]
    name = described.platform if described is not None else getattr(device, "platform", device)
    name = name or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """Of the current mesh's devices, described or here; else of the default backend's; such as `NVIDIA H200`."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described is not None else jax.devices()[0].device_kind


def precision(*operands: Array) -> jax.lax.Precision | None:
    """That of float32 products where the operands are float32: without it a GPU rounds them to TF32, a TPU to bfloat16.

    None, which leaves it to the configuration, where one operand is narrower or `jax_default_matmul_precision` is set.
    """
    wide = all(operand.dtype == jnp.float32 for operand in operands)
    return jax.lax.Precision.HIGHEST if wide and jax.config.jax_default_matmul_precision is None else None  # type: ignore[attr-defined]


def as_products(array: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array as it is multiplied by what has the precision of x: in bfloat16 where x is bfloat16."""
    return array.astype(jnp.bfloat16) if x.dtype == jnp.bfloat16 else array
