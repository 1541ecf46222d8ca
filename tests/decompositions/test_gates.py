"""Gated and JumpReLU: forward passes, straight-through estimators, gradients of the terms, files.

Invariants 6, 7 and 17.
"""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.batch import make_batch
from jaxinterp.core.errors import UserError
from jaxinterp.core.fields import per_feature, trainable
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.activations import ReLU
from jaxinterp.decompositions.adaptive import GroupBias
from jaxinterp.decompositions.dictionary import fold
from jaxinterp.decompositions.files import load_dictionary
from jaxinterp.decompositions.gates import Gated, JumpReLU, jump, step
from jaxinterp.objectives import reconstruction, total
from jaxinterp.objectives.gates import gate_auxiliary, gate_l1, l0, l0_to_target
from tests.decompositions.older import save_dictionary
from tests.helpers import SITES, random_dictionary

KEY = jax.random.key(0)
ROWS = 24


def random_gated():
    rng = np.random.default_rng(5)
    return Gated(*(jnp.asarray(0.5 * rng.normal(size=ROWS), jnp.float32) for _ in range(3)))


def random_jumprelu(parametrisation="log", bandwidth=0.5):
    threshold = np.random.default_rng(6).uniform(0.1, 2, ROWS).astype(np.float32)
    return JumpReLU(
        jnp.asarray(np.log(threshold) if parametrisation == "log" else threshold), parametrisation, bandwidth
    )


def random_batch(tokens=30):
    rng = np.random.default_rng(7)
    weight = np.ones(tokens, np.float32)
    weight[::7] = 0
    arrays = {"blocks/1/mlp/in": rng.normal(size=(tokens, 8)), "blocks/1/mlp/out": rng.normal(size=(tokens, 6))}
    return make_batch({name: array.astype(np.float32) for name, array in arrays.items()}, weight, SITES)


def plain(array):
    return np.asarray(array, np.float64)


def encoded(dictionary, x):
    """x' E^T, in float64."""
    return (plain(x) - plain(dictionary.input_mean)) / plain(dictionary.input_scale) @ plain(dictionary.encoder).T


def test_gated_is_its_equation():
    dictionary = random_dictionary(random_gated())
    gated, x = dictionary.activation, random_batch().inputs
    e = encoded(dictionary, x) + plain(dictionary.encoder_bias)
    gate = e + plain(gated.gate_bias)
    size = np.maximum(np.exp(plain(gated.log_scale)) * e + plain(gated.size_bias), 0)
    codes = dictionary.encode(x)
    np.testing.assert_allclose(codes.pre, gate, atol=1e-4)
    np.testing.assert_allclose(codes.values, (gate > 0) * size, atol=1e-4)
    assert (np.asarray(codes.values)[gate <= 0] == 0).all() and (size[gate <= 0] > 0.1).any(), "the gate never mattered"


@pytest.mark.parametrize("parametrisation", ["log", "raw"])
def test_jumprelu_is_its_equation(parametrisation):
    dictionary = random_dictionary(random_jumprelu(parametrisation))
    x = random_batch().inputs
    a = encoded(dictionary, x) + plain(dictionary.encoder_bias)
    threshold = np.random.default_rng(6).uniform(0.1, 2, ROWS)
    codes = dictionary.encode(x)
    np.testing.assert_allclose(codes.values, a * (a > threshold), atol=1e-4)
    assert ((np.asarray(codes.values) == 0) & (a > 0)).any(), "the threshold never mattered"


def test_what_lies_exactly_at_the_threshold_is_not_active():
    a, threshold = jnp.array([[-1.0, 0.5, 0.75, 0.0]]), jnp.array([0.5, 0.5, 0.5, 0.0])
    np.testing.assert_array_equal(jump(a, threshold, 0.1), [[0, 0, 0.75, 0]])
    np.testing.assert_array_equal(step(a, threshold, 0.1), [[0, 0, 1, 0]])
    shut = Gated.start(1).codes(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.zeros(1), k=None, weight=None, training=True)
    assert float(shut.pre[0, 0]) == 0 and float(shut.values[0, 0]) == 0


@pytest.mark.parametrize("broken", ["encoder_bias", "own"])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_shows(broken, sign):
    """In a pre-activation and in what it is compared with: a feature that silently dies would train on."""
    bias = GroupBias.start(ROWS, groups=2, highest=0.5, lowest=0.1, every=1, rate=0.1)
    for activation, own in (
        (random_gated(), lambda d: d.activation.gate_bias),
        (random_jumprelu("raw"), lambda d: d.activation.threshold_parameter),
        (random_jumprelu("log"), lambda d: d.activation.threshold_parameter),
        (bias, lambda d: d.activation.adapted_bias),
    ):
        where = own if broken == "own" else (lambda d: d.encoder_bias)
        dictionary = random_dictionary(activation)
        spoiled = eqx.tree_at(where, dictionary, where(dictionary).at[5].set(sign * jnp.nan))
        codes = spoiled.encode(random_batch().inputs).dense()
        assert jnp.isnan(codes[:, 5]).all() and not jnp.isnan(jnp.delete(codes, 5, axis=1)).any()


# a on a grid of 2.5e-6, thresholds of three features inside it
GRID = np.linspace(-0.5, 1.5, 800_001)
THRESHOLDS = np.array([0.3, 0.5, 0.8])


def estimated(loss, bandwidth):
    """The straight-through gradient by the thresholds of the mean over the grid of loss(a, z, active)."""
    a = jnp.asarray(np.repeat(GRID[:, None], 3, axis=1), jnp.float32)

    def mean(threshold):
        return jnp.sum(loss(a, jump(a, threshold, bandwidth), step(a, threshold, bandwidth))) / len(GRID)

    return np.asarray(jax.jit(jax.grad(mean))(jnp.asarray(THRESHOLDS, jnp.float32)))


def differences(mean_loss, h):
    """The central finite difference of a function of one threshold."""
    return np.array([(mean_loss(threshold + h) - mean_loss(threshold - h)) / (2 * h) for threshold in THRESHOLDS])


def ramp(threshold, bandwidth):
    """1[a > θ] smoothed by the rectangle: what the estimator is the derivative of."""
    return np.clip((GRID - threshold) / bandwidth + 0.5, 0, 1)


def test_the_gradient_of_l0_is_that_of_the_smoothed_step():
    bandwidth = 0.2
    expected = differences(lambda threshold: ramp(threshold, bandwidth).mean(), 1e-3)
    np.testing.assert_allclose(estimated(lambda a, z, active: active, bandwidth), expected, rtol=1e-3)


def test_the_gradient_of_a_code_is_that_of_the_smoothed_code():
    """Weighted by a smooth function of a; they differ in the second order of the bandwidth."""
    bandwidth = 0.1
    expected = differences(lambda threshold: (np.exp(GRID) * GRID * ramp(threshold, bandwidth)).mean(), 1e-3)
    found = estimated(lambda a, z, active: jnp.exp(a) * z, bandwidth)
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    assert (np.abs(found - expected / THRESHOLDS) > 0.05 * np.abs(expected)).all(), "no factor θ would pass as well"


def test_the_gradient_of_the_whole_loss_is_that_of_the_smoothed_loss():
    """(z - 0.9 a)^2 + 0.05 * 1[a > θ], averaged over thresholds in the window; they differ in its first order."""
    bandwidth, coefficient = 0.005, 0.05

    def loss(threshold):
        active = np.greater(GRID, threshold)
        return ((GRID * active - 0.9 * GRID) ** 2 + coefficient * active).mean()

    expected = differences(loss, bandwidth / 2)  # of the window's mean: the difference between its ends
    found = estimated(lambda a, z, active: (z - 0.9 * a) ** 2 + coefficient * active, bandwidth)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert (expected[1:] > 0.05).all() and 0 < expected[0] < 0.02, "either part alone would give another answer"


def test_pre_activations_get_the_gradient_of_active_codes_only():
    a, threshold = jnp.array([[0.2, 0.45, 0.55, 3.0]]), jnp.full(4, 0.5)
    by_code = jax.grad(lambda a: jnp.sum(2 * jump(a, threshold, 0.2)))(a)
    np.testing.assert_array_equal(by_code, [[0, 0, 2, 2]])
    assert not jax.grad(lambda a: jnp.sum(step(a, threshold, 0.2)))(a).any()


def gradients(dictionary, *terms):
    """The gradient of the sum of terms, by leaf name."""
    leaves, fixed = eqx.partition(dictionary, trainable(dictionary))
    gradient = jax.grad(lambda leaves: total(*terms)(eqx.combine(leaves, fixed), random_batch(), KEY)[0])(leaves)
    return {name.removeprefix("activation/"): leaf for name, leaf in named_leaves(gradient).items()}


def test_the_gate_is_trained_by_the_last_two_terms_only():
    dictionary = random_dictionary(random_gated())
    fit, l1, auxiliary = (gradients(dictionary, term) for term in (reconstruction(), gate_l1(), gate_auxiliary()))
    assert not fit["gate_bias"].any() and fit["log_scale"].any() and fit["size_bias"].any()
    for by_gate in (l1, auxiliary):
        assert by_gate["gate_bias"].any() and by_gate["encoder"].any()
        assert not by_gate["log_scale"].any() and not by_gate["size_bias"].any()
    for name in ("decoder", "decoder_bias", "skip"):
        assert fit[name].any() and not auxiliary[name].any()
    assert not any(gradient["encoder_bias"].any() for gradient in (fit, l1, auxiliary))


def test_the_penalty_on_l0_trains_thresholds_only():
    dictionary = random_dictionary(random_jumprelu())
    for term in (l0(), l0_to_target(3.0)):
        gradient = gradients(dictionary, term)
        assert gradient.pop("threshold_parameter").any()
        assert not any(leaf.any() for leaf in gradient.values())
    assert gradients(dictionary, reconstruction())["threshold_parameter"].any()


def test_features_just_below_their_threshold_have_a_say_in_l0():
    """The step is that of a: of z, which is 0 there, half of the window would be lost."""
    bandwidth, batch = 0.5, random_batch()
    dictionary = random_dictionary(random_jumprelu("raw", bandwidth))
    threshold, weight = plain(dictionary.activation.threshold), plain(batch.weight)
    distance = encoded(dictionary, batch.inputs) + plain(dictionary.encoder_bias) - threshold
    near = np.abs(distance) < bandwidth / 2
    expected = -(weight @ near) / bandwidth / weight.sum()
    np.testing.assert_allclose(gradients(dictionary, l0())["threshold_parameter"], expected, rtol=1e-4)
    assert (weight @ (near & (distance < 0))).sum() > 5, "nothing lay just below"


def test_the_terms_are_their_equations():
    gated, batch = random_dictionary(random_gated()), random_batch()
    weight, y = plain(batch.weight), plain(batch.targets)
    opened = np.maximum(encoded(gated, batch.inputs) + plain(gated.encoder_bias + gated.activation.gate_bias), 0)
    mass = opened @ np.linalg.norm(plain(gated.decoder), axis=1)
    np.testing.assert_allclose(total(gate_l1())(gated, batch, KEY)[0], mass @ weight / weight.sum(), rtol=1e-4)
    normalised = (plain(batch.inputs) - plain(gated.input_mean)) / plain(gated.input_scale)
    inner = opened @ plain(gated.decoder) + plain(gated.decoder_bias) + normalised @ plain(gated.skip)
    error = ((y - plain(gated.output_scale) * inner - plain(gated.output_mean)) ** 2).sum(1) @ weight
    value, metrics = total(gate_auxiliary())(gated, batch, KEY)
    np.testing.assert_allclose(value, error / plain(gated.target_variance) / weight.sum(), rtol=1e-4)
    np.testing.assert_allclose(metrics["gate_fvu"].value(), value)

    jumping = random_dictionary(random_jumprelu())
    a = encoded(jumping, batch.inputs) + plain(jumping.encoder_bias)
    active = (a > np.exp(plain(jumping.activation.threshold_parameter))).sum(1) @ weight / weight.sum()
    value, metrics = total(l0())(jumping, batch, KEY)
    np.testing.assert_allclose([value, metrics["l0"].value()], active, rtol=1e-5)
    np.testing.assert_allclose(total(l0_to_target(4.0))(jumping, batch, KEY)[0], (active / 4 - 1) ** 2, rtol=1e-4)


def test_tokens_without_weight_do_not_count():
    """Invariant 17."""
    batch = random_batch()
    spoiled = eqx.tree_at(
        lambda b: b.arrays, batch, jax.tree.map(lambda a: jnp.where(batch.weight[:, None] > 0, a, 1e3), batch.arrays)
    )
    jumping, gated = random_dictionary(random_jumprelu()), random_dictionary(random_gated())
    for dictionary, term in (
        (gated, gate_l1()),
        (gated, gate_auxiliary()),
        (jumping, l0()),
        (jumping, l0_to_target(2.0)),
    ):
        of = eqx.filter_value_and_grad(lambda activation, d, b, t=term: with_activation(d, activation, b, t))
        clean, dirty = (of(dictionary.activation, dictionary, b) for b in (batch, spoiled))
        jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6), clean, dirty)


def with_activation(dictionary, activation, batch, term):
    return total(term)(eqx.tree_at(lambda d: d.activation, dictionary, activation), batch, KEY)[0]


def test_a_term_for_another_activation_says_so():
    for term, wanted in ((gate_l1(), "Gated"), (gate_auxiliary(), "Gated"), (l0(), "JumpReLU")):
        with pytest.raises(UserError, match=f"activation=ReLU: this term is for {wanted}"):
            total(term)(random_dictionary(ReLU()), random_batch(), KEY)
    with pytest.raises(UserError, match=r"target=0\.0 must be positive"):
        l0_to_target(0.0)


@pytest.mark.parametrize("activation", [random_gated(), random_jumprelu("log"), random_jumprelu("raw")])
def test_folding_changes_nothing(activation):
    """Invariant 6."""
    dictionary, x = random_dictionary(activation), random_batch().inputs
    folded = fold(dictionary)
    assert float(jnp.abs(folded.encoder_bias - dictionary.encoder_bias).max()) > 0.1
    np.testing.assert_allclose(folded.encode(x).values, dictionary.encode(x).values, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(folded(x), dictionary(x), rtol=1e-4, atol=1e-3)


def test_leaves_are_trained_and_lie_with_their_features():
    for activation in (random_gated(), random_jumprelu()):
        dictionary = random_dictionary(activation)
        own = {name for name in named_leaves(dictionary) if name.startswith("activation/")}
        assert len(own) in (1, 3)
        for marks in (trainable(dictionary), per_feature(dictionary)):
            assert all(named_leaves(marks)[name] is True for name in own)


@pytest.mark.parametrize("activation", [random_gated(), random_jumprelu("log", 0.1), random_jumprelu("raw", 1e-3)])
def test_files_round_trip(tmp_path, activation):
    """Invariant 7."""
    dictionary = random_dictionary(activation)
    loaded = load_dictionary(save_dictionary(dictionary, tmp_path / "d"), activations=[Gated, JumpReLU])
    assert jax.tree.structure(loaded) == jax.tree.structure(dictionary)
    for name, leaf in named_leaves(dictionary).items():
        np.testing.assert_array_equal(leaf, named_leaves(loaded)[name], err_msg=name)
    np.testing.assert_array_equal(loaded(random_batch().inputs), dictionary(random_batch().inputs))


def test_a_file_says_which_parametrisation_it_holds(tmp_path):
    """One θ, stored in both ways: the same codes; with the flag exchanged, other ones."""
    x = random_batch().inputs
    saved = {kind: random_dictionary(random_jumprelu(kind)) for kind in ("log", "raw")}
    np.testing.assert_array_equal(saved["log"].encode(x).values, saved["raw"].encode(x).values)
    folder = save_dictionary(saved["log"], tmp_path / "d")
    static = json.loads((folder / "dictionary.json").read_text())
    assert static["activation"] == {"kind": "JumpReLU", "parametrisation": "log", "bandwidth": 0.5}
    exchanged = static | {"activation": static["activation"] | {"parametrisation": "raw"}}
    (folder / "dictionary.json").write_text(json.dumps(exchanged))
    wrong = load_dictionary(folder, activations=[JumpReLU])
    assert float(jnp.abs(wrong.encode(x).values - saved["log"].encode(x).values).max()) > 0.1


def test_a_raw_threshold_below_zero_acts_as_zero_and_can_come_back():
    below = JumpReLU(jnp.array([-0.3, 0.0, 0.3]), "raw", 0.5)
    np.testing.assert_array_equal(below.threshold, jnp.array([0, 0, 0.3], jnp.float32))
    projected = below.after_step({}, jnp.zeros((), int))
    np.testing.assert_array_equal(projected.threshold_parameter, below.threshold)
    a = jnp.array([[-0.1, 0.1, 0.25]])
    moved = jax.grad(lambda stored: jnp.sum(step(a, JumpReLU(stored, "raw", 0.5).threshold, 0.5)))
    np.testing.assert_array_equal(moved(below.threshold_parameter), [-2, -2, -2])
    logarithmic = random_jumprelu("log")
    assert logarithmic.after_step({}, jnp.zeros((), int)) is logarithmic


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match=r"threshold=0.* must be positive"):
        JumpReLU.start(4, 0.0, bandwidth=0.1)
    with pytest.raises(UserError, match=r"threshold=-1\.0"):
        JumpReLU.start(4, -1.0, bandwidth=0.1, parametrisation="raw")
    with pytest.raises(UserError, match=r"bandwidth=0\.0 must be positive"):
        JumpReLU.start(4, 1.0, bandwidth=0.0)
    assert float(JumpReLU.start(4, 0.0, bandwidth=0.1, parametrisation="raw").threshold.max()) == 0
