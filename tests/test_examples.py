"""Every public name has an example in its docstring, and the examples run, in the order of a first session."""

import doctest
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

import jaxinterp
from jaxinterp.methods import SkipTranscoder, Transcoder

ORDER = [
    "load", "Subject", "UserError", "sites", "select", "show", "Trace", "run", "Rules", "Add", "SetTo", "load_text",
    "fit", "Fit", "score", "replace", "save", "load_decomposition", "feature_pages", "find_features",
    "top_contexts", "logits_of", "ablation_effect", "codes_table", "generate", "try_objective",
]  # fmt: skip


def test_every_public_name_has_an_example():
    classes_of_values = {"EXACT": "Rules", "RELEVANCE": "Rules"}
    assert sorted({classes_of_values.get(name, name) for name in jaxinterp.__all__}) == sorted(ORDER)
    for name in ORDER:
        assert "Example:\n  " in (inspect.getdoc(getattr(jaxinterp, name)) or ""), name


@pytest.mark.slow
def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {name: getattr(jaxinterp, name) for name in jaxinterp.__all__}
    names |= {"jnp": jnp, "np": np, "Transcoder": Transcoder, "tokens": np.arange(8)[None]}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for name in ORDER:
        source = inspect.getdoc(names[name]) or ""
        test = doctest.DocTestParser().get_doctest(source, names, name, None, None)
        runner.run(test, clear_globs=False)
        names.update(test.globs)
    assert runner.summarize(verbose=False).failed == 0 and runner.tries > 20


def test_help_shows_hyperparameters_with_their_defaults():
    assert "k (default 32): Active features per token" in " ".join((SkipTranscoder.__doc__ or "").split())
    assert "features" in (SkipTranscoder.__doc__ or "") and "learning_rate (default" in (SkipTranscoder.__doc__ or "")
