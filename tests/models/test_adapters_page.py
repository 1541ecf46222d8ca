"""The snippets of docs/adapters.md are run as they stand."""

import re
from pathlib import Path

import flax.serialization
import grain
import numpy as np
import orbax.checkpoint as orbax
import pytest
from flax import nnx

from jaxinterp.models.adapters import to_penzai
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites
from tests.models.flax_llamas import CONFIG, LinenLlama, linen_params, nnx_llama, own_llama, random_tokens

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
SNIPPETS = dict(re.findall(r"<!-- (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def names():
    """What a reader has: a model of their own, tokens, text."""
    own = own_llama()
    tokens = np.asarray(random_tokens(3, (32, 16)))
    rows = [
        {"tokens": row, "weight": np.ones(16, np.float32), "document": np.full(16, index, np.int32)}
        for index, row in enumerate(tokens)
    ]
    text = grain.MapDataset.source(rows)
    return {
        "penzai_model": to_penzai(own),
        "nnx_model": nnx_llama(own),
        "linen_module": LinenLlama(),
        "params": linen_params(own),
        "tokens": random_tokens(),
        "train": text,
        "heldout": text,
    }


def test_every_snippet_is_run():
    assert sorted(SNIPPETS) == ["files", "linen", "nnx", "penzai"]
    assert PAGE.count("```python") == len(SNIPPETS)
    assert all(len([line for line in text.splitlines() if line]) <= 12 for text in SNIPPETS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["penzai", "nnx", "linen"])
def test_ten_lines_from_a_model_to_a_replaced_mlp(name, names, capsys):
    space = dict(names)
    exec(SNIPPETS[name], space)
    assert "fvu" in capsys.readouterr().out
    ports = ("in", "codes_pre", "codes", "out", "added")
    assert sites(space["model"], "blocks/1/mlp/*") == [f"blocks/1/mlp/{port}" for port in ports]
    assert run(space["model"], names["tokens"]).logits.shape == (*names["tokens"].shape, CONFIG.vocab_size)


def test_checkpoints_are_read(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("params.msgpack").write_bytes(flax.serialization.to_bytes({"params": names["params"]}))
    orbax.v1.save(tmp_path / "checkpoints" / "1000", nnx.to_pure_dict(nnx.state(names["nnx_model"], nnx.Param)))
    space = dict(names)
    exec(SNIPPETS["files"], space)
    linen, other = (run(space[name], names["tokens"]).logits for name in ("linen", "nnx"))
    np.testing.assert_allclose(linen, other, rtol=1e-5, atol=1e-5)
