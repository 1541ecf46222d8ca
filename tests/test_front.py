"""The front of the package: `import jaxinterp` is light, and every public name is there when it is used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import jaxinterp

ROOT = Path(__file__).parent.parent
LATER = {
    "array_record", "flax", "gguf", "grain", "msgpack", "numpy", "optax", "orbax", "penzai", "rich", "safetensors",
    "scipy", "tokenizers", "treescope", "tyro",
}  # fmt: skip
COUNT = """
import sys
import jaxinterp
loaded = set(sys.modules)
own = sorted(name for name in loaded if name.startswith("jaxinterp."))
print(jaxinterp.__version__, len(loaded), *({name.partition(".")[0] for name in loaded}), *own)
jaxinterp.fit, jaxinterp.methods.Transcoder
from jaxinterp import *
assert sites and "jaxinterp.training.fit" in sys.modules and "optax" in sys.modules
"""


def test_import_brings_next_to_nothing_and_every_name_comes_on_first_use():
    """It costs less than `import jax`, whose modules it does not load; counted, for time is not exact."""
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, count, *names = done.stdout.split()
    assert version == jaxinterp.__version__ and int(count) < 300
    assert not LATER & set(names) and not {"jax", "jaxlib"} & set(names)
    own = {name for name in names if name.startswith("jaxinterp.")}
    assert own == {"jaxinterp.core", "jaxinterp.core.errors", "jaxinterp.core.version"}


def test_type_checkers_see_the_names_that_are_there():
    """The imports under TYPE_CHECKING, the table of homes and __all__ say the same."""
    tree = ast.parse((ROOT / "jaxinterp/__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert declared == jaxinterp.HOMES
    names = [name for each in jaxinterp.HOMES.values() for name in each]
    assert sorted([*names, "UserError"]) == sorted(jaxinterp.__all__) and len(set(names)) == len(names)
    for module, homes in jaxinterp.HOMES.items():
        for name in homes:
            assert getattr(jaxinterp, name) is getattr(importlib.import_module(module), name)
    assert set(jaxinterp.__all__) <= set(dir(jaxinterp)) and (ROOT / "jaxinterp/py.typed").exists()


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxinterp' has no attribute 'fitt'"):
        jaxinterp.fitt  # noqa: B018
    assert not hasattr(jaxinterp, "__path_of_nothing__")
