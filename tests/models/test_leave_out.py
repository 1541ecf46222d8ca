"""Leaving out as edits by name, against arrays that are masked by hand; each with a variant that must fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models import selection
from jaxinterp.models.edits import SetTo
from jaxinterp.models.leave_out import (
    Above,
    Affine,
    BatchTopK,
    Blocks,
    BySize,
    Core,
    Fixed,
    Forced,
    LeaveOut,
    LowRank,
    NOfM,
    TopK,
    every,
)
from jaxinterp.models.run import run
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.mesh import make_mesh

SIZES = {"vocab_size": 20, "d_model": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "d_mlp": 12}
TOKENS = jnp.asarray([[1, 2, 3, 9], [4, 4, 0, 5]])
HIDDEN = "blocks/0/mlp/hidden"


@pytest.fixture(scope="module")
def model():
    return initialise(TransformerConfig(**SIZES, context=8, rotary_dimensions=8), jax.random.key(0))


def test_an_edit_by_name_is_the_array_masked_by_hand(model):
    hidden = np.asarray(run(model, TOKENS, keep=[HIDDEN])[HIDDEN])
    norms = np.linalg.norm(np.asarray(model.blocks[0].mlp.down_proj.weight), axis=1)
    order = np.argsort(-np.abs(hidden) * norms, axis=-1)
    kept = hidden.copy()
    np.put_along_axis(kept, order[..., 4:], 0, axis=-1)

    def logits(edits):
        return np.asarray(run(model, TOKENS, edits=edits).logits)

    wina = every(model, "hidden", lambda leaf: LeaveOut(BySize(jnp.asarray(norms)), TopK(4)))
    assert list(wina) == [HIDDEN]
    expected = logits({HIDDEN: SetTo(jnp.asarray(kept))})
    np.testing.assert_allclose(logits(wina), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(logits({HIDDEN: LeaveOut(BySize(), TopK(12))}) - expected).max() > 1e-4  # broken: nothing left out


def test_leaving_out_at_pre_is_leaving_out_at_hidden(model):
    """CATS: |silu(gate)| decides, and a neuron with silu(0) = 0 writes nothing."""
    trace = run(model, TOKENS, keep=["blocks/0/mlp/*"])
    s = np.asarray(jax.nn.silu(trace["blocks/0/mlp/pre"]))
    kept = np.where(np.abs(s) > 0.2, np.asarray(trace[HIDDEN]), 0)
    edited = run(model, TOKENS, edits={"blocks/0/mlp/pre": LeaveOut(BySize(activation="silu"), Above(0.2))})
    np.testing.assert_allclose(edited[HIDDEN], kept, atol=1e-6)
    assert 0 < (kept == 0).mean() < 1
    broken = run(model, TOKENS, edits={"blocks/0/mlp/pre": LeaveOut(BySize(), Above(0.2))})  # |gate|, not |silu(gate)|
    assert np.abs(np.asarray(broken[HIDDEN]) - kept).max() > 1e-3


def test_fills():
    a = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)), jnp.float32)
    mask = np.asarray(selection.top_k(np.abs(a), 3))
    for fill, rest in (
        (7.0, np.full(8, 7.0)),
        (jnp.arange(8.0), np.arange(8.0)),
        (a[::-1], np.asarray(a[::-1])),
        (Affine(2.0, 1.0), 2 * np.asarray(a) + 1),
    ):
        out = np.asarray(LeaveOut(BySize(), TopK(3), fill)(a))
        np.testing.assert_allclose(out, np.where(mask, a, rest), rtol=1e-6)
        assert np.abs(out - np.where(mask, a, 0)).max() > 1e-2  # broken: the fill is forgotten


def test_the_low_rank_fill_gives_r_sparse_behind_the_weight():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        a, weight = jnp.asarray(rng.normal(size=(5, 8))), jnp.asarray(rng.normal(size=(8, 6)))
        edit = LeaveOut(BySize(selection.row_norms(weight)), TopK(3), LowRank(selection.low_rank_basis(weight, 2)))
        u, s, v = np.linalg.svd(np.asarray(weight), full_matrices=False)
        mask = np.asarray(selection.top_k(selection.wina(a, weight), 3))
        expected = (a * mask) @ weight + (a * ~mask) @ (u[:, :2] * s[:2]) @ v[:2]
        np.testing.assert_allclose(edit(a) @ weight, expected, atol=1e-12)
        assert np.abs(LeaveOut(edit.score, edit.selector)(a) @ weight - expected).max() > 0.1  # broken: no path
        scale = np.linalg.norm(u * s, axis=1)  # R-Sparse's own scale is WINA's norm
        np.testing.assert_allclose(scale, selection.row_norms(weight), rtol=1e-12)
        errors = [
            np.linalg.norm(selection.r_sparse(a, weight, jnp.asarray(mask), rank) - a @ weight) for rank in (0, 2, 4, 6)
        ]
        assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 < errors[-2]


def test_every_selector_as_an_edit_keeps_what_it_says():
    a = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 12)), jnp.float32)

    def kept(selector, score=None):
        return np.asarray(LeaveOut(score or BySize(), selector)(a) != 0)

    assert (kept(TopK(3)).sum(-1) == 3).all()
    assert kept(BatchTopK(3)).sum() == 60 and (kept(BatchTopK(3)).sum(-1) != 3).any()
    assert (kept(NOfM(2, 4)).reshape(4, 5, 3, 4).sum(-1) == 2).all()
    blocks = kept(Blocks(4, 2)).reshape(4, 5, 3, 4)
    assert (blocks.any(-1).sum(-1) == 2).all() and (blocks.all(-1) == blocks.any(-1)).all()
    force = kept(Forced(TopK(3), on=(0,), off=(1,)))
    assert force[..., 0].all() and not force[..., 1].any() and kept(TopK(3))[..., 1].any()
    fixed = kept(TopK(3), Fixed(jnp.arange(12.0)))
    assert fixed[..., 9:].all() and not fixed[..., :9].any()
    core = kept(TopK(3), Core(0.5, prompt=3))
    expected = selection.top_k(selection.core_counts(a[1, :3], 0.5), 3)
    assert (core[1] == np.asarray(expected)).all()
    assert (core != kept(TopK(3), Core(0.5, prompt=5))).any()  # broken: looks at all tokens


def test_the_first_tokens_may_stay_dense(model):
    edit = LeaveOut(BySize(), TopK(2), dense_before=2)
    clean, out = run(model, TOKENS)[HIDDEN], run(model, TOKENS, edits={HIDDEN: edit})[HIDDEN]
    np.testing.assert_array_equal(out[:, :2], clean[:, :2])
    assert ((np.asarray(out)[:, 2:] != 0).sum(-1) == 2).all()
    with pytest.raises(UserError, match="dense_before=2 needs"):
        edit(clean)


def test_what_is_kept_carries_the_gradient_and_the_mask_does_not():
    a = jnp.asarray([[3.0, -1.0, 2.0, 0.5]])
    edit = LeaveOut(BySize(), TopK(2))
    np.testing.assert_array_equal(jax.grad(lambda a: edit(a).sum())(a), [[1.0, 0.0, 1.0, 0.0]])


def test_selection_is_the_same_on_a_mesh():
    """Features spread over eight devices: the same masks, ties included."""
    score = jnp.asarray(np.random.default_rng(0).integers(0, 5, (6, 32)), jnp.float32)
    spread = jax.device_put(
        score, jax.sharding.NamedSharding(make_mesh(1, 8), jax.sharding.PartitionSpec(None, "feature"))
    )
    for selector in (TopK(7), BatchTopK(7), Above(2.0), NOfM(2, 4), Blocks(4, 3), Forced(TopK(7), (1,), (2,))):
        np.testing.assert_array_equal(jax.jit(selector)(spread), selector(score))
    local = np.concatenate([np.asarray(selection.top_k(part, 1)) for part in np.split(np.asarray(score), 8, axis=1)], 1)
    assert (local != np.asarray(TopK(8)(score))).any()  # broken: each device chooses for itself


def test_an_array_that_is_not_there_is_refused(model):
    with pytest.raises(UserError, match="array='gate' is not"):
        every(model, "gate", lambda leaf: LeaveOut(BySize(), TopK(1)))
    with pytest.raises(UserError, match="size=5 must divide"):
        Blocks(5, 1)(jnp.ones((2, 12)))
