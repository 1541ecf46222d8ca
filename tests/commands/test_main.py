"""`jaxinterp` on a command line: what it lists, what it shows, what it says of a typing error."""

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
import tyro

import jaxinterp
from jaxinterp.commands import methods, presets, sweep, train
from jaxinterp.commands.main import main
from jaxinterp.commands.shell import kept_settings, value_of
from jaxinterp.core.errors import UserError
from jaxinterp.methods import GatedSparseAutoencoder, PerLayerTranscoders, Transcoder
from jaxinterp.methods.listed import METHODS
from tests.experiments.small_run import SMALL, write_corpus


def said(capsys, *words):
    """The exit code of `jaxinterp WORDS`, its output, and what it says of a mistake."""
    try:
        main([str(word) for word in words])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_the_methods_are_those_of_the_one_list(capsys):
    sparse = {name for name, listed in METHODS.items() if listed.family == "sparse"}
    assert set(methods.CLASSES) == sparse | {"per_layer"} and set(methods.SEVERAL) == {"per_layer", "cross_layer"}
    code, out, _ = said(capsys, "--help")
    assert code == 0 and all(name in out for name in methods.CLASSES) and "experiments" not in out
    assert said(capsys, "--version")[1] == f"jaxinterp {jaxinterp.__version__}\n"


@pytest.mark.parametrize(
    ("words", "site", "rate"),
    [
        (["transcoder"], "blocks/1/mlp", "0.002"),
        (["skip-transcoder", "--model", "tiny"], "blocks/1/mlp", "0.003"),
        (["train", "--method", "attention"], "blocks/1/attn", "0.002"),
        (["cross_layer", "--model=minilm-l6"], "blocks/*/mlp", "0.002"),
    ],
)
def test_help_shows_the_values_that_a_run_would_take(capsys, words, site, rate):
    """Kind K: `(default: None)` for the five values that matter."""
    code, out, _ = said(capsys, *words, "--help")
    shown = re.sub(r"[│\s]+", " ", out.replace("'", ""))
    assert code == 0 and f"(default: {site})" in shown and "learning-rate {None}|FLOAT" in shown
    for option, following in (("features", "activation"), ("k", "l1"), ("learning-rate", "set"), ("tokens", "heldout")):
        part = shown[shown.index(f"--{option} ") : shown.index(f"--{following}")]
        assert "default: None" not in part, option
    assert f"Adam. (default: {rate})" in shown
    assert "smollm2-135m: site blocks/1/mlp, features 4608, k 32" in shown  # every preset
    assert "SmolLM2-135M-Instruct, 4-bit (Q4_1)" in shown


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["trancoder", "--out", "x"], "no command 'trancoder'; commands: .* Did you mean 'transcoder'"),
        (["train", "--out", "x", "--method", "topk"], "topk is called sparse_autoencoder"),
        (["train", "--out", "x", "--method", "gate"], "method='gate' must be one of .* Did you mean 'gated'"),
        (["transcoder", "--out", "x", "--tokens", "1000"], "tokens=1000 are fewer than the batch_size=2048 of one"),
        (["sweep", "--out", "x", "--tokens", "1000"], "tokens=1000 are fewer than the batch_size=1024 of one step"),
        (["transcoder", "--out", "x", "--model", "gpt2"], "no model 'gpt2': .* tiny, .*hf download OWNER/gpt2"),
        (["sweep", "--out", "x", "--model", "gpt2"], "no model 'gpt2': .* tiny, .*hf download OWNER/gpt2"),
        (["preflight", "h101:8", "--model", "tiny"], "unknown chip 'h101'; known: .*v5e.*h200.*cpu, auto. Did"),
        (["graph", "--model", "tiny", "--features", "0"], "features=0 must be"),
        (["preflight", "h100", "--model", "tiny"], "write h100:8 for eight GPUs of one machine"),
        (["gated", "--out", "x", "--model", "tiny", "--set", "l2=1"], "gated has no 'l2' to set: it has .*, l1,"),
        (["gated", "--out", "x", "--model", "tiny", "--activation", "topk"], "gated has no 'activation' to set"),
        (["transcoder", "--out", "x", "--activation", "tokp"], "activation=tokp must be one of topk, .* Did you mean"),
        (["gated", "--out", "x", "--model", "tiny", "--set", "l1"], "write it as NAME=VALUE"),
        (["gated", "--out", "x", "--model", "tiny", "--set", "l1=few"], "l1=few must be of type float"),
        (["attention", "--out", "x", "--model", "tiny", "--site", "blocks/1/mlp"], "is not an attention sublayer"),
        (["cross_layer", "--out", "x", "--model", "tiny", "--site", "blocks/1/mpl"], "no site 'blocks/1/mpl"),
        (["launch", "two", "transcoder"], "launch takes a number of processes and a command, .* not 'two'"),
        (["sweep", "--out", "x", "--method", "cross_layer"], "takes several layers, and a sweep one array"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_way_out(capsys, tmp_path, monkeypatch, words, answer):
    monkeypatch.chdir(tmp_path)
    code, out, error = said(capsys, *words)
    assert "reading" not in out, "before any text is read"
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(answer, error), error
    assert not any(tmp_path.iterdir())


def test_any_hyperparameter_of_any_method_can_be_set():
    given = {"features": 8, "learning_rate": 0.1, "k": 4}
    gated = methods.make_method("gated", given, methods.read_settings("gated", ("l1=0.5", "normalise=false")))
    assert gated == GatedSparseAutoencoder(features=8, learning_rate=0.1, l1=0.5, normalise=False)
    assert methods.make_method("per_layer", given, {}) == PerLayerTranscoders(Transcoder(8, learning_rate=0.1, k=4))
    for method in methods.CLASSES:
        described = methods.described(method)
        assert "  features (" in described and not re.search(r": $", described, re.MULTILINE), method
    with pytest.raises(UserError, match="l1 is there twice"):
        methods.read_settings("gated", ("l1=1", "l1=2"))


def test_resume_takes_what_the_folder_keeps(tmp_path):
    """`--out X --resume` alone; a value that is given besides is taken, so that it can be compared."""
    assert kept_settings(train.Config, ["--out", str(tmp_path), "--resume"]) is None
    (tmp_path / "config.json").write_text(
        json.dumps({"model": "tiny", "k": 3, "set": ["l1=1"], "cache": "some/where", "forgotten": 1})
    )
    words = ["--out", str(tmp_path), "--resume"]
    kept = kept_settings(train.Config, words)
    assert kept == train.Config(tmp_path, model="tiny", k=3, set=("l1=1",), cache=train.Path("some/where"), resume=True)
    assert kept_settings(train.Config, words[:2]) is None
    assert kept_settings(train.Config, [*words, "--set", "l1=2"]).set == ()
    asked = tyro.cli(train.Config, args=[*words, "--k", "5"], default=kept)
    assert (asked.k, asked.model, asked.resume) == (5, "tiny", True)
    (tmp_path / "config.json").write_text(json.dumps({"sweep": ["k=1"], "model": "tiny"}))
    assert kept_settings(sweep.Config, words).sweep == ("k=1",)
    assert value_of(["--heldout_tokens=5", "--k", "1", "--k", "2"], "heldout-tokens") == "5"


def test_presets_follow_the_method():
    assert presets.preset_of("smollm2-135m", "per_layer").site == "blocks/*/mlp"
    assert presets.preset_of("bilinear-4x128", "transcoder").site == ""


def test_a_reader_that_goes_away_is_no_error():
    """`jaxinterp transcoder --help | head -1`."""
    program = [sys.executable, "-m", "jaxinterp", "transcoder", "--help"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


def test_the_package_is_a_program():
    """`python -m jaxinterp`, and a console script of that name."""
    done = subprocess.run([sys.executable, "-m", "jaxinterp", "--version"], capture_output=True, text=True)
    assert done.stdout == f"jaxinterp {jaxinterp.__version__}\n"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="jaxinterp") or [None]
    assert script is None or script.load() is main  # None: installed before there was one


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.CLASSES)
def test_every_method_runs_to_its_report(capsys, tmp_path, method):
    corpus = write_corpus(tmp_path / "text")
    options = [*SMALL, "--tokens", "1024", "--text", corpus, "--out", tmp_path / "out"]
    for name in ("--heldout-tokens", "--ce-tokens"):
        options[options.index(name) + 1] = "512"
    if "k" not in methods.hyperparameters(method):
        options = options[:4] + options[6:]
    if method == "group_bias":
        options += ["--set", "groups=8"]
    code, out, error = said(capsys, method, *options)
    assert code == 0, error
    assert "tiny, " in out and (tmp_path / "out/report.html").exists()
    rows = json.loads((tmp_path / "out/scoreboard.json").read_text())
    assert rows and rows[0]["fvu"] is not None
    assert (tmp_path / "out/dictionary").is_dir()


def test_a_graph_says_its_memory_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = said(capsys, "graph", "--model", "tiny", "--features", "64", "--k", "4", "--preflight")
    assert code == 0 and "nodes" in out and not list(tmp_path.iterdir())
