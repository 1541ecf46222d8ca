"""Make the goldens of the interchange tests: tiny dictionaries by other libraries' own savers, and their outputs.

    PEERS/bin/python tests/interchange/make_goldens.py             writes goldens/<name>/{its files, expected.npz}
    PEERS/bin/python tests/interchange/make_goldens.py --compare   makes them anew and compares: do they hold?
    PEERS/bin/python tests/interchange/make_goldens.py --check F   loads with the other libraries what we wrote into F

in an environment with those libraries (torch's CPU build is enough):

    PEERS/bin/python -m pip install torch==2.13.0 eai-sparsify==1.3.3 dictionary-learning==0.1.0 sae-lens==6.54.12

`expected.npz` has inputs x, codes z and outputs y as the library computes them. The tests need none of these libraries.
Weights are random and far from their usual zeros: a mistake must show. For `--check`, F holds folders as
`python -m tests.interchange.written F` writes them, each with an expected.npz of our codes and outputs.
"""

import argparse
import json
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent / "goldens"
D, D_OUT, FEATURES, ROWS, K = 12, 10, 24, 6, 5
HOOK, HOOK_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random parameters; thresholds positive, scales moderate."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * (0.4 if parameter.ndim > 1 else 0.3)
        if "threshold" in name:
            values = values.abs()
        parameter.data = values.contiguous() if parameter.is_contiguous() else values.T.contiguous().T


def expected(folder: Path, x: torch.Tensor, z: torch.Tensor, y: torch.Tensor) -> None:
    """Inputs, codes and outputs beside the files."""
    arrays = {name: array.detach().numpy() for name, array in {"x": x, "z": z, "y": y}.items()}
    np.savez(folder / "expected.npz", **arrays)


def inputs(name: str, width: int = D) -> torch.Tensor:
    return torch.tensor(
        np.random.default_rng(zlib.crc32(name.encode())).normal(size=(ROWS, width)), dtype=torch.float32
    )


def saelens_config(architecture: str, **more: Any) -> dict[str, Any]:
    transcoder = "transcoder" in architecture
    metadata = {"hook_name": HOOK if transcoder else "blocks.1.hook_resid_post", "model_name": "gpt2-small"}
    metadata |= {"hook_name_out": HOOK_OUT} if transcoder else {}
    config = {"architecture": architecture, "d_in": D, "d_sae": FEATURES, "metadata": metadata}
    config |= {"d_out": D_OUT, "apply_b_dec_to_input": False} if transcoder else {}
    return config | more


SAELENS: dict[str, dict[str, Any]] = {
    "standard": saelens_config("standard"),
    "standard-uncentred": saelens_config("standard", apply_b_dec_to_input=False),
    "topk": saelens_config("topk", k=K),
    "topk-rescaled": saelens_config("topk", k=K, rescale_acts_by_decoder_norm=True),
    "jumprelu": saelens_config("jumprelu"),
    "gated": saelens_config("gated"),
    "transcoder": saelens_config("transcoder"),
    "skip_transcoder": saelens_config("skip_transcoder"),
    "jumprelu_skip_transcoder": saelens_config("jumprelu_skip_transcoder"),
}

OLD = {
    "old-topk": {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    "old-relu": {
        "hook_point": "blocks.1.hook_resid_pre",
        "hook_point_layer": 1,
        "hook_point_head_index": None,
        "l1": 1,
    },
}
"""Configurations as versions before 6 wrote them, for weights of today's."""


def make_saelens(root: Path) -> None:
    from sae_lens import SAE

    def with_outputs(folder: Path, name: str) -> None:
        sae = SAE.load_from_disk(folder)
        x = inputs(name)
        expected(folder, x, sae.encode(x), sae(x))

    for name, config in SAELENS.items():
        folder = root / f"saelens-{name}"
        sae = SAE.from_dict(config)
        fill(sae, zlib.crc32(name.encode()))
        sae.save_model(folder)
        with_outputs(folder, name)
    for name, more in OLD.items():
        folder = root / f"saelens-{name}"
        shutil.copytree(root / "saelens-standard", folder)
        config = {"d_in": D, "d_sae": FEATURES, "dtype": "torch.float32", "model_name": "gpt2-small", "lr": 1e-4}
        config |= {"hook_name": "blocks.1.hook_resid_pre", "normalize_activations": False, "prepend_bos": True} | more
        if "hook_point" in more:
            del config["hook_name"]
        (folder / "cfg.json").write_text(json.dumps(config))
        with_outputs(folder, name)


SPARSIFY: dict[str, tuple[str, dict[str, Any]]] = {
    "sae": ("layers.1", {}),
    "transcoder": ("layers.1.mlp", {"transcode": True}),
    "skip_transcoder": ("h.1.mlp", {"transcode": True, "skip_connection": True}),
}


def make_sparsify(root: Path) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    for name, (module, more) in SPARSIFY.items():
        folder = root / f"sparsify-{name}" / module
        coder = SparseCoder(D, SparseCoderConfig(num_latents=FEATURES, k=K, **more))
        fill(coder, zlib.crc32(name.encode()))
        coder.save_to_disk(folder)
        loaded, x = SparseCoder.load_from_disk(folder), inputs(name)
        found = loaded(x)
        codes = torch.zeros(ROWS, FEATURES).scatter_(1, found.latent_indices, found.latent_acts)
        expected(folder, x, codes, found.sae_out)


def make_dictionary_learning(root: Path) -> None:
    import dictionary_learning.dictionary as classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = {
        "AutoEncoder": classes.AutoEncoder(D, FEATURES),
        "AutoEncoderNew": classes.AutoEncoderNew(D, FEATURES),
        "GatedAutoEncoder": classes.GatedAutoEncoder(D, FEATURES),
        "JumpReluAutoEncoder": classes.JumpReluAutoEncoder(D, FEATURES),
        "AutoEncoderTopK": AutoEncoderTopK(D, FEATURES, K),
        "BatchTopKSAE": BatchTopKSAE(D, FEATURES, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, FEATURES, K, [8, 16]),
    }
    for name, module in made.items():
        folder = root / f"dictionary_learning-{name}"
        folder.mkdir()
        fill(module, zlib.crc32(name.encode()))
        if "BatchTopK" in name:
            module.threshold = torch.tensor(0.7)
        # As dictionary_learning/training.py saves: a plain dictionary; one of them as an OrderedDict with _metadata.
        state = module.state_dict()
        torch.save(state if name == "AutoEncoderNew" else {k: v.cpu() for k, v in state.items()}, folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": FEATURES, "lm_name": "EleutherAI/pythia-70m"}
        trainer |= {"submodule_name": "resid_post_layer_1", "layer": 1} | ({"k": K} if hasattr(module, "k") else {})
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}))
        x = inputs(name)
        expected(folder, x, module.encode(x), module(x))


def make_gemma_scope(root: Path) -> None:
    """The file by NumPy, as it was published; the outputs by dictionary_learning's class of the same equation."""
    from dictionary_learning.dictionary import JumpReluAutoEncoder

    folder = root / "gemma-scope-2b-pt-res" / "layer_1" / "width_16k" / "average_l0_5"
    folder.mkdir(parents=True)
    module = JumpReluAutoEncoder(D, FEATURES)
    fill(module, 1)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in module.state_dict().items()})
    x = inputs("gemma_scope")
    expected(folder, x, module.encode(x), module(x))


def check(written: Path) -> int:
    """Load what we wrote with the libraries that it is for; the worst difference of codes and outputs."""
    from sae_lens import SAE
    from sparsify import SparseCoder

    worst = 0.0
    for folder in sorted(path.parent for path in written.rglob("expected.npz")):
        if (folder / "config.yaml").exists():  # circuit-tracer's: make_public_goldens.py
            continue
        ours = np.load(folder / "expected.npz", allow_pickle=False)
        x = torch.tensor(ours["x"])
        if (folder / "sae_weights.safetensors").exists():
            sae = SAE.load_from_disk(folder)
            z, y = sae.encode(x), sae(x)
        else:
            coder = SparseCoder.load_from_disk(folder)
            found = coder(x)
            z = torch.zeros(ours["z"].shape).scatter_(1, found.latent_indices, found.latent_acts)
            y = found.sae_out
        differences = [float(np.abs(ours[name] - t.detach().numpy()).max()) for name, t in (("z", z), ("y", y))]
        print(f"{folder.relative_to(written)}: codes differ by {differences[0]:.1e}, outputs by {differences[1]:.1e}")
        worst = max(worst, *differences)
    print(f"worst {worst:.1e}")
    return int(worst > 1e-5)


def make_all(root: Path) -> None:
    with torch.no_grad():
        for make in (make_saelens, make_sparsify, make_dictionary_learning, make_gemma_scope):
            make(root)


def compare() -> int:
    """The worst difference between what the committed goldens expect and what today's libraries compute."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        make_all(Path(folder))
        fresh = {path.relative_to(folder): path for path in Path(folder).rglob("expected.npz")}
        committed = {path.relative_to(HERE): path for path in HERE.rglob("expected.npz")}
        if fresh.keys() != committed.keys():
            print(f"other goldens than committed: {sorted(map(str, fresh.keys() ^ committed.keys()))}")
            return 1
        for name, path in fresh.items():
            with np.load(path) as new, np.load(committed[name]) as old:
                worst = max(worst, *(float(np.abs(new[key] - old[key]).max()) for key in old))
    print(f"worst {worst:.1e}")
    return int(worst > 1e-5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="F")
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    if arguments.check or arguments.compare:
        sys.exit(check(arguments.check) if arguments.check else compare())
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    make_all(HERE)
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{size / 1000:.0f} kB in {HERE}")
