"""Before jax is imported: eight virtual CPU devices, one cache of compiled programs, annotations checked at run time.

The cache lies in build/programs (or where JAX_COMPILATION_CACHE_DIR says) and serves both workers, subprocesses of
tests and later runs: two thirds of the suite's time is compiling.
"""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "programs"))
os.environ.setdefault("JAXINTERP_CACHE", str(Path(__file__).parents[1] / "build" / "kept"))  # not the user's own
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from jaxtyping import install_import_hook

from tests.annotations import check_closures_at_first

check_closures_at_first()
install_import_hook("jaxinterp", "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from tests.accounting import (  # noqa: E402, F401
    pytest_runtest_logstart,
    pytest_runtest_makereport,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

gc.set_threshold(50_000, 20, 20)  # tracing makes many objects that live: to look at them often took a tenth of a run

hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is slow, and no test is timed
hypothesis.settings.load_profile("suite")

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
