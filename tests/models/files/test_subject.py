"""Our own form on disk: back bit for bit; damaged or foreign descriptions are refused; nothing is overwritten."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.load import Subject, load, save_subject
from jaxinterp.models.transformer import initialise
from tests.models.model_files import GOLDENS, LLAMA, assert_same_leaves


@pytest.mark.parametrize("name", ["gpt2-untied", "llama-llama3", "qwen3-bias", "gemma2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_form_round_trip(name: str, dtype: str, tmp_path: Path) -> None:
    """Invariant 7."""
    subject = Subject(load(GOLDENS / name, dtype=dtype).model, None, name)
    save_subject(subject, tmp_path / "own")
    again = load(tmp_path / "own", dtype=dtype)
    assert_same_leaves(again.model, subject.model)
    assert (again.tokenizer, again.name, again.model.config) == (None, name, subject.model.config)


def test_own_form_keeps_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = dataclasses.replace(byte_tokenizer(), begin=7)
    save_subject(Subject(initialise(LLAMA, jax.random.key(0)), tokenizer, "bytes"), tmp_path / "own")
    again = load(tmp_path / "own").tokenizer
    assert again is not None
    assert (again.begin, again.end, again.special, again.pieces) == (7, 256, {256}, "bytes")
    assert again.encode("é <|endoftext|>") == tokenizer.encode("é <|endoftext|>")


def test_own_form_destroys_nothing(tmp_path: Path) -> None:
    subject = load(GOLDENS / "llama")
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty: nothing is overwritten"):
        save_subject(subject, tmp_path)
    with pytest.raises(UserError, match=r"notes\.txt is not empty"):
        save_subject(subject, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_with_a_replaced_leaf_is_not_saved(tmp_path: Path) -> None:
    subject = load(GOLDENS / "llama")
    replaced = eqx.tree_at(lambda model: model.blocks[1].mlp, subject.model, eqx.nn.Identity())
    with pytest.raises(UserError, match="leaf 'blocks/1/mlp/gate_proj/weight' is not what the model's configuration"):
        save_subject(dataclasses.replace(subject, model=replaced), tmp_path / "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, r"version=3 is not supported; supported: 2"),
        ({"version": 1}, r"version=1 names projections 'mlp/up' and 'attn/out', this version 'mlp/up_proj'"),
        ({"name": None}, r"config should be an object and name a string"),
        ({"config": {"d_modl": 4}}, r"config has an unknown field d_modl=4\. Did you mean 'd_model'"),
        ({"config": {}}, r"config field vocab_size is missing"),
        ({"config": {"layers": "2"}}, r"config field layers='2' is not supported; expected: int"),
        ({"config": {"norm": "batch"}}, r"config field norm='batch' is not supported; expected: 'rms', 'layer'"),
        ({"config": {"windows": [4, "x"]}}, r"config field windows='x'"),
        ({"config": {"rotary_scaling": {"kind": "ntk"}}}, r"rotary_scaling field kind='ntk'"),
    ],
)
def test_own_form_with_a_bad_description_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_subject(load(GOLDENS / "llama"), tmp_path / "own")
    path = tmp_path / "own" / "jaxinterp.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        load(tmp_path / "own")
