"""An encoder has the same names, sees both ways but no padding, and says by name that it has no logits."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import SetTo
from jaxinterp.models.load import load, save_subject
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace, sites
from jaxinterp.models.transformer import Transformer
from tests.models.model_files import GOLDENS, assert_same_leaves
from tests.models.wrapped import Wrapped

PADDING = 3
TOKENS = jnp.asarray([[5, 9, 14, 2, 40, 7], [8, 1, 30, PADDING, PADDING, PADDING]])


compiled = eqx.filter_jit(run)  # one program, not one for each operation


@pytest.fixture(scope="module")
def model() -> Transformer:
    return load(GOLDENS / "bert", dtype="float32").model


def test_names_are_those_of_a_decoder(model):
    names = sites(model)
    assert names[0] == "embed" and names[-2:] == ["final", "pooled"]
    assert [name.removeprefix("blocks/0/") for name in names if name.startswith("blocks/0/")] == [
        "resid/pre", "attn", *(f"attn/{name}_proj" for name in "qkvo"), "attn/in", "attn/pattern", "attn/z", "attn/out",
        "resid/mid", "mlp", "mlp/up_proj", "mlp/down_proj", "mlp/in", "mlp/pre", "mlp/hidden",
        "mlp/out", "mlp/added", "resid/post",
    ]  # fmt: skip


def test_norms_stand_on_the_sums(model):
    trace, block = compiled(model, TOKENS), model.blocks[1]
    np.testing.assert_array_equal(trace["blocks/1/mlp/in"], trace["blocks/1/resid/mid"])
    total = trace["blocks/1/resid/mid"] + trace["blocks/1/mlp/added"]
    np.testing.assert_allclose(trace["blocks/1/resid/post"], block.mlp_sum_norm(total), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(trace["final"], trace["blocks/1/resid/post"])


def test_both_ways_are_seen_but_no_padding(model):
    pattern = np.asarray(compiled(model, TOKENS)["blocks/0/attn/pattern"])
    assert (pattern[0] > 0).all()
    assert (pattern[1, :, :3, :3] > 0).all() and (pattern[1, :, :3, 3:] == 0).all()
    np.testing.assert_allclose(pattern.sum(-1), 1.0, rtol=1e-5)


def test_padding_changes_nothing(model):
    """A batch filled up to any length gives what each input gives alone; what has no token but padding is finite."""
    alone = compiled(model, TOKENS[1:, :3])
    together = compiled(model, TOKENS)
    np.testing.assert_allclose(together["final"][1, :3], alone["final"][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(together["pooled"][1], alone["pooled"][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone["pooled"], alone["final"].mean(axis=1), rtol=1e-5, atol=1e-6)
    empty = compiled(model, jnp.full((1, 4), PADDING))
    assert all(bool(jnp.isfinite(array).all()) for array in empty.arrays.values())
    assert (empty["pooled"] == 0).all()


def test_a_wrapping_replacement_is_bit_exact(model):
    """Invariant 1."""
    program = jax.jit(lambda model, tokens: run(model, tokens)["pooled"])
    wrapped = replace(model, {"blocks/1/mlp": Wrapped(model.blocks[1].mlp)})
    assert (program(model, TOKENS) == program(wrapped, TOKENS)).all()
    zeroed = compiled(model, TOKENS, edits={"blocks/1/mlp/out": SetTo(jnp.zeros(()))})["pooled"]
    assert float(jnp.abs(zeroed - compiled(model, TOKENS)["pooled"]).max()) > 1e-2


def test_logits_are_refused_by_name(model):
    assert model(TOKENS) is None
    with pytest.raises(UserError, match=r"no logits and so no cross-entropy: it is an encoder.*effect=POOLED"):
        _ = run(model, TOKENS).logits
    with pytest.raises(UserError, match=r"no head .* 'final' and 'pooled'"):
        model.unembed(jnp.zeros(16))


def test_more_positions_than_were_learned_are_refused(model):
    with pytest.raises(UserError, match="25 positions, but the model learned only 24"):
        run(model, jnp.ones((1, 25), jnp.int32))


def test_own_form_round_trip(tmp_path):
    """Invariant 7."""
    subject = load(GOLDENS / "bert", dtype="float32")
    save_subject(subject, tmp_path / "own")
    again = load(tmp_path / "own", dtype="float32")
    assert again.model.config == subject.model.config
    assert_same_leaves(again.model, subject.model)
