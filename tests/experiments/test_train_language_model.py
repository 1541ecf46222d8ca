"""The recipe of a language model, small: fifty steps, resumed, and read back."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import own_text
from experiments.train_language_model import (
    Config,
    beginning_of,
    command_of,
    heldout_loss,
    main,
    shape_of,
    start_model,
)
from jaxinterp.commands.launch import free_port
from jaxinterp.core.errors import UserError
from jaxinterp.data.text.sources import load_corpus
from jaxinterp.data.tokens import split
from jaxinterp.models.files.tokenizer import tokenizer_from_file
from jaxinterp.models.load import load
from jaxinterp.models.run import run
from jaxinterp.models.sites import sites
from jaxinterp.training.hosts import VARIABLE
from jaxinterp.training.tracking import read_rows
from tests.experiments.small_language_model import config

WORDS = "the sum of squares along an axis returns array shape with given value when no other is".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three hundred documents of random sentences."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = (" ".join(rng.choice(WORDS, rng.integers(20, 60))) + "." for _ in range(300))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    """The folder of a finished run of fifty steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    main(config(corpus, out, track=f"{out}-also.jsonl"))
    return out


def test_fifty_steps_learn_and_leave_a_model_that_can_be_loaded(trained, corpus):
    """Must: the recipe runs, the loss falls, and what was written gives what is stated."""
    rows = list(csv.DictReader((trained / "model" / "loss.csv").open()))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50]
    assert float(rows[-1]["loss"]) < 0.75 * float(rows[0]["loss"])
    subject = load(trained / "model")
    assert subject.name == "bilinear-1x64" and "blocks/0/mlp" in sites(subject.model)
    assert subject.model.blocks[0].mlp.activation == "identity" and subject.tokenizer.vocab_size == 300
    recipe = json.loads((trained / "model" / "recipe.json").read_text())
    assert heldout_loss(trained / "model") == recipe["heldout"]
    assert recipe["heldout"]["tokens"] == 1024 and abs(recipe["heldout"]["ce"] - float(rows[-1]["loss"])) < 0.5
    assert recipe["settings"]["tokens"] == 25_600 and "--d-model 64" in recipe["command"]
    found = load_corpus(str(corpus), subject.tokenizer)
    assert recipe["corpus"]["content_hash"] == found.content_hash
    assert [row["step"] for row in read_rows(f"{trained}-also.jsonl")] == [10, 20, 30, 40, 50]


def test_the_heldout_tokens_are_of_documents_that_training_never_saw(trained, corpus):
    tokenizer = tokenizer_from_file(trained / "tokenizer.json")
    train, heldout = split(load_corpus(str(corpus), tokenizer), 0.1)
    kept = np.load(trained / "model" / "heldout.npy")
    assert kept.dtype == np.uint16 and np.array_equal(
        kept, np.concatenate([heldout.document(i) for i in range(heldout.documents)])[:1024]
    )
    assert not {*train.keys.tolist()} & {*heldout.keys.tolist()}


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_model(trained, corpus, tmp_path, monkeypatch):
    """Invariant 9: killed at step 30, which the tokenizer and the tokens on disk outlive."""
    import experiments.train_language_model as module

    real = module.fit
    monkeypatch.setattr(module, "fit", lambda *args, **options: real(*args, **options, stop_after=30))
    monkeypatch.setattr(module, "finish", lambda *args: pytest.fail("finished"), raising=True)
    with pytest.raises(pytest.fail.Exception):
        main(config(corpus, tmp_path / "out"))
    monkeypatch.undo()
    main(config(corpus, tmp_path / "out", resume=True))
    one, two = (load(folder / "model") for folder in (trained, tmp_path / "out"))
    for ours, theirs in zip(jax.tree.leaves(one.model), jax.tree.leaves(two.model), strict=True):
        assert np.array_equal(ours, theirs)
    files = ["heldout.npy", "loss.csv", "tokenizer.json", "jaxinterp.json"]
    assert all((trained / "model" / f).read_bytes() == (tmp_path / "out" / "model" / f).read_bytes() for f in files)


@pytest.mark.slow
def test_a_dense_mlp_is_trained_too(corpus, tmp_path):
    main(config(corpus, tmp_path / "out", mlp="relu", tokens=10 * 512))
    model = load(tmp_path / "out" / "model").model
    assert model.blocks[0].mlp.gate_proj is None
    out = run(model, jnp.arange(8, dtype=jnp.int32)[None])["blocks/0/mlp/out"]
    assert np.abs(out).max() > 1e-3, "it started at zero and learned to write"


@pytest.mark.parametrize(
    ("mlp", "leaf"),
    [("gelu", (False, "gelu")), ("relu", (False, "relu")), ("gated", (True, "silu")), ("bilinear", (True, "identity"))],
)
def test_every_kind_of_mlp_starts_as_the_identity_and_can_learn(corpus, tmp_path, mlp, leaf):
    model = start_model(shape_of(config(corpus, tmp_path, mlp=mlp)), 0)
    found = model.blocks[0].mlp
    assert (found.gate_proj is not None, found.activation) == leaf
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    assert not np.any(run(model, tokens)["blocks/0/mlp/out"])
    gradient = jax.grad(lambda model: jnp.sum(model(tokens)[..., 0] ** 2))(model)
    assert np.any(gradient.blocks[0].mlp.down_proj.weight) and np.any(gradient.blocks[0].attn.o_proj.weight)


def test_the_command_of_the_defaults_is_short(tmp_path):
    assert command_of(Config(out=tmp_path)) == "python -m experiments.train_language_model --out OUT"
    assert "--mlp relu" in command_of(Config(out=tmp_path, mlp="relu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"heads": 3}, "d_model=64 must be a multiple of heads=3"),
        ({"heads": 64}, "rotary_dimensions=1 must be even"),
        ({"vocabulary": 100}, "vocabulary=100 must be at least 257"),
        ({"batch_size": 100}, "batch_size=100 must be a multiple"),
        ({"track": "nowhere"}, "track='nowhere'"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_no_folder(corpus, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        main(config(corpus, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_tracker_is_made_when_text_and_folder_are_accepted(corpus, tmp_path):
    """What a service would show, or a file would lose, by a run that is refused."""
    log = tmp_path / "log.jsonl"
    log.write_text("of an earlier run")
    for changes in ({"vocabulary": 100_000}, {"text": str(tmp_path / "no.jsonl")}):
        with pytest.raises(UserError):
            main(replace(config(corpus, tmp_path / "out", track=str(log)), **changes))
        assert log.read_text() == "of an earlier run" and not (tmp_path / "out").exists()


def test_the_tokenizer_sees_every_part_of_a_mixture_by_its_weight(corpus, tmp_path, monkeypatch):
    parts = {name: tmp_path / f"{name}.jsonl" for name in ("one", "two")}
    for name, path in parts.items():
        path.write_text("".join(f'{{"text": "{name} {index:05}"}}\n' for index in range(2000)))
    seen = []
    real = own_text.train_tokenizer
    monkeypatch.setattr(own_text, "train_tokenizer", lambda documents, size: real(seen_of(documents), size))
    monkeypatch.setattr(own_text, "TOKENIZER_TEXT", 6000)

    def seen_of(documents):
        seen.extend(documents)
        return seen

    own_text.text_of(f"{parts['one']}:2+{parts['two']}:1", 260, tmp_path)
    counts = [sum(document.text.startswith(name) for document in seen) for name in parts]
    assert counts == [445, 223], "of nine characters each: 4000 and 2000, and what crosses the line"


WORKER = """
import sys
from jaxinterp.training.hosts import join
join()
from pathlib import Path
from experiments.train_language_model import main
from tests.experiments.small_language_model import config
main(config(sys.argv[1], Path(sys.argv[2]), mesh="data=2", tokens=10 * 512, track=sys.argv[2] + "-also.jsonl"))
"""


@pytest.mark.slow
def test_two_processes_train_one_model(corpus, tmp_path):
    """Invariant 5. The first process alone writes the log and the model, and says where it is."""
    main(config(corpus, tmp_path / "alone", tokens=10 * 512))
    out, address = tmp_path / "out", f"localhost:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(corpus), str(out)],
            env=os.environ
            | {
                "XLA_FLAGS": "--xla_backend_optimization_level=0",
                "JAX_PLATFORMS": "cpu",
                VARIABLE: f"{address},2,{index}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "Held-out cross-entropy" in said[0][0] and "cross-entropy" not in said[1][0]
    rows, expected = (read_rows(folder / "log.jsonl") for folder in (out, tmp_path / "alone"))
    assert [row["step"] for row in rows] == [row["step"] for row in read_rows(f"{out}-also.jsonl")] == [10]
    assert abs(rows[0]["loss"] - expected[0]["loss"]) < 1e-3
    one, two = (load(folder / "model") for folder in (out, tmp_path / "alone"))
    for ours, theirs in zip(jax.tree.leaves(one.model), jax.tree.leaves(two.model), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_the_heldout_sample_is_the_beginning(corpus, trained):
    tokenizer = tokenizer_from_file(trained / "tokenizer.json")
    whole = load_corpus(str(corpus), tokenizer)
    assert np.array_equal(beginning_of(whole, 50), whole.ids[:50])
    assert len(beginning_of(whole, 10**9)) == whole.tokens
