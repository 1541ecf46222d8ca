"""Names, traces, edits and replacements. Invariants 1, 2 and 3 of docs/invariants.md."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.edits import Add, SetTo
from jaxinterp.models.load import Subject, load
from jaxinterp.models.mlp import MLP
from jaxinterp.models.rules import Rules
from jaxinterp.models.run import run
from jaxinterp.models.sites import replace, select, sites
from jaxinterp.models.tiny import TINY, planted_transformer
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.models.view import show, tree_html, tree_text
from tests.models.wrapped import Wrapped

TOKENS = jnp.arange(24).reshape(2, 12) * 7 % 257
GATED = TransformerConfig(
    vocab_size=50, d_model=16, layers=2, heads=2, kv_heads=1, head_dim=8, d_mlp=24, context=32, rotary_dimensions=8
)


@pytest.fixture(scope="module")
def model():
    return planted_transformer(jax.random.key(0))


def test_names_follow_the_flow(model):
    names = sites(model)
    assert names[0] == "embed" and names[-1] == "final"
    first_block = [name.removeprefix("blocks/0/") for name in names if name.startswith("blocks/0/")]
    assert first_block == [
        "resid/pre", "attn", *(f"attn/{name}_proj" for name in "qkvo"), "attn/in", "attn/pattern", "attn/z", "attn/out",
        "resid/mid", "mlp", "mlp/up_proj", "mlp/down_proj", "mlp/in", "mlp/pre", "mlp/hidden",
        "mlp/out", "mlp/added", "resid/post",
    ]  # fmt: skip
    gated = sites(initialise(GATED, jax.random.key(0)), "blocks/1/mlp**")
    assert gated[:4] == ["blocks/1/mlp", *(f"blocks/1/mlp/{name}_proj" for name in ("gate", "up", "down"))]
    assert "blocks/1/mlp/up" in gated


def test_globs_select_leaves_and_arrays(model):
    assert sites(model, "blocks/*/mlp") == [f"blocks/{i}/mlp" for i in range(4)]
    assert sites(model, "**/mlp/hidden") == [f"blocks/{i}/mlp/hidden" for i in range(4)]
    assert sites(model, "*") == ["embed", "final"]
    assert all(isinstance(leaf, MLP) for leaf in select(model, "blocks/*/mlp").get_sequence())
    with pytest.raises(UserError, match=r"blocks/\*/mlq"):
        select(model, "blocks/*/mlq")


def test_every_name_is_in_the_trace_with_its_shape(model):
    trace = run(model, TOKENS)
    arrays = [name for name in sites(model) if not name.endswith(("/mlp", "/attn", "_proj"))]
    assert sorted(trace.arrays) == sorted(arrays)
    assert trace["blocks/2/attn/pattern"].shape == (2, 4, 12, 12)
    assert trace["blocks/2/attn/z"].shape == (2, 12, 4, 16)
    np.testing.assert_allclose(trace["blocks/2/attn/pattern"].sum(-1), 1.0, rtol=1e-5)
    middle, post = trace["blocks/2/resid/mid"], trace["blocks/2/resid/post"]
    np.testing.assert_array_equal(middle + trace["blocks/2/mlp/added"], post)
    np.testing.assert_allclose(model.unembed(trace["final"]), trace.logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("site", [f"blocks/{i}/mlp" for i in range(4)])
def test_a_wrapping_replacement_is_bit_exact(model, site):
    """Invariant 1."""
    wrapped = replace(model, {site: Wrapped(select(model, site).get())})
    program = jax.jit(lambda model, tokens: run(model, tokens).logits)
    assert (program(model, TOKENS) == program(wrapped, TOKENS)).all()


def test_an_attention_leaf_can_be_replaced(model):
    attn = model.blocks[1].attn
    program = jax.jit(lambda model, tokens: run(model, tokens).logits)
    same = replace(model, {"blocks/1/attn": Wrapped(attn)})
    assert (program(model, TOKENS) == program(same, TOKENS)).all()
    assert sites(same, "blocks/1/attn/*") == ["blocks/1/attn/in", "blocks/1/attn/out"]


@pytest.mark.parametrize("name", ["mlp/gate_proj", "mlp/up_proj", "mlp/down_proj", *(f"attn/{n}_proj" for n in "qkvo")])
def test_a_projection_can_be_selected_and_replaced(name):
    """With itself: bit-exact. With twice itself: another model, the one in which that weight was doubled."""
    model, site = initialise(GATED, jax.random.key(0)), f"blocks/1/{name}"
    program = jax.jit(lambda model, tokens: run(model, tokens).logits)
    linear = select(model, site).get()
    assert (program(replace(model, {site: Wrapped(linear)}), TOKENS % 50) == program(model, TOKENS % 50)).all()
    twice = eqx.tree_at(lambda linear: linear.weight, linear, 2 * linear.weight)
    changed = program(replace(model, {site: Wrapped(twice)}), TOKENS % 50)
    part, field = name.split("/")
    expected = eqx.tree_at(lambda m: getattr(getattr(m.blocks[1], part), field).weight, model, twice.weight)
    np.testing.assert_allclose(changed, program(expected, TOKENS % 50), rtol=1e-6)
    assert float(jnp.abs(changed - program(model, TOKENS % 50)).max()) > 1e-3


def test_projections_that_are_not_there_say_why(model):
    with pytest.raises(
        UserError, match="'blocks/1/mlp/gate_proj' does not exist: 'blocks/1/mlp' has blocks/1/mlp/up_proj"
    ):
        replace(model, {"blocks/1/mlp/gate_proj": model.blocks[1].mlp.up_proj})
    replaced = replace(model, {"blocks/1/mlp": Wrapped(model.blocks[1].mlp)})
    with pytest.raises(UserError, match="projections are inside the module"):
        replace(replaced, {"blocks/1/mlp/up_proj": model.blocks[1].mlp.up_proj})
    with pytest.raises(UserError, match=r"maps \(1, 1, 64\) to \(1, 1, 64\), not to \(1, 1, 128\)"):
        replace(model, {"blocks/1/mlp/up_proj": Wrapped(model.blocks[1].mlp)})
    with pytest.raises(UserError, match="'blocks/1/mlp/out' is an array, not a leaf"):
        replace(model, {"blocks/1/mlp/out": Wrapped(model.blocks[1].mlp)})


def test_a_pattern_edit_has_a_derivative_where_the_pattern_is_held(model):
    """`hold` stops what made the pattern, not what an edit adds to it."""
    tokens, held = TOKENS[:1], Rules(attention=True)

    def logit(delta, rules):
        return run(model, tokens, edits={"blocks/1/attn/pattern": Add(delta)}, rules=rules).logits[0, -1, 3]

    slope = jax.jit(jax.grad(logit), static_argnums=1)
    slopes = [slope(jnp.zeros((1, 4, 12, 12)), rules) for rules in (Rules(), held)]
    assert float(jnp.abs(slopes[1]).max()) > 0.1 * float(jnp.abs(slopes[0]).max()) > 0


def test_gradients_flow_through_a_replaced_leaf(model):
    mlp = model.blocks[1].mlp

    def loss(mlp):
        return jnp.sum(run(replace(model, {"blocks/1/mlp": Wrapped(mlp)}), TOKENS).logits ** 2)

    gradient = jax.jit(jax.grad(loss))(mlp)
    assert all(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradient))
    direct = jax.grad(lambda mlp: jnp.sum(run(eqx.tree_at(lambda m: m.blocks[1].mlp, model, mlp), TOKENS).logits ** 2))
    np.testing.assert_allclose(gradient.down_proj.weight, jax.jit(direct)(mlp).down_proj.weight, rtol=1e-5, atol=1e-4)


def test_layers_nobody_asks_for_are_never_computed(model):
    """Invariant 3: capturing layer 0 of 4 costs under 35 percent of a program that returns `final`."""

    def flops(name):
        program = jax.jit(lambda model, tokens: run(model, tokens)[name]).lower(model, jnp.zeros((4, 64), jnp.int32))
        return program.compile().cost_analysis()["flops"]

    assert flops("blocks/0/mlp/out") < 0.35 * flops("final")
    assert flops("blocks/3/mlp/out") > 0.9 * flops("final")


def test_edits_change_what_flows_on(model):
    """Invariant 2: setting an array to its own value changes nothing; edits are jit arguments."""
    name = "blocks/1/mlp/out"
    program = jax.jit(lambda model, tokens, edits: run(model, tokens, edits=edits))
    clean = program(model, TOKENS, {})
    same = program(model, TOKENS, {name: SetTo(clean[name])})
    np.testing.assert_array_equal(clean.logits, same.logits)
    ablated = program(model, TOKENS, {name: SetTo(jnp.zeros(()))})
    assert (ablated[name] == 0).all() and float(jnp.abs(ablated.logits - clean.logits).max()) > 0.1
    direction = jnp.ones(64)
    steered = program(model, TOKENS, {name: Add(direction)})
    np.testing.assert_allclose(steered[name], clean[name] + 1, rtol=1e-5)

    def metric(delta):
        return run(model, TOKENS, edits={name: Add(delta)}).logits[0, -1, 5]

    by_zero = jax.grad(metric)(jnp.zeros((2, 12, 64)))
    assert (by_zero[1] == 0).all() and float(jnp.abs(by_zero[0]).max()) > 0
    finite = (metric(1e-2 * by_zero) - metric(-1e-2 * by_zero)) / 2e-2
    np.testing.assert_allclose(finite, jnp.sum(by_zero**2), rtol=2e-2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks/1/mlp/hiddn", "Did you mean 'blocks/1/mlp/hidden'"),
        ("blocks/1/mlp/up", "is dense and has no second branch"),
        ("blocks/9/mlp/in", "no site 'blocks/9/mlp/in'"),
    ],
)
def test_an_unknown_name_says_what_can_be_had(model, name, words):
    with pytest.raises(UserError, match=words):
        run(model, TOKENS)[name]
    with pytest.raises(UserError, match=words):
        run(model, TOKENS, edits={name: SetTo(jnp.zeros(()))})


def test_replaced_and_parallel_blocks_say_why(model):
    replaced = replace(model, {"blocks/1/mlp": Wrapped(model.blocks[1].mlp)})
    assert sites(replaced, "blocks/1/mlp/*") == ["blocks/1/mlp/in", "blocks/1/mlp/out", "blocks/1/mlp/added"]
    with pytest.raises(UserError, match="was replaced"):
        run(replaced, TOKENS)["blocks/1/mlp/hidden"]
    parallel = initialise(TransformerConfig(**{**vars(GATED), "parallel": True}), jax.random.key(0))
    with pytest.raises(UserError, match="in parallel"):
        run(parallel, TOKENS % 50)["blocks/0/resid/mid"]


def test_bad_replacements_and_edits_are_refused(model):
    with pytest.raises(UserError, match="Did you mean 'blocks/1/mlp'"):
        replace(model, {"blocks/1/mlpp": Wrapped(model.blocks[1].mlp)})
    with pytest.raises(UserError, match="is not callable"):
        replace(model, {"blocks/1/mlp": jnp.zeros(3)})
    with pytest.raises(UserError, match="keep shape and dtype"):
        run(model, TOKENS, edits={"embed": lambda x: x[:, :1]})


def test_the_view_shows_site_names(model):
    html = tree_html(model)
    assert "blocks/3/mlp" in html and "blocks/0/mlp/up_proj/weight" in html
    assert TINY.layers == 4


def test_a_shell_gets_a_short_table(model, capsys):
    show(model)
    printed = capsys.readouterr().out
    assert printed == tree_text(model) + "\n" and len(printed.splitlines()) < 60 and "<" not in printed
    assert "  blocks/*/mlp/up_proj/weight" in printed and "float32 [64, 128]  x 4" in printed
    show(Subject(model, None, "tiny"))
    assert capsys.readouterr().out == printed
    assert repr(Subject(model, None, "tiny", "planted")) == (
        "Subject('tiny', Transformer of 4 blocks, 148,928 weights float32, no tokenizer, planted)"
    )


def test_older_names_of_the_projections_still_lead_to_them():
    mlp = load("tiny").model.blocks[1].mlp
    assert mlp.down is mlp.down_proj and mlp.up is mlp.up_proj and mlp.gate is mlp.gate_proj
    zeroed = eqx.tree_at(lambda mlp: mlp.down.weight, mlp, jnp.zeros_like(mlp.down.weight))
    assert not zeroed.down_proj.weight.any()
