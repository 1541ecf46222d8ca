"""No method inherits from another: they share functions, and dataclasses of fields without behaviour."""

import ast
import inspect
import re
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

import jaxinterp
from jaxinterp.methods import SparseAutoencoder
from jaxinterp.methods.listed import METHODS
from jaxinterp.methods.sparse.dictionary import DictionaryFields, TrainingFields

FOLDER = Path(jaxinterp.__file__).parent
WALKED = [path for room in ("methods", "training") for path in sorted((FOLDER / room).rglob("*.py"))]


def classes():
    """Every class of these rooms, by its full name."""
    for path in WALKED:
        module = import_module(
            ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts).removesuffix(".__init__")
        )
        for name, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ == module.__name__:
                yield f"{module.__name__}.{name}", kind


def behaves(kind):
    """Whether a class of the package has a method of its own: anything written but fields and their documentation."""
    tree = ast.parse(inspect.getsource(kind).lstrip())
    return any(isinstance(node, ast.FunctionDef) for node in tree.body[0].body)


def inherited(kind):
    """The concrete classes of this package that a class inherits from."""
    bases = [base for base in kind.__mro__[1:] if base.__module__.startswith("jaxinterp.") and is_dataclass(base)]
    return [base.__name__ for base in bases if behaves(base)]


def test_no_method_inherits_from_a_concrete_class():
    found = dict(classes())
    assert len(found) > 40 and "jaxinterp.methods.sparse.gated.GatedSparseAutoencoder" in found
    assert {name: inherited(kind) for name, kind in found.items() if inherited(kind)} == {}


def test_one_that_did_would_be_found():
    class Overrides(SparseAutoencoder):
        pass

    assert inherited(Overrides) == ["SparseAutoencoder"]
    assert not behaves(TrainingFields) and not behaves(DictionaryFields)


@pytest.mark.parametrize("room", ["objectives", "methods", "training", "evaluation"])
def test_nothing_asks_what_an_object_happens_to_have(room):
    """Terms, methods and scores name the protocol that they need. A line that must ask says why in a comment."""
    asked = [
        f"{path.name}:{number}: {line.strip()}"
        for path in sorted((FOLDER / room).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if ("hasattr(" in line or "getattr(" in line) and "#" not in line
    ]
    assert asked == []


def test_every_method_is_listed_once():
    """What has `needs` and `recipe` is in `listed.METHODS`, but for those made of others and rivals in tests."""
    made_of_others = {"PerLayerTranscoders", "Resampling", "Seeds", "Together"}
    models = {
        "LanguageModel",
        "MixtureLanguageModel",
        "SparseLanguageModel",
        "BlockSparseLanguageModel",
        "LowRankAdapters",
    }
    others = models | {"DenseRival", "Method"}
    found = {kind.__name__ for _, kind in classes() if {"needs", "recipe"} <= set(vars(kind))}
    listed = [one.method.__name__ for one in METHODS.values()]
    assert len(listed) == len(set(listed)) and set(listed) == found - made_of_others - others


ANY = re.compile(r"\bAny\b")


def test_any_is_rare_and_absent_from_the_vocabulary():
    """At most 15 in 1,000 lines of the package, none in core/: what people implement has a type."""
    sources = {path: path.read_text() for path in sorted(FOLDER.rglob("*.py"))}
    lines = sum(source.count("\n") for source in sources.values())
    found = {path: len(ANY.findall(source)) for path, source in sources.items()}
    assert {path.name: count for path, count in found.items() if count and path.parent.name == "core"} == {}
    assert 1000 * sum(found.values()) / lines <= 15, sorted(found.items(), key=lambda each: -each[1])[:5]
