"""The experiment as a user runs it: results, resume, and what a mistake says."""

import json
import math
import sys

import jax
import pytest

from jaxinterp.commands.on_text import OnText, prepared
from jaxinterp.commands.shell import command
from jaxinterp.commands.train import Config, main
from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.files import load_dictionary
from jaxinterp.models.files.tokenizer import byte_tokenizer
from jaxinterp.models.load import Subject, save_subject
from jaxinterp.models.transformer import TransformerConfig, initialise
from tests.experiments.small_run import SMALL, write_corpus

KEYS = {
    "method", "fvu", "l0", "dead_fraction", "ce_clean", "ce_replaced", "ce_zero", "ce_mean", "ce_recovered_zero",
    "ce_recovered_mean", "kl", "top1_agreement", "tokens", "seconds",
}  # fmt: skip


def run(*arguments):
    """Run the command line; the exit code."""
    old = sys.argv
    sys.argv = ["transcoder", *map(str, arguments)]
    try:
        command(Config, main, "test")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = old
    return 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert run(*SMALL, "--text", corpus, "--out", out) == 0
    return out


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_leaves_a_scoreboard_a_report_and_a_dictionary(finished):
    rows = json.loads((finished / "scoreboard.json").read_text())
    assert [row["method"] for row in rows] == ["skip transcoder", "neurons", "pca", "linear", "random features"]
    assert all(row.keys() >= KEYS for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert rows[0]["fvu"] < 1 and rows[0]["l0"] <= 4
    html = (finished / "report.html").read_text()
    assert "planted, random weights" in html, "the report says which checkpoint it is"
    assert "blocks/1/mlp" in html and "http" not in html.replace("http-equiv", "")
    log = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 50 and {"fvu", "l0", "dead_fraction", "tokens_per_second"} <= log[-1].keys()
    assert load_dictionary(finished / "dictionary").features == 64


@pytest.mark.slow
def test_a_finished_folder_is_not_overwritten(finished, corpus, capsys):
    """Invariant 21."""
    before = everything(finished)
    assert run(*SMALL, "--text", corpus, "--out", finished) == 2
    error = capsys.readouterr().err
    assert "is not empty: pass --resume" in error and error.count("\n") == 1
    assert run(*SMALL, "--text", corpus, "--out", finished, "--resume", "--k", "8") == 2
    assert "was run with k=4, not 8" in capsys.readouterr().err
    assert run("--out", finished, "--resume", "--k", "8") == 2
    assert "was run with k=4, not 8" in capsys.readouterr().err
    assert everything(finished) == before


def test_a_refused_cache_leaves_nothing_that_blocks_the_next_run(tmp_path, corpus, capsys):
    """The folder of the cache is looked at before the run makes one of its own."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    cache.mkdir()
    (cache / "settings.json").write_text("{}")
    for _ in range(2):  # the second is refused for the same reason, not for what the first left
        assert run(*SMALL, "--text", corpus, "--out", out, "--cache", cache) == 2
        error = capsys.readouterr().err
        assert str(cache) in error and error.count("\n") == 1 and not out.exists()


@pytest.mark.slow
def test_resuming_a_finished_run_scores_it_again_without_training(finished):
    before = (finished / "log.jsonl").read_text()
    rows = json.loads((finished / "scoreboard.json").read_text())
    assert run("--out", finished, "--resume") == 0  # every setting is in its config.json
    assert (finished / "log.jsonl").read_text() == before
    again = json.loads((finished / "scoreboard.json").read_text())
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--site", "blocks/1/mpl"], "no site 'blocks/1/mpl' in this model. Did you mean 'blocks/1/mlp'"),
        (["--site", "blocks/1/mlp/in"], "is not an MLP: name the leaf itself, such as blocks/0/mlp"),
        (["--site", "blocks/1/attn"], "is not an MLP: name the leaf itself"),
        (["--k", "65"], "k=65 must lie between 1 and features=64"),
        (["--model", "smollm2", "--site", "blocks/1/mlp"], "Did you mean 'smollm2-135m'"),
        (["--model", "no/such/folder", "--site", "blocks/1/mlp"], "there is no such path"),
        (["--text", "no/such/file.txt"], "no/such/file.txt"),
        (["--text", "dosc"], "Did you mean 'docs'"),
        (["--mesh", "data=2,rows=4"], "write it as data=2,feature=4"),
        (["--batch-size", "100"], "batch_size=100 must be a multiple of the windows' length 64"),
        (["--tokens", "100"], "tokens=100 are fewer than the batch_size=256 of one step"),
        (["--ce-tokens", "0"], "ce_tokens=0 must be at least 1"),
        (["--learning-rate", "-1"], "learning_rate=-1.0 must be positive"),
    ],
)
def test_a_mistake_gives_one_line_and_writes_nothing(tmp_path, corpus, capsys, arguments, words):
    """Invariant 21."""
    out = tmp_path / "out"
    assert run(*SMALL, "--text", corpus, "--out", out, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A saved encoder of bytes."""
    folder = tmp_path_factory.mktemp("model") / "encoder"
    config = TransformerConfig(
        vocab_size=257, d_model=32, layers=2, heads=2, kv_heads=2, head_dim=16, d_mlp=64, context=64, activation="gelu",
        gated=False, norm="layer", norm_bias=True, pre_norms=False, sum_norms=True, embedding_norm=True, causal=False,
        learned_positions=True, head=False,
    )  # fmt: skip
    save_subject(Subject(initialise(config, jax.random.key(0)), byte_tokenizer(), "encoder"), folder)
    return folder


@pytest.mark.slow
def test_an_encoder_is_scored_by_its_embeddings(tmp_path, corpus, encoder, capsys):
    options = [*SMALL, "--model", encoder, "--site", "blocks/0/mlp", "--text", corpus]
    assert run(*options, "--out", tmp_path / "refused") == 2
    assert "no logits and so no cross-entropy" in capsys.readouterr().err and not (tmp_path / "refused").exists()
    out = tmp_path / "out"
    assert run(*options, "--tokens", "2560", "--out", out, "--effect", "pooled") == 0
    rows = json.loads((out / "scoreboard.json").read_text())
    assert all(0 < row["similarity_replaced"] <= 1.00001 and "ce_clean" not in row for row in rows)
    printed = capsys.readouterr().out
    assert "similarity" in printed and "similarities on 32 windows" in printed
    assert "Similarity of embeddings" in (out / "report.html").read_text()


def test_comparisons_refuse_an_encoder_before_they_train(tmp_path, corpus, encoder):
    config = OnText(tmp_path / "out", model=str(encoder), site="blocks/0/mlp", text=str(corpus), seq=64)
    with pytest.raises(UserError, match="no logits and so no cross-entropy"):
        prepared(config)
    assert not config.out.exists()


def test_a_file_in_the_place_of_the_folder(tmp_path, corpus, capsys):
    (tmp_path / "out").write_text("kept")
    assert run(*SMALL, "--text", corpus, "--out", tmp_path / "out") == 2
    assert "is a file" in capsys.readouterr().err and (tmp_path / "out").read_text() == "kept"


def test_an_unknown_option_is_refused(capsys):
    assert run("--sitee", "blocks/1/mlp", "--out", "x") == 2
    assert "--site" in capsys.readouterr().err


def test_a_model_without_a_preset_needs_a_site(tmp_path, capsys):
    assert run("--model", tmp_path, "--out", tmp_path / "out") == 2
    assert "site is not set" in capsys.readouterr().err
