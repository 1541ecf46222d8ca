"""What `run` takes: padded prompts, positions, edits that know where they are, and mistakes told in one line."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import Add, Apply, At, SetTo
from jaxinterp.models.layers import wants
from jaxinterp.models.run import Trace, run
from jaxinterp.models.sites import replace, sites
from jaxinterp.models.transformer import TransformerConfig, initialise

SIZES = {"vocab_size": 50, "d_model": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "d_mlp": 24}
CONFIGS = {
    "rotary": TransformerConfig(**SIZES, context=32, rotary_dimensions=8),
    "learned": TransformerConfig(**SIZES, context=12, gated=False, learned_positions=True),
    "windows": TransformerConfig(**SIZES, context=32, rotary_dimensions=8, windows=(3, None)),
}
PAD = 0
PROMPTS = ([7, 3, 9, 11, 5], [4, 8])


def left_padded():
    width = max(map(len, PROMPTS))
    rows = [[PAD] * (width - len(prompt)) + prompt for prompt in PROMPTS]
    return jnp.asarray(rows), jnp.asarray([[False] * (width - len(p)) + [True] * len(p) for p in PROMPTS])


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    model = initialise(CONFIGS[request.param], jax.random.key(0))
    if request.param == "learned":  # positions that matter
        model = eqx.tree_at(lambda m: m.embedding.position, model, 10 * model.embedding.position)
    return model


def test_left_padding_changes_nothing_with_a_mask(model):
    """Logits and arrays of the prompt alone; without the mask, or without its positions, they are others."""
    tokens, mask = left_padded()
    padded = run(model, tokens, mask=mask)
    for row, prompt in enumerate(PROMPTS):
        alone = run(model, jnp.asarray([prompt]))
        for name in ("blocks/1/mlp/hidden", "final"):
            np.testing.assert_allclose(padded[name][row, -len(prompt) :], alone[name][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(padded.logits[row, -len(prompt) :], alone.logits[0], rtol=1e-4, atol=1e-5)
    alone = run(model, jnp.asarray([PROMPTS[1]])).logits[0]
    assert np.isfinite(padded.logits).all()
    assert float(jnp.abs(run(model, tokens).logits[1, -2:] - alone).max()) > 1e-2, "broken: no mask"


def test_positions_alone_shift_only_learned_ones(model):
    """Rotary attention sees differences of positions; learned embeddings see the positions, NaN beyond the last."""
    tokens = jnp.asarray([PROMPTS[0]])
    given = run(model, tokens, positions=jnp.arange(5)[None] + 3).logits
    plain = run(model, tokens).logits
    np.testing.assert_array_equal(run(model, tokens, positions=jnp.arange(5)[None]).logits, plain)
    if model.config.learned_positions:
        assert float(jnp.abs(given - plain).max()) > 1e-2
        assert np.isnan(run(model, tokens, positions=jnp.arange(5)[None] + 10).logits[0, -1]).all()
    else:
        np.testing.assert_allclose(given, plain, rtol=1e-4, atol=1e-4)
        stretched = run(model, tokens, positions=2 * jnp.arange(5)[None]).logits
        assert float(jnp.abs(stretched - plain).max()) > 1e-3


@pytest.fixture(scope="module")
def small():
    return initialise(CONFIGS["rotary"], jax.random.key(0))


def test_edits_know_their_positions(small):
    """Position 1 of a prompt is at another place in a padded row; padding has position -1."""
    tokens, mask = left_padded()
    name = "blocks/0/mlp/out"
    edited = run(small, tokens, mask=mask, edits={name: At(SetTo(7.0), (1,))})[name]
    assert [[bool((row == 7).all()) for row in rows] for rows in edited] == [
        [False, True, False, False, False],
        [False, False, False, False, True],
    ]
    unmasked = run(small, tokens, edits={name: At(SetTo(7.0), (1,))})[name]
    assert bool((unmasked[:, 1] == 7).all()) and not bool((unmasked[1, 4] == 7).any())
    seen = []
    run(small, tokens, mask=mask, edits={name: lambda x, *, positions: seen.append(positions) or x})
    assert seen[0].tolist() == [[0, 1, 2, 3, 4], [-1, -1, -1, 0, 1]]
    with pytest.raises(UserError, match=r"At\(\.\.\.\) edits arrays"):
        run(small, tokens, edits={"blocks/0/attn/pattern": At(SetTo(7.0), (1,))})


def test_plain_numbers_and_functions_are_edits(small):
    tokens, name = left_padded()[0], "blocks/1/mlp/out"
    zeroed = run(small, tokens, edits={name: SetTo(0.0)})
    np.testing.assert_array_equal(zeroed.logits, run(small, tokens, edits={name: SetTo(jnp.zeros(()))}).logits)
    assert (run(small, tokens, edits={name: SetTo(0)})[name] == 0).all()
    assert (run(small, tokens, edits={name: SetTo(np.ones(16, np.float32))})[name] == 1).all()
    program = jax.jit(lambda edits: run(small, tokens, edits=edits)[name])
    np.testing.assert_allclose(
        program({name: Apply(lambda x: 2 * x)}), 2 * run(small, tokens)[name], rtol=1e-4, atol=1e-5
    )
    shifted = program({name: Add(1.5)})
    np.testing.assert_allclose(shifted, run(small, tokens)[name] + 1.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": "text"}, r"tokens is text: give ids, jnp.asarray\(\[subject.tokenizer.encode"),
        ({"tokens": [1, 2]}, r"tokens is a list: give an array of ids \[batch, seq\]"),
        ({"tokens": jnp.arange(3)}, r"tokens has shape \(3,\), not \[batch, seq\]: give tokens\[None\]"),
        ({"tokens": jnp.ones((1, 3))}, "tokens has dtype float32: ids are whole numbers"),
        ({"mask": jnp.ones(3, bool)}, r"mask is \(3,\): give an array \(2, 5\), one number a token"),
        ({"mask": [True]}, r"mask is list: give an array \(2, 5\)"),
        ({"positions": jnp.ones((2, 5))}, "positions has dtype float32: positions are whole numbers"),
        ({"edits": {"embed": lambda x: None}}, "the edit at 'embed' returned a NoneType: it must return an array"),
        ({"edits": {"blocks/0/mlp/codes": SetTo(0.0)}}, "codes are sites where a decomposition replaces the leaf"),
    ],
)
def test_mistakes_are_told_in_one_line(small, arguments, words):
    with pytest.raises(UserError, match=words) as raised:
        run(small, **{"tokens": left_padded()[0]} | arguments)
    assert "\n" not in str(raised.value)


class NoMask(eqx.Module):
    """A model of another make, which takes no mask."""

    def __call__(self, tokens, *, tap, rules):
        return tap("embed", jnp.zeros((*tokens.shape, 50)))


def test_a_model_without_a_mask_says_so():
    tokens, mask = left_padded()
    assert run(NoMask(), tokens).logits.shape == (2, 5, 50)
    with pytest.raises(UserError, match="a NoMask takes no mask: give prompts of one length"):
        run(NoMask(), tokens, mask=mask)


def test_a_trace_is_a_mapping(small):
    trace = run(small, left_padded()[0])
    assert list(trace) == trace.keys() == [name for name, _ in trace.items()] and len(trace) == len(trace.values())
    assert "embed" in trace and "embedd" not in trace and trace.keys()[0] == "embed"
    assert dict(trace)["final"] is trace["final"]


class Offers(eqx.Module):
    """A leaf that offers an array of its own; it counts how often that array is made."""

    made: list = eqx.field(static=True, default_factory=list)

    def __call__(self, x, *, tap, rules):
        if wants(tap, "codes"):
            self.made.append(1)
            return x + 0 * tap("codes", jnp.ones_like(x)).sum()
        return x


def test_only_what_is_kept_is_made(small):
    """`keep` is a glob; what nobody looks at is not made, and an edit looks at it."""
    tokens = left_padded()[0]
    trace = run(small, tokens, keep="blocks/*/mlp/out")
    assert trace.keys() == ["blocks/0/mlp/out", "blocks/1/mlp/out"]
    np.testing.assert_array_equal(trace["blocks/0/mlp/out"], run(small, tokens)["blocks/0/mlp/out"])
    with pytest.raises(UserError, match=r"'embed' was not kept: .* keep=\('blocks/\*/mlp/out',\)"):
        trace["embed"]
    leaf = Offers()
    replaced = replace(small, {"blocks/0/mlp": leaf})
    assert "blocks/0/mlp/codes" in sites(replaced)
    leaf.made.clear()
    assert run(replaced, tokens, keep=()).keys() == [] and not leaf.made
    run(replaced, tokens, keep=(), edits={"blocks/0/mlp/codes": SetTo(0.0)})
    assert len(leaf.made) == 1
    assert "blocks/0/mlp/codes" in run(replaced, tokens)
    assert isinstance(jax.jit(lambda: run(small, tokens, keep="embed"))(), Trace)
