"""jaxinterp: take any MLP of any transformer apart, by any published method, and score them all alike.

subject = load("smollm2-135m")
train, heldout = load_text("docs", subject.tokenizer)
result = fit(Transcoder(features=4608, k=32), subject, train, site="blocks/1/mlp", steps=400)
print(score(result.decomposition, subject, heldout))

`import jaxinterp` imports next to nothing: each name comes from its module when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jaxinterp.core.errors import UserError
from jaxinterp.core.version import VERSION

if TYPE_CHECKING:
    from jaxinterp.data.text.load_text import load_text
    from jaxinterp.decompositions.saved import load_decomposition, save
    from jaxinterp.evaluation.features.ablation import ablation_effect
    from jaxinterp.evaluation.scoreboard import score
    from jaxinterp.evaluation.trial import try_objective
    from jaxinterp.models.edits import Add, SetTo
    from jaxinterp.models.generate import generate
    from jaxinterp.models.load import Subject, load
    from jaxinterp.models.rules import EXACT, RELEVANCE, Rules
    from jaxinterp.models.run import Trace, run
    from jaxinterp.models.sites import replace, select, sites
    from jaxinterp.models.view import show
    from jaxinterp.report.features import feature_pages
    from jaxinterp.report.questions import codes_table, find_features, logits_of, top_contexts
    from jaxinterp.training.fit import Fit, fit

__version__ = VERSION

__all__ = [
    "EXACT",
    "RELEVANCE",
    "Add",
    "Fit",
    "Rules",
    "SetTo",
    "Subject",
    "Trace",
    "UserError",
    "ablation_effect",
    "codes_table",
    "feature_pages",
    "find_features",
    "fit",
    "generate",
    "load",
    "load_decomposition",
    "load_text",
    "logits_of",
    "replace",
    "run",
    "save",
    "score",
    "select",
    "show",
    "sites",
    "top_contexts",
    "try_objective",
]

HOMES = {
    "jaxinterp.data.text.load_text": ("load_text",),
    "jaxinterp.decompositions.saved": (
        "load_decomposition",
        "save",
    ),
    "jaxinterp.evaluation.features.ablation": ("ablation_effect",),
    "jaxinterp.evaluation.scoreboard": ("score",),
    "jaxinterp.evaluation.trial": ("try_objective",),
    "jaxinterp.models.generate": ("generate",),
    "jaxinterp.models.load": (
        "Subject",
        "load",
    ),
    "jaxinterp.models.rules": (
        "EXACT",
        "RELEVANCE",
        "Rules",
    ),
    "jaxinterp.models.edits": ("Add", "SetTo"),
    "jaxinterp.models.run": ("Trace", "run"),
    "jaxinterp.models.sites": (
        "replace",
        "select",
        "sites",
    ),
    "jaxinterp.models.view": ("show",),
    "jaxinterp.report.features": ("feature_pages",),
    "jaxinterp.report.questions": (
        "codes_table",
        "find_features",
        "logits_of",
        "top_contexts",
    ),
    "jaxinterp.training.fit": (
        "Fit",
        "fit",
    ),
}
"""Module -> the names that come from it; the imports above say the same to type checkers."""

ROOMS = (
    "core", "storage", "kernels", "models", "data", "decompositions", "objectives", "methods", "training", "evaluation",
    "causal", "interchange", "report", "preflight", "explore", "commands",
)  # fmt: skip
"""Parts of the package that `jaxinterp.methods` reaches without an import of its own."""


def __getattr__(name: str) -> Any:
    for module, names in HOMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(module), name)
            return value
    if name in ROOMS:
        return import_module(f"jaxinterp.{name}")
    raise AttributeError(f"module 'jaxinterp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *ROOMS])
