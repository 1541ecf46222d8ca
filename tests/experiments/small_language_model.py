"""The sizes of a language model that trains in seconds."""

from experiments.train_language_model import (
    Config,
)


def config(corpus, out, **changes):
    small = {
        "layers": 1, "d_model": 64, "d_mlp": 128, "heads": 2, "vocabulary": 300, "tokens": 50 * 512, "seq": 64,
        "batch_size": 512, "heldout_tokens": 1024, "save_every": 20,
    }  # fmt: skip
    return Config(out=out, text=str(corpus), **small | changes)
