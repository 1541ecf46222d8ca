"""SAELens's directory: names resolve to files, and what files do not say comes with them."""

import json
import lzma
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinterp.core.errors import UserError
from jaxinterp.core.sites import Sites
from jaxinterp.decompositions.dictionary import Dictionary
from jaxinterp.decompositions.per_token import PerToken
from jaxinterp.interchange import count, directory, read, releases
from jaxinterp.interchange.formats import read_place
from jaxinterp.interchange.public_models import MODELS, SAME, shrunken
from jaxinterp.interchange.releases import lookup, place, release_of, snapshot_of
from jaxinterp.interchange.samples import D, shape_of, write_sample
from tests.hub_server import FakeHub, serving


def test_all_names_are_there() -> None:
    found = directory()
    assert len(found) == 170 and sum(len(release.entries) for release in found.values()) == 13_857
    assert {release.loader for release in found.values()} - {*releases.FORMATS} == {"temporal"}
    assert {release.model for release in found.values()} == {*MODELS, *SAME}
    assert releases.SNAPSHOT.stat().st_size < 30_000


def test_a_snapshot_is_what_it_was_made_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = {"repo_id": "a/b", "model": "m", "conversion_func": None, "config_overrides": {"normalize_activations": "x"}}
    said |= {"saes": [{"id": "one", "path": "one", "norm_scaling_factor": 0.5}, {"id": "two", "path": 3}]}
    made = {"r": release_of("r", said)}
    monkeypatch.setattr(releases, "SNAPSHOT", tmp_path / "x.xz")
    monkeypatch.setattr(releases, "_installed", lambda: None)
    releases.SNAPSHOT.write_bytes(snapshot_of(made))
    assert directory.__wrapped__() == made
    assert b"repository" in lzma.decompress(releases.SNAPSHOT.read_bytes())


def test_names_resolve() -> None:
    release, entry = lookup("gemma-scope-2b-pt-mlp-canonical/layer_12/width_16k/canonical") or (None, None)
    assert release is not None and entry is not None
    known = place(release, entry)
    assert known.repository == "google/gemma-scope-2b-pt-mlp" and known.format == "gemma_scope"
    assert known.path.startswith("layer_12/width_16k/average_l0_")
    assert lookup("gemma-scope-2b-pt-mlp-canonical/layer_12/width_16k") == (release, entry), "only one begins so"
    assert lookup("no-such-release/x") is None
    with pytest.raises(
        UserError, match=r"has 5 entries 'layer_12/width_16k' of 260; it has layer_12/width_16k/average"
    ):
        lookup("gemma-scope-2b-pt-mlp/layer_12/width_16k")
    with pytest.raises(UserError, match="has 0 entries 'layer_99' of 260"):
        lookup("gemma-scope-2b-pt-mlp/layer_99")
    with pytest.raises(UserError, match="is not supported: its codes depend on the tokens before"):
        place(*(lookup("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post") or ()))


CASES = {
    "gemma-scope-2b-pt-mlp-canonical/layer_12/width_16k/canonical": ("blocks/12/mlp/added",) * 2,
    "gemma-scope-2-1b-pt-transcoders/transcoder/layer_13_width_16k_l0_small_affine": (
        "blocks/13/mlp/in",
        "blocks/13/mlp/added",
    ),
    "mwhanna-qwen3-14b-transcoders/layer_20": ("blocks/20/mlp/in", "blocks/20/mlp/out"),
    "qwen-scope-3-8b-base-w64k-l50/layer18": ("blocks/18/resid/post",) * 2,
    "llama_scope_lxa_8x/l16a_8x": ("blocks/16/attn/out",) * 2,
    "goodfire-llama-3.1-8b-instruct/layer_19": ("blocks/19/resid/post",) * 2,
    "sae_bench_pythia70m_sweep_gated_ctx128_0730/blocks.3.hook_resid_post__trainer_0": ("blocks/3/resid/post",) * 2,
}


@pytest.mark.parametrize("name", CASES)
def test_a_sample_is_read_where_it_belongs(name: str, tmp_path: Path) -> None:
    release, entry = lookup(name) or (None, None)
    assert release is not None and entry is not None
    found = read_place(place(release, entry), write_sample(release, entry, tmp_path))
    assert found.sites == Sites(*CASES[name])
    assert np.all(np.isfinite(found(jnp.ones((2, D)))))


def test_what_files_do_not_say_comes_with_the_name(tmp_path: Path) -> None:
    """A scale, centred streams, and a norm of each token: of releases whose files leave them out."""
    release, entry = lookup("llama_scope_r1_distill/l15r_800m_slimpajama") or (None, None)
    assert release is not None and entry is not None and entry.scale is not None
    scaled = read_place(place(release, entry), write_sample(release, entry, tmp_path / "a"))
    assert isinstance(scaled, Dictionary)
    np.testing.assert_allclose(float(scaled.input_scale), 1 / entry.scale, rtol=1e-6)
    release, entry = lookup("gpt2-small-res-jb/blocks.8.hook_resid_pre") or (None, None)
    assert release is not None and entry is not None
    centred = read_place(place(release, entry), write_sample(release, entry, tmp_path / "b"))
    assert isinstance(centred, Dictionary)
    np.testing.assert_allclose(np.asarray(centred.encoder).mean(axis=1), 0, atol=1e-6)
    assert centred.skip is not None, "the mean passes"
    for name, kind in [("mistral-7b-res-wg/blocks.8.hook_resid_pre", "constant_norm")]:
        release, entry = lookup(name) or (None, None)
        assert release is not None and entry is not None
        found = read_place(place(release, entry), write_sample(release, entry, tmp_path / kind))
        assert isinstance(found, PerToken) and found.kind == kind


SCALED = {
    *(f"gpt2-small-mlp-tm/blocks.{layer}.hook_mlp_out" for layer in range(12)),
    "gemma-2b-res-jb/blocks.12.hook_resid_post",
}
"""Those whose files say expected_average_only_in, by the table of its files that SAELens publishes (sae_table.md)."""


@pytest.mark.parametrize("said", ["expected_average_only_in", True, "none"])
def test_a_scale_of_the_directory_is_used_where_the_file_asks_for_one(said: str | bool, tmp_path: Path) -> None:
    """x is multiplied by it and y divided, as SAELens folds it; a file that says `none` was not scaled."""
    release, entry = lookup("gemma-2b-res-jb/blocks.12.hook_resid_post") or (None, None)
    assert release is not None and entry is not None and entry.scale == 0.21381938399317255
    folder = write_sample(release, entry, tmp_path)
    fields = json.loads((folder / "cfg.json").read_text())
    assert fields["normalize_activations"] == "expected_average_only_in"
    (folder / "cfg.json").write_text(json.dumps(fields | {"normalize_activations": said}))
    found = read_place(place(release, entry), folder)
    arrays = {name: array.astype(np.float64) for name, array in load_file(folder / "sae_weights.safetensors").items()}
    x = np.random.default_rng(0).normal(size=(5, D)) * 9
    outputs = {}
    for scale in (1.0, entry.scale):
        codes = np.maximum((x * scale - arrays["b_dec"]) @ arrays["W_enc"] + arrays["b_enc"], 0)
        outputs[scale] = (codes @ arrays["W_dec"] + arrays["b_dec"]) / scale
    right, other = (outputs[scale] for scale in ((1.0, entry.scale) if said == "none" else (entry.scale, 1.0)))
    assert np.abs(right - other).max() > 1, "the scale matters"
    np.testing.assert_allclose(np.asarray(found(jnp.asarray(x, jnp.float32))), right, rtol=1e-4, atol=1e-3)


def test_a_scale_that_is_not_used_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 13 that SAELens scales by its directory count; none of them where the files do not ask for it."""
    scaled = [
        (release, entry)
        for release in directory().values()
        for entry in release.entries.values()
        if release.loader == "saelens" and entry.scale is not None
    ]
    assert {f"{release.name}/{entry.name}" for release, entry in scaled} == SCALED
    few = {name: directory()[name] for name in ("gpt2-small-mlp-tm", "gemma-2b-res-jb")}
    found = count.count(few)
    assert [(each.counted, each.samples) for each in found] == [(12, 1), (5, 4)]
    assert all("norm_scaling_factor" in each.values for each in found)

    def unscaled(release: releases.Release, entry: releases.Entry, root: Path) -> Path:
        folder = write_sample(release, entry, root)
        fields = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(fields | {"normalize_activations": "none"}))
        return folder

    monkeypatch.setattr(count, "write_sample", unscaled)
    broken = count.count(few)
    assert [each.counted for each in broken] == [0, 4]
    assert all("was not used" in each.reasons[0] for each in broken)


@pytest.mark.parametrize(
    ("name", "site", "why"),
    [
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", "blocks/8/resid/pre", None),
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", "blocks/7/resid/pre", "its name says layer 8"),
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", "blocks/8/resid/post", "its name says hook_resid_pre"),
        ("llama_scope_lxa_8x/l16a_8x", "blocks/1/attn/out", "its name says layer 16"),
    ],
)
def test_a_wrong_place_is_not_counted(name: str, site: str, why: str | None) -> None:
    _, entry = lookup(name) or (None, None)
    assert entry is not None
    found = count.misplaced(entry, site)
    assert found is None if why is None else why in str(found)


def test_read_by_name_fetches_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "gemma-scope-2b-pt-mlp-canonical/layer_12/width_16k/canonical"
    release, entry = lookup(name) or (None, None)
    assert release is not None and entry is not None
    folder = write_sample(release, entry, tmp_path / "there")
    held = {f"{entry.path}/params.npz": (folder / "params.npz").read_bytes(), "README.md": b"x"}
    with serving(FakeHub({release.repository: held})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        found = read(name, cache=tmp_path / "cache")
        assert hub.fetched() == [f"{entry.path}/params.npz"]
    assert found.sites == Sites("blocks/12/mlp/added", "blocks/12/mlp/added")


def test_the_count_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three releases: all of one, none of another, all but the embedding's of a third; and a model that is unknown."""
    every = directory()
    names = ["gemma-scope-2-270m-pt-transcoders", "temporal-sae-gemma-2-2b", "gemma-scope-2b-pt-res"]
    found = count.count({name: every[name] for name in names})
    embedding = [entry for entry in every[names[2]].entries.values() if entry.path.startswith("embedding")]
    assert [each.counted for each in found] == [2, 0, 316 - len(embedding)] and len(embedding) == 4
    assert "are in other units" in found[2].reasons[0]
    lines = count.table(found, "loader")
    assert lines[-1] == "| all | 319 | 314 | 314 |"
    monkeypatch.setitem(MODELS, "gemma-2-2b", {"model_type": "unheard"})
    assert [each.counted for each in count.count({names[2]: every[names[2]]})] == [0]


def test_a_small_model_keeps_what_makes_its_kind() -> None:
    small = shrunken(MODELS["google/gemma-3-27b-pt"])
    text = small["text_config"]
    assert (
        text["num_hidden_layers"] == 8
        and text["rope_scaling"]["factor"] == 8.0
        and text["query_pre_attn_scalar"] == 168
    )
    assert shape_of(*(lookup("gemma-scope-2-1b-pt-res/layer_13_width_16k_l0_small") or ())) == "resid_post"
