"""What other libraries call the places inside a model, and which of ours is the same array."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxinterp.core.batch import Sites
from jaxinterp.core.errors import UserError
from jaxinterp.interchange import read
from jaxinterp.interchange.gemma_scope import read_gemma_scope
from jaxinterp.interchange.names import from_hooks, from_module, from_submodule, has_post_norms, to_hook

GOLDENS = Path(__file__).parent / "goldens"
SCOPE = GOLDENS / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_5" / "params.npz"


@pytest.mark.parametrize(
    ("hook", "site", "with_post_norms"),
    [
        ("blocks.8.hook_resid_pre", "blocks/8/resid/pre", "blocks/8/resid/pre"),
        ("blocks.8.hook_mlp_out", "blocks/8/mlp/out", "blocks/8/mlp/added"),
        ("blocks.8.mlp.hook_out", "blocks/8/mlp/out", "blocks/8/mlp/out"),
        ("blocks.8.mlp.hook_post", "blocks/8/mlp/hidden", "blocks/8/mlp/hidden"),
        ("blocks.10.attn.hook_out", "blocks/10/attn/out", "blocks/10/attn/out"),
        ("blocks.10.attn.hook_z", "blocks/10/attn/z", "blocks/10/attn/z"),
    ],
)
def test_hooks(hook: str, site: str, with_post_norms: str) -> None:
    hooks = from_hooks(hook, hook)
    assert hooks.sites(False) == Sites(site, site) and not hooks.before_gain
    assert hooks.sites(True) == Sites(with_post_norms, with_post_norms)
    for post_norms in (False, True):
        for ours in (site, with_post_norms):
            written = from_hooks(to_hook(ours), to_hook(ours)).sites(post_norms)
            assert written == Sites(ours, ours) or (ours.endswith("/added") and not post_norms)


def test_hooks_that_are_not_quite_ours() -> None:
    assert from_hooks("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out").before_gain
    with pytest.raises(UserError, match="writing before the gain of a norm"):
        from_hooks("blocks.3.hook_resid_mid", "blocks.3.ln2.hook_normalized")
    with pytest.raises(UserError, match="what attention adds behind a norm of its own has no name here"):
        from_hooks("blocks.3.hook_attn_out", "blocks.3.hook_attn_out").sites(True)
    for name in ("blocks.3.hook_mlp_in", "hook_embed", "blocks.x.hook_resid_pre", "blocks.3.attn.hook_q"):
        with pytest.raises(UserError, match=r"has no counterpart here .* known: blocks\.N\.\{hook_resid_pre"):
            from_hooks(name, name)


@pytest.mark.parametrize(
    ("module", "autoencoder", "transcoder"),
    [
        ("layers.5", ("resid/post", "resid/post"), ("resid/pre", "resid/post")),
        ("layers.5.mlp", ("mlp/out", "mlp/out"), ("mlp/in", "mlp/out")),
        ("transformer.h.5.mlp", ("mlp/out", "mlp/out"), ("mlp/in", "mlp/out")),
        ("gpt_neox.layers.5.attention", ("attn/out", "attn/out"), ("attn/in", "attn/out")),
        ("model.layers.5.self_attn", ("attn/out", "attn/out"), ("attn/in", "attn/out")),
    ],
)
def test_modules(module: str, autoencoder: tuple[str, str], transcoder: tuple[str, str]) -> None:
    for kind, ports in ((False, autoencoder), (True, transcoder)):
        hooks = from_module(module, transcoder=kind)
        assert hooks is not None
        assert hooks.sites(True) == hooks.sites(False) == Sites(*(f"blocks/5/{port}" for port in ports))


def test_names_that_say_nothing() -> None:
    assert from_module("layers.5.mlp.act_fn", transcoder=False) is None
    assert from_module("embed_tokens", transcoder=False) is None
    assert from_submodule("unknown_layer_3") is None and from_submodule("resid_post") is None
    mlp = from_submodule("mlp_out_layer_3")
    assert mlp is not None and mlp.sites(False) == Sites("blocks/3/mlp/out", "blocks/3/mlp/out")
    assert has_post_norms("google/gemma-2-2b") and has_post_norms("gemma3-1b")
    assert not has_post_norms("google/gemma-2b") and not has_post_norms(None)


@pytest.mark.parametrize(
    ("kind", "reads", "writes"),
    [
        ("res", "resid/post", "resid/post"),
        ("mlp", "mlp/added", "mlp/added"),
        ("att", "attn/z", "attn/z"),
        ("transcoders", "mlp/in", "mlp/added"),
    ],
)
def test_the_folders_of_gemma_scope(kind: str, reads: str, writes: str, tmp_path: Path) -> None:
    """As a hub's cache lays them out too."""
    for root in (f"gemma-scope-2b-pt-{kind}", f"models--google--gemma-scope-9b-it-{kind}/snapshots/0123abc"):
        folder = tmp_path / root / "layer_20" / "width_16k" / "average_l0_71"
        folder.mkdir(parents=True)
        contents = read_gemma_scope(Path(shutil.copy(SCOPE, folder)))
        assert contents.hooks is not None
        assert contents.hooks.sites(contents.post_norms) == Sites(f"blocks/20/{reads}", f"blocks/20/{writes}")
        assert contents.transcoder == (reads != writes)


def test_gemma_scopes_embedding_is_known_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From within its folder, by a link, and without the repository's name; not by a folder that the whole lies in."""
    folder = tmp_path / "gemma-scope-9b-pt-res" / "embedding" / "width_4k" / "average_l0_111"
    folder.mkdir(parents=True)
    shutil.copy(SCOPE, folder)
    (tmp_path / "mine").symlink_to(folder)
    other = shutil.copytree(folder.parents[1], tmp_path / "downloads" / "embedding")
    monkeypatch.chdir(folder.parent)
    for path in (Path("average_l0_111"), tmp_path / "mine", other / "width_4k" / "average_l0_111"):
        with pytest.raises(UserError, match="dictionaries of the embedding are in other units"):
            read(path, site="embed")
    layer = tmp_path / "embedding" / "gemma-scope-9b-pt-res" / "layer_3" / "width_4k" / "average_l0_111"
    shutil.copytree(folder, layer)
    assert read(layer).sites.reads == "blocks/3/resid/post"


def with_metadata(folder: Path, **metadata: Any) -> Path:
    shutil.copytree(GOLDENS / "saelens-topk", folder)
    fields = json.loads((folder / "cfg.json").read_text())
    fields["metadata"].update(metadata)
    (folder / "cfg.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"hook_name": "blocks.3.hook_mlp_in"}, "hook_name='blocks.3.hook_mlp_in' has no counterpart .* pass site="),
        ({"hook_name": None}, r"metadata\.hook_name is missing: pass site="),
        (
            {"model_from_pretrained_kwargs": {"fold_ln": True}},
            "fold_ln=True: it was trained on a model whose activations .* pass site=",
        ),
    ],
)
def test_a_place_that_cannot_be_told_is_asked_for(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = with_metadata(tmp_path / "it", **metadata)
    with pytest.raises(UserError, match=message):
        read(folder)
    assert read(folder, site="blocks/3/resid/mid").sites.reads == "blocks/3/resid/mid"


def test_one_head_of_another_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hook_head_index=3 is not supported with hook_name=.*attn\.hook_z only"):
        read(with_metadata(tmp_path / "it", hook_head_index=3), site="blocks/3/attn/z")
