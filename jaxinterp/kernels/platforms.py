"""The platform that a computation is being traced for."""

import jax


def current() -> str:
    """`cpu`, `gpu` or `tpu`: that of the current mesh, else of the default device, else of the default backend.

    The mesh may be one of described devices (a topology): a program is then traced for hardware that is not there.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.config.values["jax_default_device"]
    name = described.platform if described is not None else getattr(device, "platform", device)
    name = name or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
