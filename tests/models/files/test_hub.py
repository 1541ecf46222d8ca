"""The hub: a real client against a server on the loopback address, with everything that goes wrong."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinterp.core.errors import UserError
from jaxinterp.decompositions.saved import load_decomposition
from jaxinterp.interchange import push, read
from jaxinterp.models.files.hub import is_repository
from jaxinterp.models.load import load
from tests.hub_server import FakeHub, serving
from tests.interchange.written import MLP, dictionary, jumprelu
from tests.models.model_files import GOLDENS

SHARDED = next(path.parent for path in sorted(GOLDENS.glob("*/model.safetensors.index.json")))
PUBLIC = Path(__file__).parents[2] / "interchange" / "goldens_public"


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one whole and one sharded model, and with a dictionary among other files."""
    whole = files_of(GOLDENS / "qwen3") | {"pytorch_model.bin": b"\x80\x04 a pickle", "README.md": b"hello"}
    dictionaries = files_of(PUBLIC / "gs2-affine" / "gemma-scope-2-1b-pt")
    dictionaries |= {"resid_post/other/params.safetensors": b"never asked for"}
    held = {"org/whole": whole, "org/sharded": files_of(SHARDED), "google/gemma-scope-2-1b-pt": dictionaries}
    held |= {"org/pickled": {"config.json": whole["config.json"], "pytorch_model.bin": b"\x80\x04 a pickle"}}
    with serving(FakeHub(held)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("JAXINTERP_TEST_CACHE", str(tmp_path / "cache"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield server


def test_first_load_then_without_a_network(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    subject = load("org/whole", cache=cache)
    assert subject.name == "org/whole"
    assert set(hub.fetched()) == {"config.json", "model.safetensors"}, "nothing else: no pickle, no README"
    golden = np.load(GOLDENS / "qwen3" / "expected.npz")
    logits = np.asarray(subject.model(jnp.asarray(golden["tokens"])))
    assert np.abs(logits - golden["logits"]).max() < 1e-4 * np.abs(golden["logits"]).max()
    asked = len(hub.requests)
    load("org/whole", cache=cache, offline=True)
    assert len(hub.requests) == asked, "offline asks nobody"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    load("org/whole", cache=cache, offline=True)
    with pytest.raises(UserError, match=r"cannot reach http://127\.0\.0\.1:9, .*open the network.*give its folder"):
        load("org/sharded", cache=cache)
    with pytest.raises(UserError, match="not in the cache, and offline is on"):
        load("org/sharded", cache=cache, offline=True)


def test_shards_and_a_revision(hub: FakeHub, tmp_path: Path) -> None:
    subject = load("org/sharded", cache=tmp_path / "cache", revision="main")
    shards = set(json.loads((SHARDED / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1 and shards <= set(hub.fetched())
    assert subject.model.config.layers
    with pytest.raises(UserError, match="has no revision 'v9'"):
        load("org/sharded", cache=tmp_path / "cache", revision="v9")


def test_a_cut_connection_is_resumed(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # instead of 10 MB
    hub.cut["model.safetensors"] = 5000
    load("org/whole", cache=tmp_path / "cache")
    ranges = [said for kind, path, said in hub.requests if kind == "GET" and path.endswith("model.safetensors")]
    assert ranges == ["", "bytes=5000-"]


def test_a_wrong_checksum_is_refused_and_the_file_deleted(hub: FakeHub, tmp_path: Path) -> None:
    hub.lies.add("model.safetensors")
    with pytest.raises(UserError, match=r"'model.safetensors' does not have the checksum that the hub states"):
        load("org/whole", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    hub.lies.clear()
    load("org/whole", cache=tmp_path / "cache")


def test_a_gated_repository_says_the_way_out(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated.add("org/whole")
    with pytest.raises(UserError, match=r"org/whole is gated: accept its terms.*pass token="):
        load("org/whole", cache=tmp_path / "cache")
    load("org/whole", cache=tmp_path / "cache", token="good")


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 7])
def test_an_index_that_leads_elsewhere_is_refused(name: object, hub: FakeHub, tmp_path: Path) -> None:
    hub.files["org/sharded"]["model.safetensors.index.json"] = json.dumps({"weight_map": {"w": name}}).encode()
    with pytest.raises(UserError, match="is not a plain safetensors file"):
        load("org/sharded", cache=tmp_path / "cache")
    assert all("evil" not in path for _, path, _ in hub.requests)


def test_pickles_are_not_fetched(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Pickles are not read"):
        load("org/pickled", cache=tmp_path / "cache")
    assert "pytorch_model.bin" not in hub.fetched()


def test_what_is_no_repository(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no repository 'org/absent' on the hub.*nothing of that name is on this disk"):
        load("org/absent", cache=tmp_path / "cache")
    assert is_repository("org/name") and is_repository("org/name/x-Q4_K_M.gguf")
    for other in ("tiny", "./org/name", "/org/name", "a/b/c", str(tmp_path), Path("org/name"), "runs/", "../x"):
        assert not is_repository(other)


def test_a_dictionary_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    place = "transcoder/layer_13_width_16k_l0_small_affine"
    found = read("google/gemma-scope-2-1b-pt", place, cache=tmp_path / "cache")
    own = read(PUBLIC / "gs2-affine" / "gemma-scope-2-1b-pt" / place)
    np.testing.assert_array_equal(found.decoder, own.decoder)
    assert found.sites == own.sites
    assert set(hub.fetched()) == {f"{place}/{name}" for name in ("params.safetensors", "config.json")}
    asked = len(hub.requests)
    read("google/gemma-scope-2-1b-pt", place, cache=tmp_path / "cache", offline=True)
    read("google/gemma-scope-2-1b-pt", f"{place}/params.safetensors", cache=tmp_path / "cache", offline=True)
    assert len(hub.requests) == asked
    with pytest.raises(
        UserError, match=r"nothing that is known is at 'transcoder/no'; there is something in resid_post"
    ):
        read("google/gemma-scope-2-1b-pt", "transcoder/no", cache=tmp_path / "cache")
    for path in ("../../x", "transcoder/../../../x"):
        with pytest.raises(UserError, match="nothing that is known is at"):
            read("google/gemma-scope-2-1b-pt", path, cache=tmp_path / "cache")


def test_a_repository_whose_names_lead_out_of_it(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["org/evil"] = {"../params.safetensors": b"x", "a/../../params.safetensors": b"x"}
    with pytest.raises(UserError, match="nothing that is known is at"):
        read("org/evil", "..", cache=tmp_path / "cache")
    assert not hub.fetched()


def test_push_writes_what_loads_again(hub: FakeHub, tmp_path: Path) -> None:
    made = dictionary(jumprelu(), MLP)
    row = {"name": "Dictionary", "fvu": 0.25, "l0": 7.5}
    address = push(made, "me/mine", row=row, config={"k": 4}, command="python -m x --k 4", token="good")
    assert address == f"{hub.address}/me/mine"
    for name, data in hub.files["me/mine"].items():
        path = tmp_path / "again" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    found = load_decomposition(tmp_path / "again")
    np.testing.assert_array_equal(found.encoder, made.encoder)
    card = (tmp_path / "again" / "README.md").read_text()
    for part in ("library_name: jaxinterp", "| fvu | 0.25 |", '"k": 4', "python -m x --k 4", "blocks/3/mlp/in"):
        assert part in card
    with pytest.raises(UserError, match=r"me/mine was not written .*that token= or HF_TOKEN may write there"):
        push(made, "me/mine", token="bad")
    with pytest.raises(UserError, match="should be like 'org/name'"):
        push(made, "mine")
