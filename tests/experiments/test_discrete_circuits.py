"""The circuit experiment on a model whose circuit is known: four heads write, the others are silent."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from experiments.discrete_circuits import (
    NAMES,
    TEMPLATES,
    Config,
    Task,
    analyse,
    indirect_objects,
    main,
    report,
    single_effects,
)
from jaxinterp.errors import UserError
from jaxinterp.methods.discrete_codes import DiscreteCodes
from jaxinterp.models.load import load
from jaxinterp.models.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

WRITING = (1, 6, 9, 15)  # of 4 layers x 4 heads


def planted():
    """Every other head's rows of W_O are zero."""
    model = load("tiny").model
    places = lambda model: [block.attn.out.weight for block in model.blocks]
    loud = jnp.isin(jnp.arange(16), jnp.array(WRITING)).reshape(4, 4)
    return eqx.tree_at(places, model, [w * jnp.repeat(loud[i], 16)[:, None] for i, w in enumerate(places(model))])


def task(prompts=16):
    """Random bytes with one of two marks in the middle; the two answers are any two tokens."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 4, (2 * prompts, 6)).astype(np.int32)
    tokens[:prompts, 1:5], tokens[prompts:, 1:5] = 200, 100
    return Task(tokens, np.full(2 * prompts, 7), np.full(2 * prompts, 9))


def test_the_heads_that_write_are_found_and_the_page_says_so(tmp_path):
    config = Config(out=tmp_path, prompts=16, causal_prompts=8, features=32, steps=200, permutations=200, seeds=1)
    model = planted()
    effects = single_effects(model, task(), 8)
    moving = np.flatnonzero(np.abs(effects) > 1e-4)
    assert set(moving) == set(WRITING), "a silent head has no effect, a writing one has"

    results = analyse(model, task(), effects, DiscreteCodes(32, steps=200), config)
    by_head = {head["head"]: head for head in results["heads"]}
    writing = [by_head[f"{head // 4}.{head % 4}"]["z"] for head in WRITING]
    silent = [head["z"] for name, head in by_head.items() if int(name[0]) * 4 + int(name[2]) not in WRITING]
    assert min(writing) > 1 and max(np.abs(silent)) == 0
    auc = {row["score"]: row["AUC, top 10"] for row in results["auc"]}
    assert auc["codes, z; mean over positions"] > auc["codes, z, labels permuted; mean over positions"]
    none, five, _ = results["sets"]
    assert none["heads"] == 0 and five["heads"] == 5
    assert five["highest z"] == pytest.approx(five["largest causal effect"], abs=1e-4), (
        "the same four heads, and a silent one"
    )
    assert five["lowest z"] == pytest.approx(none["lowest z"], abs=1e-4), "silent heads change nothing"

    html = report(
        results | {"accuracy": 1.0, "difference": 1.0, "difference_negative": 0.0}, {"model": "m"}, tmp_path / "r.html"
    )
    assert results["sentences"][1] in html.read_text()


def test_a_model_that_has_no_such_names_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="0 of 20 names are one token: the task needs at least 6"):
        main(Config(out=tmp_path / "r", model="tiny"))
    with pytest.raises(UserError, match="causal_prompts=16 may be at most half of prompts=20"):
        main(Config(out=tmp_path / "r", prompts=20))
    with pytest.raises(UserError, match="features=0 must be at least 1"):
        main(Config(out=tmp_path / "r", features=0))
    assert not (tmp_path / "r").exists()


def words():
    """A tokenizer with a token for every word of the prompts."""
    known = " ".join([NAMES, *TEMPLATES]).replace("{first}", "").replace("{second}", "").replace("{third}", "")
    pieces = sorted({*known.replace(",", " , ").split(), "[UNK]"})
    backend = tokenizers.Tokenizer(models.WordLevel({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, None, None, frozenset(), "plain")


def test_prompts_say_what_they_should():
    """Positive: the third name is the second answer's; negative: it is one that did not occur."""
    tokenizer = words()
    prompts = indirect_objects(tokenizer, 8, seed=0)
    names = {tokenizer.encode(name)[0] for name in NAMES.split()}
    assert len(names) == 20
    for number, (tokens, answer, other) in enumerate(zip(prompts.tokens, prompts.answer, prompts.other, strict=True)):
        third = [token for token in tokens if token in names][2]
        assert list(tokens).count(answer) == 1 and list(tokens).count(other) == (2 if number < 8 else 1)
        assert (third == other) == (number < 8)
    assert len({tuple(tokens) for tokens in prompts.tokens}) == 16
