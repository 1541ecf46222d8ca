"""A made-up report with realistic numbers and text: nothing in it was measured."""

import numpy as np
import pytest

from jaxinterp.report.content import FeaturePage, NeuronMatch, Report, TokenContext

SENTENCES = (
    "The result is returned as a new array; the argument itself is never changed.",
    "If *axis* is None (the default), the mean is over all axes.\n\n    Parameters\n    ----------\n    x : array\n",
    "And God said, Let there be light: and there was light.\n",
    "A generator expression yields a new generator object. Its syntax is the same as for comprehensions,\nexcept that "
    "it is enclosed in parentheses instead of brackets or curly braces.",
    'raise ValueError(f"expected shape {shape}, got {x.shape}")\n        return x @ w + b\n',
    "We use the chain rule to differentiate through the solver, which needs one more linear solve.",
    "Note that this function does not check whether the matrix is symmetric <b>or</b> positive definite & finite.",
    "the children of Israel went out with an high hand in the sight of all the Egyptians 🌍.\n",
)

METHODS = (
    ("skip transcoder", 0.177, 32.0, 0.043, 3.555, 0.081, 0.842),
    ("neurons", 0.383, 32.0, 0.002, 3.594, 0.114, 0.801),
    ("pca", 0.522, 32.0, 0.0, 3.633, 0.149, 0.774),
    ("linear", 0.815, None, None, 3.707, 0.214, 0.731),
    ("random features", 0.914, 32.0, 0.0, 3.741, 0.251, 0.702),
)


def split(text: str) -> list[str]:
    """Words with their leading space, as a byte-pair tokenizer would cut them."""
    pieces: list[str] = []
    for character in text:
        starts = not pieces or character in " \n.,;:()[]{}\"'" or pieces[-1][-1] in "\n(["
        if starts:
            pieces.append(character)
        else:
            pieces[-1] += character
    return pieces


def scoreboard() -> list[dict]:
    clean, zero, mean = 3.511, 3.768, 3.722
    rows = []
    for method, fvu, l0, dead, replaced, kl, top1 in METHODS:
        rows.append(
            {
                "method": method,
                "fvu": fvu,
                "fvu_interval": [fvu - 0.011, fvu + 0.012],
                "l0": l0,
                "dead_fraction": dead,
                "ce_clean": clean,
                "ce_replaced": replaced,
                "ce_replaced_interval": [replaced - 0.021, replaced + 0.022],
                "ce_zero": zero,
                "ce_mean": mean,
                "ce_recovered_zero": (zero - replaced) / (zero - clean),
                "ce_recovered_mean": (mean - replaced) / (mean - clean),
                "kl": kl,
                "top1_agreement": top1,
                "tokens": 8_192,
                "seconds": 4.2 + 3 * fvu,
            }
        )
    return rows


def curves(steps: int = 440) -> list[dict]:
    random = np.random.default_rng(1)
    rows = []
    for step in range(steps):
        decay = np.exp(-step / 40)
        fvu = 0.175 + 0.8 * decay + 0.15 * np.exp(-step / 160) + 0.006 * random.standard_normal()
        rows.append(
            {
                "step": step,
                "tokens": 2048 * (step + 1),
                "loss": float(fvu + 0.03 * np.exp(-step / 60)),
                "fvu": float(fvu),
                "l0": float(32 - 0.6 * decay),
                "dead_fraction": float(0.043 + 0.3 * np.exp(-step / 70) * (1 - np.exp(-step / 12))),
                "tokens_per_second": float(4900 + 90 * random.standard_normal()),
            }
        )
    return rows


def context(random: np.random.Generator, seed_text: int, length: int, strength: float, dense: bool) -> TokenContext:
    text = " ".join(SENTENCES[(seed_text + shift) % len(SENTENCES)] for shift in range(6))
    tokens = (split(text) * 3)[: length + 7][seed_text % 7 :][:length]
    peak = min(length // 2 + int(random.integers(-2, 3)), len(tokens) - 1)
    active = random.random(len(tokens)) < (1.0 if dense else 0.09)
    values = np.where(active, strength * random.random(len(tokens)) * 0.7, 0.0)
    values[peak] = strength
    return TokenContext(tuple(tokens), tuple(float(value) for value in values), peak)


def feature(index: int, contexts: int = 8, length: int = 40, dense: bool = False) -> FeaturePage:
    random = np.random.default_rng(index)
    largest = float(2 + 9 * random.random())
    falling = sorted((largest * (1 - 0.07 * place) for place in range(contexts)), reverse=True)
    counts = np.round(900 * np.exp(-np.arange(24) / 3.1) * random.uniform(0.6, 1.3, 24)).astype(int)
    counts[-1] = 1
    logits = np.sort(random.gamma(2.0, 0.12, 20))[::-1]
    words = [" the", " returns", "\n", " argument", "ing", " array", "(", " God", "  ", " value", " None", "</b>"]
    named = [words[int(place)] for place in random.integers(0, len(words), 20)]
    return FeaturePage(
        index=index,
        density=float(10 ** random.uniform(-4.4, -1.2)),
        max_activation=largest,
        contexts=tuple(context(random, index + place, length, value, dense) for place, value in enumerate(falling)),
        histogram_edges=tuple(float(edge) for edge in np.linspace(0, largest, 25)),
        histogram_counts=tuple(int(one) for one in counts),
        raised=tuple((named[place], float(logits[place])) for place in range(8)),
        lowered=tuple((named[place + 8], -float(logits[place]) * 0.7) for place in range(8)),
        neurons=tuple(
            NeuronMatch(int(random.integers(1536)), float(0.62 * 0.8**rank), float(random.uniform(-0.2, 0.5)))
            for rank in range(6)
        ),
        read_write_cosine=float(random.normal(0.05, 0.2)),
    )


def densities(features: int = 4_608) -> np.ndarray:
    random = np.random.default_rng(3)
    values = np.minimum(10 ** random.normal(-2.5, 0.55, features), 0.9)
    values[random.random(features) < 0.043] = 0.0
    return values


def sample(features: int = 64, contexts: int = 8, dense: bool = False) -> Report:
    """The whole made-up report."""
    return Report(
        title="Skip transcoder on blocks/1/mlp",
        subtitle="SmolLM2-135M, one MLP taken apart into 4,608 features",
        facts={
            "model": "smollm2-135m (Q4_1, dequantised)",
            "site": "blocks/1/mlp",
            "method": "skip_transcoder, TopK",
            "features": "4,608",
            "k": "32",
            "tokens": "901,120",
            "seed": "0",
            "corpus hash": "sha256 5f1c9ad0e2b7…",
            "versions": "jaxinterp 0.1.0, jax 0.10.2, equinox 0.13.8",
            "command": "python -m experiments.transcoder --model smollm2 --site blocks/1/mlp --features 4608 --k 32",
        },
        scoreboard=scoreboard(),
        curves=curves(),
        densities=densities(),
        features=tuple(feature(17 + 71 * place, contexts, dense=dense) for place in range(features)),
    )


@pytest.fixture
def report() -> Report:
    return sample(features=5, contexts=3)


@pytest.fixture
def big_report() -> Report:
    return sample(features=100, contexts=10)
