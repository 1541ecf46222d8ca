"""One tiny training of a method, and what is read from it. Each check raises AssertionError where it does not hold."""

import shutil
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import per_feature
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.offered import Through
from jaxinterp.decompositions.saved import load_decomposition, save
from jaxinterp.decompositions.stand_in import StandIn
from jaxinterp.evaluation.scoreboard import score
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace
from jaxinterp.storage.arrays import file_name, stored
from jaxinterp.training.fit import Fit, fit
from jaxinterp.training.mesh import make_mesh
from tests.conformance.cases import RATE, Case
from tests.goldens.trainings import subject, text

QUIET = {"log_every": 1, "progress": False}
"""Without the line of what memory a run needs, which is traced for it."""
SIZES = QUIET | {"steps": 4, "batch_size": 64, "buffer_batches": 2}
STOP = 2
TOLERANCE = RATE / 100
"""Of a weight on a mesh: a hundredth of one of Adam's steps, which divide by the gradient's own size."""


ROWS = {str(P("feature")), str(P("feature", None))}
"""Where arrays of one row a feature lie."""


@dataclass
class Trained:
    """Four steps of one method: on one device; on (data, feature) = (2, 4); there again from what was kept of step two.

    Each is trained when a property first asks for it.
    """

    case: Case
    folder: Path

    @cached_property
    def one(self) -> Fit:
        return fitted(self.case)

    @cached_property
    def whole(self) -> Fit:
        return fitted(self.case, mesh=make_mesh(2, 4), checkpoint=self.folder, save_every=2 * STOP)

    @cached_property
    def halfway(self) -> dict[str, np.ndarray]:
        """The state of step two, as a run that is killed after it leaves it: what came later is gone."""
        lies = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        wanted = jax.tree.map(lies, stored(named_leaves(self.whole.state)))
        for later in self.folder.glob("[0-9]*"):
            if int(later.name) > STOP:
                shutil.rmtree(later)
        return bits(ocp.load_checkpointables(self.folder / str(STOP), {"state": wanted})["state"])

    @cached_property
    def resumed(self) -> Fit:
        assert self.halfway
        return fitted(self.case, mesh=make_mesh(2, 4), checkpoint=self.folder, save_every=2 * STOP, resume=True)


def fitted(case: Case, on: Subject | None = None, **options: Any) -> Fit:
    """`fit` with the sizes of every case."""
    given = (text(),) if case.text else ()
    sizes = SIZES if case.text else QUIET | {"steps": SIZES["steps"]}
    return fit(case.method, on or subject(), *given, site=case.site, **sizes | dict(case.options) | options)


def bits(tree):
    """Every leaf by name; random keys by their data."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return {name: np.asarray(plain(leaf)) for name, leaf in named_leaves(tree).items()}


def same_on_a_mesh(found: Trained) -> None:
    """Invariant 5: weights and losses of (2, 4) are those of one device; rows of features lie over `feature`."""
    one, many = found.one.decomposition, found.whole.decomposition
    for first, second in zip(found.one.history, found.whole.history, strict=True):
        assert first.keys() == second.keys()
        if "loss" in first:
            assert first["loss"] == pytest.approx(second["loss"], rel=1e-5, abs=1e-5)
    if found.case.signs:
        x = jax.random.normal(jax.random.key(0), (9, one.target_mean.shape[0]))
        squares, wanted = (d.encode(x).values ** 2 for d in (many, one))
        np.testing.assert_allclose(squares, wanted, rtol=2e-3, atol=1e-3 * float(wanted.max()))
        return
    lies = jax.tree.map(lambda leaf, rows: str(leaf.sharding.spec) if rows else None, many, per_feature(many))
    assert not found.case.spread or set(jax.tree.leaves(lies)) <= ROWS, "an array of one row a feature lies elsewhere"
    leaves, wanted = bits(many), bits(one)
    assert leaves.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_allclose(leaves[name], leaf, rtol=1e-4, atol=TOLERANCE, err_msg=name)


def learns(found: Trained) -> None:
    """Something happened, and not only before the stop: the state moves with every step."""
    halfway, end = found.halfway, bits(found.whole.state)
    moved = [name for name in end if name.startswith("method") and (end[name] != halfway[file_name(name)]).any()]
    assert moved, "nothing happened after the stop"
    if found.case.counts:
        counted = [name for name in halfway if name.endswith(file_name(found.case.counts))]
        assert any(halfway[name].any() for name in counted), f"{found.case.counts} was 0 at the stop"


def resumes_bit_for_bit(found: Trained) -> None:
    """Invariant 9: state, decomposition and rows of numbers of a run that was stopped are those of one that was not."""
    for wanted, again in (
        (found.whole.state, found.resumed.state),
        (found.whole.decomposition, found.resumed.decomposition),
    ):
        wanted, again = bits(wanted), bits(again)
        assert wanted.keys() == again.keys()
        for name, leaf in wanted.items():
            np.testing.assert_array_equal(again[name], leaf, err_msg=name)
    timeless = lambda rows: [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    assert timeless(found.whole.history) == timeless(found.resumed.history)
    assert int(found.halfway["step"]) == STOP


def comes_back_from_disk(decomposition, folder, kinds=()) -> None:
    """Invariant 7: every bit, and all that is static; a class that is not known is asked for."""
    saved = save(decomposition, folder)
    loaded = load_decomposition(saved, kinds=kinds)
    assert jax.tree.structure(loaded) == jax.tree.structure(decomposition)
    for name, leaf in named_leaves(decomposition).items():
        np.testing.assert_array_equal(named_leaves(loaded)[name], leaf, err_msg=name)
    if kinds:
        with pytest.raises(UserError, match="pass its class in kinds"):
            load_decomposition(saved)


TOKENS = jnp.arange(16).reshape(2, 8)


@eqx.filter_jit
def _values(model, sites):
    """Arrays and logits of a clean run."""
    trace = run(model, TOKENS)
    return {name: trace[name] for name in sites}, trace.logits


@eqx.filter_jit
def _with(model, name, value):
    """Logits where an array has this value."""
    return run(model, TOKENS, edits={name: lambda there: value}).logits


@eqx.filter_jit
def _in_place(model, edits):
    """Logits under these edits."""
    return run(model, TOKENS, edits=edits).logits


def replaces_its_leaf(decomposition, place) -> None:
    """Invariant 19: in its place it does what the edit of its array does that the decomposition is; and not nothing."""
    model, reads, writes = subject().model, decomposition.sites.without_gradients.reads, decomposition.sites.writes
    clean, logits = _values(model, (reads, writes))
    flat = clean[reads].reshape(*clean[reads].shape[:2], -1)
    wanted = eqx.filter_jit(decomposition)(flat).reshape(clean[writes].shape)
    edited = _with(model, writes, wanted)
    if place == "array":
        there = _in_place(model, {reads: Through(decomposition)})
    else:
        is_the_leaf = (reads, writes) == (f"{decomposition.sites.leaf}/in", f"{decomposition.sites.leaf}/out")
        stands = decomposition if is_the_leaf else StandIn(model.blocks[0].mlp, decomposition)
        there = _in_place(replace(model, {decomposition.sites.leaf: stands}), {})
    np.testing.assert_allclose(there, edited, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(edited - logits).max()) > 1e-3, "it changes nothing"


def has_a_row(decomposition) -> None:
    """The scoreboard measures it."""
    row = score(decomposition, subject(), text(), tokens=256, ce_tokens=256)
    assert 0 < row["fvu"] < 3 and row["l0"] > 0 and np.isfinite(row["ce_replaced"])


def refuses_nan(case: Case) -> None:
    """A model whose numbers are no numbers is refused in words, before or at the first step."""
    broken = eqx.tree_at(lambda model: model.embedding.token, subject().model, replace_fn=lambda x: x * jnp.nan)
    with pytest.raises(UserError, match=r"NaN or infinite|is not finite"):
        fitted(case, on=Subject(broken, None, "broken"))


POSITIVE = (
    "features", "experts", "k", "n", "channels", "knn", "d_key", "hidden", "regions", "rank", "probes", "parts",
    "groups", "every", "neurons", "learning_rate", "rate", "ridge",
)  # fmt: skip
"""Fields that have to be positive wherever a method has them."""


def refuses_what_is_not_positive(method) -> list[str]:
    """The fields of a method that have to be positive; each is refused at -1, by name and value."""
    asked = [each.name for each in fields(method) if each.name in POSITIVE]
    for name in asked:
        own = {each.name: vars(method)[each.name] for each in fields(method) if each.init}
        with pytest.raises(UserError, match=rf"{name}=-1(\.0)? "):
            type(method)(**own | {name: -1})
    return asked
