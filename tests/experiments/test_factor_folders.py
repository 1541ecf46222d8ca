"""The experiments of `factor` refuse a folder that holds files before they load or train anything."""

from importlib import import_module

import pytest

from jaxinterp.core.errors import UserError

FIRST = {
    "factor_context_update": "load",
    "factor_digits": "read_digits",
    "factor_experts": "model_inputs",
    "factor_in_context": "train",
    "factor_kinds": "read_digits",
    "factor_modular": "train",
    "factor_neuron_classes": "load",
    "factor_parameters": "load",
    "factor_recall": "load",
    "factor_semi_nmf": "load",
    "factor_small_models": "text_of",
    "factor_toy_parameters": "measured",
}
"""Experiment -> what it does first that costs something."""


@pytest.mark.parametrize("name", FIRST)
def test_a_folder_with_files_is_refused_before_anything_is_computed(name, tmp_path, monkeypatch):
    module = import_module(f"experiments.{name}")

    def spent(*_args, **_options):
        raise AssertionError("compute is spent before the folder is looked at")

    monkeypatch.setattr(module, FIRST[name], spent)
    (tmp_path / "results.json").write_text("{}")
    options = {"digits": tmp_path} if FIRST[name] == "read_digits" else {}
    with pytest.raises(UserError, match="out="):
        module.main(module.Config(out=tmp_path, **options))
