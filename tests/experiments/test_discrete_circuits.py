"""The circuit experiment on a model whose circuit is known: four heads write, the others are silent."""

from dataclasses import replace

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from experiments import discrete_circuits
from experiments.discrete_circuits import Config, analyse, main, report, sentences
from experiments.indirect_objects import NAMES, TEMPLATES, Task, indirect_objects, single_effects
from jaxinterp.core.errors import UserError
from jaxinterp.methods.sparse.discrete_codes import DiscreteCodes
from jaxinterp.models.files.tokenizer import Tokenizer
from jaxinterp.models.load import load

WRITING = (1, 6, 9, 15)  # of 4 layers x 4 heads


def planted():
    """Every other head's rows of W_O are zero."""
    model = load("tiny").model
    places = lambda model: [block.attn.o_proj.weight for block in model.blocks]
    loud = jnp.isin(jnp.arange(16), jnp.array(WRITING)).reshape(4, 4)
    return eqx.tree_at(places, model, [w * jnp.repeat(loud[i], 16)[:, None] for i, w in enumerate(places(model))])


def task(prompts=16):
    """Random bytes with one of two marks in the middle; the two answers are any two tokens."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 4, (2 * prompts, 6)).astype(np.int32)
    tokens[:prompts, 1:5], tokens[prompts:, 1:5] = 200, 100
    return Task(tokens, np.full(2 * prompts, 7), np.full(2 * prompts, 9))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_model_that_has_no_such_names_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="0 of 20 names are one token: the task needs at least 6"):
        main(Config(out=tmp_path / "r", model="tiny"))
    with pytest.raises(UserError, match="causal_prompts=16 may be at most half of prompts=20"):
        main(Config(out=tmp_path / "r", prompts=20))
    with pytest.raises(UserError, match="permutations=1 must be at least 2"):
        main(Config(out=tmp_path / "r", permutations=1))
    with pytest.raises(UserError, match="prompts=4 of either kind are too few: codes are trained on 10"):
        main(Config(out=tmp_path / "r", prompts=4, causal_prompts=2))
    with pytest.raises(UserError, match="features=0 must be at least 1"):
        main(Config(out=tmp_path / "r", features=0))
    assert not (tmp_path / "r").exists()


def test_a_model_with_too_few_heads_is_refused(tmp_path, monkeypatch):
    tiny = load("tiny")
    small = replace(tiny, model=eqx.tree_at(lambda model: model.blocks, tiny.model, tiny.model.blocks[:2]))
    monkeypatch.setattr(discrete_circuits, "load", lambda model: small)
    with pytest.raises(UserError, match="has 8 heads: a circuit of 10 needs more"):
        main(Config(out=tmp_path / "r", model="two blocks"))
    assert not (tmp_path / "r").exists()


def numbers(z, *, untrained=0.5, permuted=0.5, rival=0.9, highest=1.0, lowest=5.0, random=4.0):
    scores = {"codes, z": z, "codes, z, labels permuted": permuted, "codes, z, dictionary not trained": untrained}
    scores["distance of means"] = rival
    auc = [{"score": f"{name}; mean over positions", "AUC, top 10": value} for name, value in scores.items()]
    row = {"heads": 20, "highest z": highest, "lowest z": lowest, "random heads": 5.0, "random, lowest draw": random}
    row |= {"distance of means": 0.5, "largest causal effect": 0.2}
    none = dict.fromkeys(row, 5.0) | {"heads": 0}
    return {"auc": auc, "sets": [none, row], "above_two": 3, "heads": [{}] * 40, "distinct_codes": 7.0}


def test_sentences_follow_the_numbers():
    said = sentences(numbers(0.9))
    assert "z-score ranks what single heads do: AUC 0.90 for the 10" in said[0] and "has 0.90" in said[0]
    assert said[1].endswith("has 0.50: training the dictionary helps.")
    assert "the heads of highest z are needed: of a logit difference of 5.00, ablating 20 leaves 1.00" in said[2]
    assert "3 of 40 heads have z above 2" in said[3]
    assert "hardly ranks" in sentences(numbers(0.5))[0] and "ranks, weakly," in sentences(numbers(0.7))[0]
    assert "training the dictionary hurts" in sentences(numbers(0.57, untrained=0.78))[1]
    assert "training the dictionary does not help" in sentences(numbers(0.57, untrained=0.6))[1]
    assert "are not needed more than others" in sentences(numbers(0.9, highest=3.0))[2]
    assert "are not needed more than others" in sentences(numbers(0.9, random=0.5))[2]


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
