"""x64 and strict promotion, of the methods that factor, of those that find causes, and of every kind of MLP.

`test_x64_and_strict` asks the same of the dictionaries. Traced, not compiled: a float64 beside a float32 in a branch, a
loop or a cotangent is an error of tracing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp import feature_pages, generate, run
from jaxinterp.core.protocols import Recipe
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.activations import TopK
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.methods.causal.das import DAS
from jaxinterp.methods.causal.lineas import LinEAS
from jaxinterp.methods.causal.trained_vector import TrainedVector
from jaxinterp.methods.factor.attribution_training import AttributionParameters
from jaxinterp.methods.factor.experts import DenseRival, HiddenExperts
from jaxinterp.methods.factor.factor_analysers import MixtureOfFactorAnalysers
from jaxinterp.methods.factor.interaction_basis import LocalInteractionBasis
from jaxinterp.methods.factor.linear_transforms import LinearTransformsMethod
from jaxinterp.methods.factor.mixture_of_decoders import MixtureOfDecodersMethod
from jaxinterp.methods.factor.parameter_training import AdversarialParameters, StochasticParameters
from jaxinterp.methods.factor.product_key_neurons import ProductKeyNeuronsMethod
from jaxinterp.methods.factor.semi_nmf import SemiNMF
from jaxinterp.methods.factor.targets import LeafTarget, ProjectionTarget
from jaxinterp.methods.listed import METHODS as LISTED
from jaxinterp.methods.solved.exact_transcoder import ExactTranscoder
from jaxinterp.methods.solved.linear_map import LinearMapMethod
from jaxinterp.methods.solved.neurons import NeuronsMethod
from jaxinterp.methods.solved.principal_components import PrincipalComponentsMethod
from jaxinterp.methods.solved.random_features import RandomFeatures
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.transformer import TransformerConfig, initialise
from jaxinterp.training.fit import expand, fit
from jaxinterp.training.mesh import make_mesh
from jaxinterp.training.program import Program
from tests.models.mixtures.kinds import KINDS
from tests.training.small_x64 import CONFIG, FLOATS, ONE, SIZES, TEXT, floats, strict, subject

RESID = "blocks/1/resid/post"
TARGET = ProjectionTarget(("blocks/1/mlp/up_proj", "blocks/1/mlp/down_proj"))
PROMPTS, OTHERS = ((1, 2, 3), (4, 5, 6)), ((1, 2, 7), (4, 5, 8))
METHODS = {
    "hidden_experts": (HiddenExperts(experts=12, k=2, shared=2, rank=4), ONE),
    "full router": (HiddenExperts(experts=12, k=2, shared=2, rank=None), ONE),
    "dense rival": (DenseRival(neurons=4), ONE),
    "linear_transforms": (LinearTransformsMethod(ranks=(4, 2), k=1), ONE),
    "mixture_of_decoders": (MixtureOfDecodersMethod(features=8, hidden=4, k=2), ONE),
    "product_key_neurons": (ProductKeyNeuronsMethod(n=4, channels=2, knn=2, d_key=5), ONE),
    "peer": (ProductKeyNeuronsMethod(n=4, channels=2, knn=2, d_key=5, kind="peer"), ONE),
    "factor_analysers": (MixtureOfFactorAnalysers(regions=2, rank=2), ONE),
    "interaction_basis": (LocalInteractionBasis(directions=4, probes=2), ONE),
    "semi_nmf": (SemiNMF(features=4, sparsity=0.5), ONE),
    "stochastic_parameters": (StochasticParameters(TARGET, parts=4, hidden=4), None),
    "adversarial_parameters": (AdversarialParameters(TARGET, parts=4, hidden=4, scope="shared"), None),
    "attribution_parameters": (AttributionParameters(LeafTarget("blocks/1/mlp"), parts=4, k=2.0), None),
    "neurons": (NeuronsMethod(k=2), ONE),
    "principal_components": (PrincipalComponentsMethod(k=2), ONE),
    "linear_map": (LinearMapMethod(), ONE),
    "random_features": (RandomFeatures(features=6, k=2), ONE),
    "das": (DAS(PROMPTS, OTHERS, (1, 2), RESID), None),
    "lineas": (LinEAS(PROMPTS, OTHERS, (RESID,)), None),
    "trained_vector": (TrainedVector(PROMPTS, (1, 2), RESID), None),
}


def test_no_listed_method_is_left_out():
    others = {name for name, listed in LISTED.items() if listed.family != "sparse"}
    assert others - METHODS.keys() == {"exact_transcoder"}, "of a ReLU MLP alone: a test of its own"


@pytest.mark.parametrize("name", METHODS)
def test_the_step_is_float32_under_x64(name):
    method, site = METHODS[name]
    with jax.enable_x64(True):
        model = subject().model
        needs = method.needs(None if site is None else expand(model, site))
        recipes = method.recipe(1)
        for recipe in (recipes,) if isinstance(recipes, Recipe) else recipes:
            program = Program(recipe, needs, make_mesh(), 16, 8, 2, 0)
            with jax.set_mesh(program.mesh):
                if recipe.init_on == "device":
                    program.check(model)
                    assert floats(program.abstract_state(model)) <= FLOATS


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_in_float32_under_x64(name):
    method, site = METHODS[name]
    options = dict(SIZES) | ({"rows": 32} if name == "semi_nmf" else {})
    with jax.enable_x64(True):
        needs = method.needs(None if site is None else expand(subject().model, site))
        text = TEXT if isinstance(needs, Sites) or needs.rows != "none" or needs.windows else None
        result = fit(method, subject(), text, **({} if site is None else {"site": site}), **options)
        assert floats(result.decomposition) == FLOATS and floats(result.state) <= FLOATS
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.decomposition))


def test_an_exact_transcoder_is_float32_under_x64():
    with jax.enable_x64(True):
        relu = initialise(dataclasses.replace(CONFIG, activation="relu", gated=False), jax.random.key(0))
        found = fit(ExactTranscoder(), Subject(relu, None, "small"), TEXT, site=ONE, **SIZES)
        assert floats(found.decomposition) == FLOATS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("under", ["x64", "strict"])
def test_every_kind_of_mlp_is_float32_and_runs(kind, under):
    """Shapes and types alone, forward and backward."""
    config = TransformerConfig(
        vocab_size=16, d_model=8, layers=1, heads=2, kv_heads=2, head_dim=4, d_mlp=16, context=8, rotary_dimensions=4,
        mixture=KINDS[kind],
    )  # fmt: skip
    with jax.enable_x64(True) if under == "x64" else strict():
        model = jax.eval_shape(lambda: initialise(config, jax.random.key(0)))
        assert floats(model) == FLOATS
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)

        def loss(model, tokens):
            trace = run(model, tokens)
            return jnp.sum(trace.logits), trace["blocks/0/mlp/out"]

        gradients, out = jax.eval_shape(jax.grad(loss, has_aux=True, allow_int=True), model, tokens)
        assert floats(gradients) == FLOATS and out.dtype == jnp.float32


@pytest.mark.parametrize("under", [lambda: jax.enable_x64(True), strict], ids=["x64", "strict"])
def test_generate_and_pages_do_not_depend_on_the_process(under, texts_subject, dictionary):
    before = generate(texts_subject, "ab", max_tokens=2).text
    densities, pages = feature_pages(dictionary, texts_subject, WINDOWS, features=2, tokens=16)
    with under():
        assert generate(texts_subject, "ab", max_tokens=2).text == before
        found, shown = feature_pages(dictionary, texts_subject, WINDOWS, features=2, tokens=16)
    np.testing.assert_array_equal(found, densities)
    assert [page.index for page in shown] == [page.index for page in pages] != []


WINDOWS = [
    {"tokens": row, "weight": np.r_[0, np.ones(7)].astype(np.float32), "document": np.full(8, i, np.int32)}
    for i, row in enumerate(np.random.default_rng(0).integers(97, 120, (2, 8), np.int32))
]


@pytest.fixture(scope="module")
def texts_subject():
    config = TransformerConfig(
        vocab_size=257, d_model=8, layers=2, heads=2, kv_heads=2, head_dim=4, d_mlp=16, context=16, rotary_dimensions=4
    )
    return Subject(initialise(config, jax.random.key(0)), byte_tokenizer(), "bytes")


@pytest.fixture(scope="module")
def dictionary():
    """Eight features, two of them active at every token."""
    rows = jax.random.normal(jax.random.key(1), (2, 8, 8), jnp.float32)
    one, none = jnp.ones((), jnp.float32), jnp.zeros(8, jnp.float32)
    return Dictionary(
        encoder=rows[0], encoder_bias=none, decoder=rows[1], decoder_bias=none, skip=None, input_mean=none,
        input_scale=one, output_mean=none, output_scale=one, target_variance=one, target_mean=none,
        tokens_since_fired=jnp.zeros(8, jnp.int32), activation=TopK(2), sites=Sites(f"{ONE}/in", f"{ONE}/out"),
    )  # fmt: skip
