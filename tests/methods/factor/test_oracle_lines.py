"""docs/oracles: every line names a function that is there, with its arguments in their order; and what issue 14 asks to
be compared with others' code is called as its line says."""

import importlib
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.decompositions.parameter_parts import Gates, Parts
from jaxinterp.methods.factor.parameters import Coefficients, Mask
from jaxinterp.models.layers import Linear
from jaxinterp.models.mixtures.monet import Horizontal, Vertical

DOCS = Path(__file__).parents[3] / "docs" / "oracles"
CALL = re.compile(r"`([A-Za-z_][\w.]*)\(([^`]*?)\)(?: -> [^`]*)?`")


def arguments(inside):
    """The names in `x [*, d], k=3, *, chunk=32`; None where they are abbreviated."""
    plain = re.sub(r"\[[^\]]*\]|=[^,]*", "", inside)
    names = [name.strip() for name in plain.split(",")]
    names = [name for name in names if name not in ("", "*", "...")]
    return names if all(re.fullmatch(r"\w+", name) for name in names) else None


def lines(file):
    """(module, function, names of arguments) of every call in a file, by the module that its heading names."""
    module = None
    for line in (DOCS / file).read_text().splitlines():
        if line.startswith("#"):
            found = re.search(r"`(jaxinterp[\w.]*)`", line)
            module = found.group(1) if found else None
        for name, inside in CALL.findall(line):
            names = arguments(inside)
            if names is not None and (module or name.startswith("jaxinterp.")):
                yield module, name, names


def resolved(module, name):
    """The object that a line names: below its own module path, or the one of the heading."""
    path = name if name.startswith("jaxinterp.") else f"{module}.{name}"
    parts = path.split(".")
    for cut in range(len(parts) - 1, 1, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = vars(found).get(part)
        return found
    return None


FILES = ("factor.md", "parameters.md")
EVERY = {(file, name): (module, names) for file in FILES for module, name, names in lines(file)}


def callable_of(file, name):
    """A documented function and the names that its line gives its arguments."""
    module, names = EVERY[file, name]
    return resolved(module, name), names


@pytest.mark.parametrize("file", ["factor.md", "parameters.md"])
def test_every_line_names_a_function_and_its_arguments(file):
    wrong = []
    for (own, name), (module, names) in EVERY.items():
        if own != file:
            continue
        found = resolved(module, name)
        if found is None:
            wrong.append(f"{module}: no {name}")
            continue
        real = [each for each in inspect.signature(found).parameters if each != "self"]
        positions = [real.index(each) if each in real else -1 for each in names]
        if -1 in positions or positions != sorted(positions):
            wrong.append(f"{name}{tuple(names)} is {name}{tuple(real)}")
    assert not wrong, "\n".join(wrong)
    assert sum(own == file for own, _ in EVERY) > 20


def test_a_line_with_another_name_is_noticed():
    """The broken variant: what the check above compares differs where one argument has another name."""
    found, names = callable_of("factor.md", "update")
    assert names[:3] == list(inspect.signature(found).parameters)[:3]
    assert [*names[:2], "keep"] != list(inspect.signature(found).parameters)[:3]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def called(file, name, *values, **more):
    """The function with these values for the arguments of its line, by their names."""
    function, names = callable_of(file, name)
    return function(**dict(zip(names, values, strict=False)), **more)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_semi_nmf_and_the_interaction_basis_as_their_lines_say(float64):
    rows, start = normal(0, 30, 12), jnp.abs(normal(1, 30, 4)) + 0.1
    once = called("factor.md", "update", rows, start, 3)
    assert once.features.shape == (4, 12) and once.coefficients.shape == (30, 4)
    many = called("factor.md", "factorise", rows, start, 5, 3)
    assert many.losses.shape == (5,)
    loss = called("factor.md", "squared_error", rows, *once)
    np.testing.assert_allclose(many.losses[0], loss, rtol=1e-9)
    gram = called("factor.md", "second_moment", rows[:, :5])
    matrix = normal(2, 5, 3)
    jacobian = called("factor.md", "jacobian_moment", lambda x: x @ matrix, rows[:, :5])
    basis = called("factor.md", "interaction_basis", gram, jacobian)
    kept = basis.importance.shape[0]
    assert basis.into.shape == (5, kept) and basis.out_of.shape == (kept, 5) and kept == 3
    np.testing.assert_allclose(basis.out_of @ basis.into, np.eye(kept), atol=1e-9)


def test_spectra_as_their_lines_say(float64):
    left, right, down, direction = normal(0, 4, 6), normal(1, 4, 6), normal(2, 6, 3), normal(3, 3)
    matrix = called("parameters.md", "interaction_matrix", left, right, down, direction)
    found = called("parameters.md", "spectrum", matrix)
    x = normal(4, 7, 4)
    wanted = ((x @ left) * (x @ right)) @ down @ direction
    np.testing.assert_allclose(called("parameters.md", "eigen_terms", x, found).sum(-1), wanted, rtol=1e-10)
    assert called("parameters.md", "interaction_tensor", left, right, down).shape == (3, 4, 4)


def test_mixtures_as_their_lines_say(float64):
    x = normal(0, 6, 4)
    up, bias, down = normal(1, 3, 4, 5), normal(2, 3, 5), normal(3, 3, 5, 4)
    layer = called("parameters.md", "MoEX", up, bias, down, Linear(normal(4, 4, 3), None), 2, "relu", 1.0, "kept")
    logits = layer.logits(x)
    index, weight = layer.weights(logits)
    assert layer(x).shape == (6, 4) and logits.shape == (6, 3) and index.shape == weight.shape == (6, 2)
    chosen = np.asarray(index)
    each = np.maximum(np.einsum("td,mdh->tmh", x, up) + np.asarray(bias), 0)
    every = np.einsum("tmh,mhd->tmd", each, down)
    wanted = sum(np.asarray(weight)[:, j, None] * every[np.arange(6), chosen[:, j]] for j in range(2))
    np.testing.assert_allclose(layer(x), wanted, atol=1e-12)

    heads, n, m = 2, 3, 4
    scores = called("parameters.md", "router_logits", x, normal(5, 2, 4, heads, n))
    statistics = called("parameters.md", "batch_statistics", scores)
    assert scores.shape == (6, 2, heads, n) and statistics.mean.shape == (2, heads)
    gates = called("parameters.md", "from_gates", x, jax.nn.softmax(scores), horizontal(n, m), "relu_squared")
    pairs = called("parameters.md", "expert_pairs", jax.nn.softmax(scores))
    assert pairs.shape == (6, n, n)
    np.testing.assert_allclose(
        gates, called("parameters.md", "from_pairs", x, pairs, horizontal(n, m), "relu_squared"), atol=1e-12
    )
    two = called("parameters.md", "from_gates", x, jax.nn.softmax(scores), vertical(n, m), "relu_squared")
    np.testing.assert_allclose(
        two, called("parameters.md", "from_pairs", x, pairs, vertical(n, m), "relu_squared"), atol=1e-12
    )


def horizontal(n, m, d=4):
    return Horizontal(normal(6, n, d, m), normal(7, n, m), normal(8, n, m, d), normal(9, n, d))


def vertical(n, m, d=4):
    return Vertical(
        normal(6, 2, n, d, m // 2), normal(7, 2, n, m // 2), normal(8, 2, 2, n, m // 2, d // 2), normal(9, 2, n, d // 2)
    )


def test_terms_of_spd_as_their_lines_say(float64):
    """Two matrices in a chain, given masks: every term against NumPy, and a gradient against finite differences."""
    x, weights = normal(0, 9, 4), {"one": normal(1, 4, 3), "two": normal(2, 3, 5)}
    parts = {"one": Parts(normal(3, 6, 4), normal(4, 6, 3)), "two": Parts(normal(5, 6, 3), normal(6, 6, 5))}
    gates = {name: Gates(normal(7, 6, 2), normal(8, 6, 2), normal(9, 6, 2), normal(10, 6)) for name in weights}
    draw = np.random.default_rng(11)
    uniform = lambda *shape: jnp.asarray(draw.uniform(size=shape))
    sources = {name: Mask(uniform(9, 6), uniform(9)) for name in weights}
    reads = {"one": x, "two": x @ weights["one"]}
    clean = reads["two"] @ weights["two"]

    def losses(parts):
        importances = {
            name: called("parameters.md", "causal_importances", reads[name], parts[name], gates[name])
            for name in weights
        }

        def masked(masks):
            h = x
            for name, weight in weights.items():
                if name in masks:
                    h = called("parameters.md", "masked_linear", h, weight, parts[name], masks[name])
                else:
                    h = h @ weight
            return h

        given = (masked, clean, weights, parts, importances, sources, "squares", 1.0, Coefficients(1.0, 1.0, 1.0, 0.01))
        return called("parameters.md", "terms", *given)

    _, found = losses(parts)
    rest = [np.asarray(weights[name] - parts[name].read.T @ parts[name].write) for name in weights]
    faithful = sum((one**2).sum() for one in rest) / sum(one.size for one in rest)
    np.testing.assert_allclose(found["faithful"], faithful, rtol=1e-10)
    assert set(found) == {"faithful", "stochastic", "layerwise", "importance"}
    gradient = jax.grad(lambda parts: losses(parts)[0])(parts)
    moved = {  # a write vector: no gate reads it, so that the leak of `lower` has no part in its gradient
        sign: {**parts, "two": Parts(parts["two"].read, parts["two"].write.at[2, 1].add(sign * 1e-6))}
        for sign in (1, -1)
    }
    slope = (float(losses(moved[1])[0]) - float(losses(moved[-1])[0])) / 2e-6
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(gradient["two"].write[2, 1], slope, rtol=1e-6)
