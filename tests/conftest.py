"""Before jax is imported: eight virtual CPU devices, and every annotation of the package checked at run time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from jaxtyping import install_import_hook

install_import_hook("jaxinterp", "beartype.beartype")
