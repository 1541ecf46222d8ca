"""Imports point one way, importing starts nothing, and each tool has one home. Invariants 14, 15 and 16."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
ORDER = (
    "core", "errors", "storage", "kernels", "models", "data", "decompositions", "objectives", "methods",
    "training", "evaluation", "causal", "interchange", "report", "preflight", "explore", "commands", "jaxinterp",
    "__main__", "experiments",
)  # fmt: skip
"""Each may import from itself and from what stands before it; `jaxinterp` is the front of the package."""

SOURCES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path.read_text()
    for folder in ("jaxinterp", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


class Import(NamedTuple):
    """`full`: what is imported; `local`: the name that it binds; `bound`: what that name stands for."""

    full: str
    local: str
    bound: str


parsed = cache(ast.parse)


def imports(source):
    """Everything that a source imports, inside functions too."""
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield Import(alias.name, alias.asname or first, alias.name if alias.asname else first)
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(full, alias.asname or alias.name, full)


def part(name):
    """The part of the project that a dotted name belongs to; None where it belongs to another project."""
    first, *rest = name.split(".")
    if first == "jaxinterp" and rest and f"jaxinterp.{rest[0]}" in SOURCES:
        return rest[0]
    return first if first in ("jaxinterp", "experiments") else None


def arrows_back(sources):
    """What imports something that stands behind it, in words."""
    pairs = [(module, item.full) for module, source in sources.items() for item in imports(source)]
    return [
        f"{module} imports {name}"
        for module, name in pairs
        if part(name) is not None and ORDER.index(part(name)) > ORDER.index(part(module))
    ]


@cache
def uses(source):
    """Every dotted name that a source imports or reads, as (full name, whether it is called)."""
    return tuple(_uses(source))


def _uses(source):
    tree, bound = parsed(source), {item.local: item.bound for item in imports(source)}
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        attributes, inner = [], node
        while isinstance(inner, ast.Attribute):
            attributes.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in bound:
            yield ".".join([bound[inner.id], *reversed(attributes)]), id(node) in called
    yield from ((item.full, False) for item in imports(source))


def uses_shard_map(source):
    return any(name.startswith("jax.") and name.endswith(("shard_map", ".pmap")) for name, _ in uses(source))


def uses_orbax(source):
    return any(name.partition(".")[0] == "orbax" for name, _ in uses(source))


def builds_a_mesh(source):
    """A mesh may be named in an annotation anywhere; made it is in one file."""
    makers = ("make_mesh", "create_device_mesh")
    return any(
        name.startswith("jax.") and (name.endswith(makers) or (called and name.endswith("Mesh")))
        for name, called in uses(source)
    )


def test_imports_point_only_forwards():
    """Invariant 14."""
    assert len(SOURCES) > 50
    assert {part(module) for module in SOURCES} <= set(ORDER), "a part of the package has no place in ORDER"
    assert arrows_back(SOURCES) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("jaxinterp.models.made_up", "from jaxinterp.data.windows import batches"),
        ("jaxinterp.kernels.made_up", "def late():\n    import jaxinterp.models.sites as sites"),
        ("jaxinterp.core.errors", "from jaxinterp.kernels import api"),
        ("jaxinterp.report.made_up", "from jaxinterp import load"),
        ("jaxinterp.methods.made_up", "import experiments.command"),
    ],
)
def test_an_arrow_back_would_be_found(module, source):
    assert len(arrows_back({module: source})) == 1
    assert arrows_back({"experiments.made_up": source}) == []


@pytest.mark.parametrize(
    ("uses_it", "home", "made_up"),
    [
        (
            uses_shard_map,
            "jaxinterp.kernels.sharded",
            "from functools import partial\nimport jax\npartial(jax.shard_map)",
        ),
        (uses_shard_map, "jaxinterp.kernels.sharded", "from jax.experimental.shard_map import shard_map as spread"),
        (uses_orbax, "jaxinterp.storage", "import orbax.checkpoint as ocp"),
        (builds_a_mesh, "jaxinterp.training.mesh", "from jax.sharding import Mesh as Grid\ngrid = Grid(devices, axes)"),
        (builds_a_mesh, "jaxinterp.training.mesh", "import jax as j\nmesh = j.make_mesh((1,), ('data',))"),
    ],
)
def test_shard_map_orbax_and_the_mesh_have_one_home_each(uses_it, home, made_up):
    """Invariant 15."""
    found = [module for module, source in SOURCES.items() if uses_it(source)]
    assert found and all(f"{module}.".startswith(f"{home}.") for module in found)
    assert uses_it(made_up), "the search would not have found it"
    assert not uses_it("from jax.sharding import Mesh\n\ndef step(mesh: Mesh) -> None: ...")


STARTED_NOTHING = """
import jax
assert jax.sharding.get_abstract_mesh().empty
jax.config.update("jax_num_cpu_devices", 3)  # refused once a backend has been started
assert len(jax.devices()) == 3
"""


@pytest.mark.parametrize("also", ["", "import jax.numpy as jnp; jnp.zeros(1)"])
def test_importing_everything_starts_no_backend_and_sets_no_mesh(also):
    """Invariant 16: whoever imports can still choose platform and devices."""
    program = "\n".join([*(f"import {module}" for module in SOURCES), also, STARTED_NOTHING])
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    if also:
        assert done.returncode and "before backends are initialized" in done.stderr, "the check would not have noticed"
    else:
        assert done.returncode == 0, done.stderr


def test_test_modules_import_from_helpers_and_not_from_each_other():
    found = [
        f"{path.relative_to(ROOT)}: {one.full}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for one in imports(path.read_text())
        if one.full.startswith("tests.") and any(part.startswith("test_") for part in one.full.split("."))
    ]
    assert found == []
