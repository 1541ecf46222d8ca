"""One short training of every method, small enough to be kept whole: what a change of structure must not change.

`python -m tests.goldens.trainings` makes the files in `tests/goldens/methods` anew. To be run only where numbers are
meant to change, with a line in docs/decisions.md that says why.
"""

from dataclasses import replace
from pathlib import Path

import grain
import jax
import numpy as np

from jaxinterp.core.batch import Sites
from jaxinterp.core.trees import named_leaves
from jaxinterp.decompositions.exact import exact_transcoder
from jaxinterp.evaluation.baselines import baselines
from jaxinterp.evaluation.planted.laboratory import Plant, train
from jaxinterp.methods import (
    AttentionSparseAutoencoder,
    CrossLayerTranscoder,
    DiscreteCodes,
    GatedSparseAutoencoder,
    GradientSparseAutoencoder,
    GroupBiasAdaptation,
    JumpReLUSparseAutoencoder,
    MatryoshkaSparseAutoencoder,
    PerLayerTranscoders,
    Resampling,
    Seeds,
    SkipTranscoder,
    SparseAutoencoder,
    Together,
    TopAFASparseAutoencoder,
    Transcoder,
)
from jaxinterp.methods.language_model import LanguageModel
from jaxinterp.models.files.subject import Subject
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.tiny import TINY, planted_transformer
from jaxinterp.training.fit import fit

FOLDER = Path(__file__).parent / "methods"
MLP, SEVERAL, ATTENTION = "blocks/0/mlp", "blocks/*/mlp", "blocks/0/attn"
SMALL = replace(
    TINY, vocab_size=64, d_model=8, layers=2, heads=2, kv_heads=1, head_dim=4, d_mlp=16, context=32, rotary_dimensions=4
)
SIZES = {"steps": 8, "batch_size": 64, "buffer_batches": 2, "log_every": 1}
SHARED = {"features": 24, "learning_rate": 1e-2, "dead_after": 100}
BATCH = SparseAutoencoder(**SHARED, k=3, activation="batch_topk")
ACROSS = {"features": 24, "learning_rate": 1e-2, "dead_after": 100}

TRAININGS = {
    "sparse_autoencoder": (SparseAutoencoder(**SHARED, k=3), MLP),
    "sparse_autoencoder_batch": (BATCH, MLP),
    "sparse_autoencoder_relu": (SparseAutoencoder(**SHARED, activation="relu", l1=0.1, array="hidden"), MLP),
    "sparse_autoencoder_in": (SparseAutoencoder(**SHARED, k=3, array="in", normalise=False), MLP),
    "transcoder": (Transcoder(**SHARED, k=3, moments="bfloat16"), MLP),
    "skip_transcoder": (SkipTranscoder(**SHARED, k=3), MLP),
    "gated": (GatedSparseAutoencoder(**SHARED, penalty_warmup=4, auxk=1 / 32), MLP),
    "jumprelu": (JumpReLUSparseAutoencoder(**SHARED, penalty_warmup=4), MLP),
    "jumprelu_target": (JumpReLUSparseAutoencoder(**SHARED, target_l0=3.0, l0=1.0, parametrisation="raw"), MLP),
    "matryoshka": (MatryoshkaSparseAutoencoder(**SHARED, k=3), MLP),
    "matryoshka_topk": (MatryoshkaSparseAutoencoder(**SHARED, k=3, activation="topk", prefixes=(4, 24)), MLP),
    "top_afa": (TopAFASparseAutoencoder(**SHARED), MLP),
    "top_afa_cap": (TopAFASparseAutoencoder(**SHARED, cap=6), MLP),
    "gradient": (GradientSparseAutoencoder(**SHARED, k=3), MLP),
    "group_bias": (GroupBiasAdaptation(**SHARED, groups=2, every=3, rate=0.05), MLP),
    "attention": (AttentionSparseAutoencoder(**SHARED, k=3), ATTENTION),
    "attention_out": (AttentionSparseAutoencoder(**SHARED, activation="relu", l1=0.1, array="out"), ATTENTION),
    "cross_layer": (CrossLayerTranscoder(**ACROSS, pre_activation=0.01), SEVERAL),
    "cross_layer_topk": (CrossLayerTranscoder(**ACROSS, activation="topk", k=2, sparsity=0.0), SEVERAL),
    "per_layer": (PerLayerTranscoders(SkipTranscoder(**SHARED, k=3)), SEVERAL),
    "together": (Together({"topk": Transcoder(**SHARED, k=3), "batch": BATCH}), MLP),
    "seeds": (Seeds(Transcoder(**SHARED, k=3), 2), MLP),
    "resampling": (
        Resampling(SparseAutoencoder(**SHARED, activation="relu", l1=3.0), every=3, last=6, dead_after=64),
        MLP,
    ),
    "language_model": (LanguageModel(), None),
}
"""(method, site) by name."""


def subject():
    """A planted model of two layers that reads 64 tokens."""
    return Subject(planted_transformer(jax.random.key(0), SMALL), byte_tokenizer(), "small")


def text():
    """64 windows of 16 random tokens, the first of each without weight."""
    tokens = np.random.default_rng(0).integers(0, 64, (64, 16), np.int32)
    weight = np.ones(16, np.float32)
    weight[0] = 0
    return grain.MapDataset.source(
        [{"tokens": row, "weight": weight, "document": np.full(16, i, np.int32)} for i, row in enumerate(tokens)]
    )


def arrays(tree):
    """Every array by its name; numbers only."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}


def of_fit(name):
    """Loss curve and final arrays of one training."""
    method, site = TRAININGS[name]
    result = fit(method, subject(), text(), site=site, **SIZES)
    numbers = {key for row in result.history for key in row} - {"tokens_per_second", "step", "tokens"}
    curves = {f"history/{key}": np.array([row[key] for row in result.history]) for key in numbers}
    return curves | arrays(result.decomposition)


def of_discrete_codes():
    """The codes of twelve examples of four heads, from a key."""
    rows = jax.random.normal(jax.random.key(1), (12, 4, 8))
    return arrays(DiscreteCodes(features=12, steps=8).train(rows, jax.random.key(2)))


def of_baselines():
    """The four solved rivals of an MLP."""
    return arrays(baselines(subject(), text(), MLP, k=3, features=24, tokens=512))


def of_exact():
    """The dictionary that is a ReLU MLP."""
    return arrays(exact_transcoder(subject().model.blocks[1].mlp, "blocks/1/mlp"))


def of_laboratory():
    """Two dictionaries of one plant, and their metrics."""
    plant = Plant(features=12, width=8, active=2)
    rows = [plant.rows(jax.random.key(seed)) for seed in (0, 1)]
    made, metrics = train(BATCH, plant.draw, rows, Sites("x", "x"), steps=8, batch_size=32)
    return arrays(made) | {f"metrics/{n}/{key}": np.array(v) for n, row in enumerate(metrics) for key, v in row.items()}


OTHERS = {
    "discrete_codes": of_discrete_codes,
    "baselines": of_baselines,
    "exact": of_exact,
    "laboratory": of_laboratory,
}


def numbers(name):
    """What the golden of this name holds."""
    return OTHERS[name]() if name in OTHERS else of_fit(name)


def main():
    """Write every golden, with the version of jax that made it."""
    FOLDER.mkdir(exist_ok=True)
    for name in [*TRAININGS, *OTHERS]:
        np.savez_compressed(FOLDER / f"{name}.npz", **numbers(name), jax=np.array(jax.__version__))
        print(name, flush=True)


if __name__ == "__main__":
    main()
