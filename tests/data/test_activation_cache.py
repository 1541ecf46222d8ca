"""Activations on disk: the same training from them, harvests that were cut off, damage, and what is refused."""

import json
import os
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.core.trees import named_leaves
from jaxinterp.data import activation_cache
from jaxinterp.data.activation_cache import cache_activations, cached_windows, harvested_once, holds
from jaxinterp.methods import SkipTranscoder
from jaxinterp.models.load import Subject, load
from jaxinterp.models.run import run
from jaxinterp.training.fit import fit
from jaxinterp.training.mesh import make_mesh

METHOD = SkipTranscoder(features=64, k=4, dead_after=500, learning_rate=3e-3)
NAMES = METHOD.needs("blocks/1/mlp").names()
SIZES = {"site": "blocks/1/mlp", "steps": 20, "batch_size": 256, "buffer_batches": 4, "log_every": 10}


@pytest.fixture(scope="module")
def subject():
    return load("tiny")


@pytest.fixture(scope="module")
def text():
    tokens = np.random.default_rng(0).integers(0, 256, (100, 32), np.int32)
    weight = np.ones(32, np.float32)
    weight[0] = 0
    document = np.zeros(32, np.int32)
    return grain.MapDataset.source([{"tokens": row, "weight": weight, "document": document} for row in tokens])


@pytest.fixture(scope="module")
def folder(subject, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "activations"
    cache_activations(subject, text, NAMES, folder, windows_per_shard=32)
    return folder


def test_windows_come_back_with_their_activations(subject, text, folder):
    cached = cached_windows(folder)
    assert len(cached) == 100
    trace = run(subject.model, jnp.asarray(text[97]["tokens"])[None])
    assert set(cached[97]) == {"tokens", "weight", "document", *NAMES}
    np.testing.assert_array_equal(cached[97]["tokens"], text[97]["tokens"])
    for name in NAMES:
        np.testing.assert_allclose(cached[97][name], trace[name][0], rtol=0, atol=2e-5)


def test_no_more_files_are_open_than_a_process_may_have(subject, text, tmp_path, monkeypatch):
    monkeypatch.setattr(activation_cache, "OPEN_FILES", 3)
    cache_activations(subject, text, NAMES, tmp_path / "a", windows_per_shard=5)
    cached = cached_windows(tmp_path / "a")
    order = np.random.default_rng(0).permutation(100)
    for place in order:
        np.testing.assert_array_equal(cached[int(place)]["tokens"], text[int(place)]["tokens"])
        names = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        assert sum(name.startswith(str(tmp_path)) for name in names) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_training_from_the_cache_is_the_fused_training(subject, text, folder, mesh):
    """Invariant 24: the same tokens in the same order give the same decomposition."""
    fused = fit(METHOD, subject, text, **SIZES)
    cached = fit(METHOD, subject, cached_windows(folder), **SIZES, mesh=make_mesh(*mesh))
    assert cached.history[-1]["loss"] == pytest.approx(fused.history[-1]["loss"], abs=1e-5)
    for name, leaf in named_leaves(fused.decomposition).items():
        np.testing.assert_allclose(named_leaves(cached.decomposition)[name], leaf, rtol=0, atol=3e-5, err_msg=name)


def test_the_model_is_not_run_on_cached_windows(subject, text, folder):
    """Other arrays in the cache, other training: what is read is what was stored."""
    shifted = cached_windows(folder).map(lambda window: window | {name: window[name] + 1000 for name in NAMES})
    found = fit(METHOD, subject, shifted, **SIZES)
    assert float(jnp.abs(found.decomposition.target_mean - 1000).max()) < 100


def test_a_harvest_goes_on_where_it_was_cut_off(subject, text, tmp_path):
    """Two processes take every second shard; one is lost and only it is made again."""
    for part in (0, 1):
        cache_activations(subject, text, NAMES, tmp_path / "a", windows_per_shard=32, part=part, parts=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.arrayrecord")}
    assert len(before) == 4
    (tmp_path / "a" / "00002.json").unlink()
    with pytest.raises(UserError, match="shard 2 of 4 is missing: harvest again"):
        cached_windows(tmp_path / "a")
    cache_activations(subject, text, NAMES, tmp_path / "a", windows_per_shard=32)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").glob("*.arrayrecord")}
    assert [name for name in before if before[name] != after[name]] == ["00002.arrayrecord"]
    assert len(cached_windows(tmp_path / "a")) == 100


def test_a_shorter_run_takes_a_beginning_of_what_is_there(subject, text, folder):
    assert holds(folder, subject, text, NAMES) and holds(folder, subject, text[:40], NAMES)
    assert not holds(folder, subject, text[1:40], NAMES)
    assert not holds(folder, subject, text, (*NAMES, "blocks/0/mlp/in"))
    assert not holds(folder, subject, text, NAMES, dtype="bfloat16")
    for change in (lambda leaf: -leaf, lambda leaf: 2 * leaf, lambda leaf: leaf[::-1], lambda leaf: 1.1 * leaf):
        other = Subject(jax.tree.map(change, subject.model), None, subject.name)
        assert not holds(folder, other, text, NAMES), "the same name, other weights"
    with pytest.raises(UserError, match="holds other activations: its weights is"):
        harvested_once(other, text, NAMES, folder)
    assert len(harvested_once(subject, text[:40], NAMES, folder)) == 40


def test_two_processes_may_begin_together(subject, text, tmp_path):
    """What the other has not finished writing is not a foreign file."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "settings.123.part").write_text("{")
    cache_activations(subject, text, NAMES, tmp_path / "a")
    assert len(cached_windows(tmp_path / "a")) == 100


def test_half_as_many_bytes_in_bfloat16(subject, text, folder, tmp_path):
    cache_activations(subject, text, NAMES, tmp_path / "narrow", dtype="bfloat16", windows_per_shard=32)
    wide, narrow = (
        sum(path.stat().st_size for path in at.glob("*.arrayrecord")) for at in (folder, tmp_path / "narrow")
    )
    assert narrow < 0.65 * wide  # files come in blocks of 64 KB
    window = cached_windows(tmp_path / "narrow")[3]
    assert window[NAMES[0]].dtype == jnp.bfloat16
    np.testing.assert_allclose(window[NAMES[0]].astype(np.float32), cached_windows(folder)[3][NAMES[0]], rtol=0.01)


def test_damage_is_told(subject, text, tmp_path):
    cache_activations(subject, text, NAMES, tmp_path / "a", windows_per_shard=64)
    shard = tmp_path / "a" / "00000.arrayrecord"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=r"has another size than when it was written: delete .*00000.json"):
        cached_windows(tmp_path / "a")
    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    damaged = cached_windows(tmp_path / "a")
    with pytest.raises(UserError, match=r"window \d+: damaged \(.*delete .*00000.json and harvest again"):
        [damaged[place] for place in range(64)]


def test_other_activations_are_refused(subject, text, folder, tmp_path):
    with pytest.raises(UserError, match="holds other activations: its windows is 100, not 50"):
        cache_activations(subject, text[:50], NAMES, folder, windows_per_shard=32)
    with pytest.raises(UserError, match="no site 'blocks/9/mlp/in'"):
        cache_activations(subject, text, ("blocks/9/mlp/in",), tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no activations"):
        cache_activations(subject, text, NAMES, tmp_path / "full")
    settings = json.loads((folder / "settings.json").read_text())
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "settings.json").write_text(json.dumps(settings | {"format": "another"}))
    with pytest.raises(UserError, match="is not of the form 'jaxinterp activations, 2'"):
        cached_windows(tmp_path / "c")


def test_too_little_space_is_told_before_compute(subject, text, tmp_path, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    with pytest.raises(UserError, match=r"take up to .* GB, but 0.0 GB are free"):
        cache_activations(subject, text, NAMES, tmp_path / "a")
