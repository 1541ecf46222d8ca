"""jaxinterp: take any MLP of any transformer apart, by any published method, and score them all alike.

subject = load("smollm2-135m")
train, heldout = load_text("docs", subject.tokenizer)
result = fit(Transcoder(features=4608, k=32), subject, train, site="blocks/1/mlp", steps=400)
print(score(result.decomposition, subject, heldout))
"""

from jaxinterp.core.errors import UserError
from jaxinterp.data.text.load_text import load_text
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.models.load import Subject, load
from jaxinterp.models.rules import EXACT, RELEVANCE, Rules
from jaxinterp.models.sites import Add, SetTo, Trace, replace, run, select, sites
from jaxinterp.models.view import show
from jaxinterp.training.fit import Fit, fit

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
    "fit",
    "load",
    "load_text",
    "replace",
    "run",
    "score",
    "select",
    "show",
    "sites",
]
