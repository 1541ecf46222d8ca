"""Before jax is imported: eight virtual CPU devices, and every annotation of the package checked at run time."""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

from jaxtyping import install_import_hook

install_import_hook("jaxinterp", "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

LIMIT = 3 * 2**30
"""Bytes of a test process from which compiled programs are forgotten: a whole suite's take more than 10 GB."""


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """After a module, where the process has grown large (on Linux)."""
    yield
    pages = Path("/proc/self/statm")
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > LIMIT:
        jax.clear_caches()
        gc.collect()
