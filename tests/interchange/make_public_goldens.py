"""Goldens of public formats: tiny files in the layout of a published release, and what the peers' own loaders make of
them.

    PEERS/bin/python tests/interchange/make_public_goldens.py TRACER             writes goldens_public/<case>/...
    PEERS/bin/python tests/interchange/make_public_goldens.py TRACER --check F   opens what we wrote into F

in the environment of make_goldens.py. TRACER is a folder with circuit-tracer 0.5.0 unpacked (pip install --no-deps
--target TRACER circuit-tracer==0.5.0): only its modules for transcoders are used, which need nothing else.

Files of Gemma Scope 2, Llama Scope, Qwen-Scope and so on are made by NumPy in the shapes of the release and go through
SAELens 6.54.12's own loader for that release, whose downloads are pointed at the folder; circuit-tracer and sparsify
write their own. `expected.npz` has inputs x, codes z and outputs y; `case.json` what to read, and how.
"""

import argparse
import importlib
import json
import re
import shutil
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent / "goldens_public"
D, D_OUT, FEATURES, ROWS, K = 12, 10, 24, 6, 5


def draw(name: str, *shape: int, scale: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(f"{name}{shape}".encode()))
    return (rng.normal(size=shape) * scale).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))


def done(case: str, path: str, x: Any, z: Any, y: Any, **how: Any) -> None:
    arrays = {name: np.asarray(torch.as_tensor(array).detach()) for name, array in {"x": x, "z": z, "y": y}.items()}
    np.savez(HERE / case / "expected.npz", **arrays)
    (HERE / case / "case.json").write_text(json.dumps({"path": path} | how, indent=1) + "\n")


def through_saelens(case: str, repository: str, release: str, sae_id: str, **sizes: int) -> tuple[Any, str]:
    """The peer's own object, from files in the case's folder."""
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import get_repo_id_and_folder_name

    root = HERE / case / repository

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = root / (subfolder or "") / filename
        if not path.exists():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(array.shape) for name, array in load_file(root / filename).items()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = download, shapes
    named = loaders.get_conversion_loader_name(release)
    known = importlib.import_module("sae_lens.loading.pretrained_sae_loaders").NAMED_PRETRAINED_SAE_LOADERS

    def converter(**options: Any) -> Any:
        config, arrays, sparsity = known[named](**options)
        return config | sizes, arrays, sparsity

    sae, *_ = SAE.from_pretrained_with_cfg_and_sparsity(release, sae_id, converter=converter, dtype="float32")
    return sae, str(Path(repository) / str(get_repo_id_and_folder_name(release, sae_id)[1]))


def saelens_case(
    case: str,
    repository: str,
    release: str,
    sae_id: str,
    x: np.ndarray,
    sizes: dict[str, int] | None = None,
    **how: Any,
) -> None:
    sae, path = through_saelens(case, repository, release, sae_id, **(sizes or {}))
    given = torch.tensor(x)
    done(case, path, x, sae.encode(given), sae.decode(sae.encode(given)) if "skip" not in how else sae(given), **how)


def gemma_scope_2() -> None:
    arrays = {"w_enc": draw("we", D, FEATURES), "b_enc": draw("be", FEATURES), "threshold": abs(draw("t", FEATURES))}
    here = arrays | {"w_dec": draw("wd", FEATURES, D), "b_dec": draw("bd", D)}
    there = arrays | {"w_dec": draw("wd", FEATURES, D_OUT), "b_dec": draw("bd", D_OUT)}
    affine = there | {"affine_skip_connection": draw("s", D, D_OUT)}
    layer, hook = "layer_13_width_16k_l0_small", "model.layers.13."
    cases = [
        ("gs2-res", "res", f"resid_post/{layer}", here, {"hf_hook_point_in": f"{hook}output"}),
        ("gs2-mlp", "mlp", f"mlp_out/{layer}", here, {"hf_hook_point_in": f"{hook}post_feedforward_layernorm.output"}),
        ("gs2-att", "att", f"attn_out/{layer}", here, None),
        ("gs2-transcoder", "transcoders", f"transcoder/{layer}", there, None),
        (
            "gs2-affine",
            "transcoders",
            f"transcoder/{layer}_affine",
            affine,
            {
                "hf_hook_point_in": f"{hook}pre_feedforward_layernorm.output",
                "hf_hook_point_out": f"{hook}post_feedforward_layernorm.output",
                "affine_connection": True,
            },
        ),
    ]
    for case, kind, path, held, config in cases:
        folder = HERE / case / "gemma-scope-2-1b-pt" / path
        folder.mkdir(parents=True)
        save_file(held, folder / "params.safetensors")
        if config is not None:
            said = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"} | config
            (folder / "config.json").write_text(json.dumps(said))
        sae_id = path if kind == "transcoders" else path.split("/")[1]
        x = draw(case, ROWS, D, scale=1)
        sae, where = through_saelens(case, "gemma-scope-2-1b-pt", f"gemma-scope-2-1b-pt-{kind}", sae_id)
        done(case, where, x, sae.encode(torch.tensor(x)), sae(torch.tensor(x)))


def llama_scope() -> None:
    arrays = {
        "encoder.weight": draw("lw", FEATURES, D),
        "encoder.bias": draw("lb", FEATURES),
        "decoder.weight": np.ascontiguousarray(unit(draw("ld", FEATURES, D)).T),
        "decoder.bias": draw("lo", D),
    }
    repository, path = "Llama3_1-8B-Base-LXM-8x", "Llama3_1-8B-Base-L16M-8x"
    folder = HERE / "llama-scope" / repository / path
    (folder / "checkpoints").mkdir(parents=True)
    save_file(arrays, folder / "checkpoints" / "final.safetensors")
    said = {
        **{"hook_point_in": "blocks.16.hook_mlp_out", "hook_point_out": "blocks.16.hook_mlp_out", "d_model": D},
        **{"d_sae": FEATURES, "act_fn": "jumprelu", "jump_relu_threshold": 0.3, "norm_activation": "dataset-wise"},
        **{"dataset_average_activation_norm": {"in": 2.5, "out": 2.5}, "sparsity_include_decoder_norm": True},
        **{"apply_decoder_bias_to_pre_encoder": False, "use_decoder_bias": True, "use_glu_encoder": False, "top_k": 50},
    }
    (folder / "hyperparams.json").write_text(json.dumps(said))
    x = draw("llama", ROWS, D, scale=1)
    from sae_lens.loading import pretrained_saes_directory as directory
    from sae_lens.saes import sae as module

    scale = float(np.sqrt(D) / 2.5)
    module.get_norm_scaling_factor = lambda *_: scale  # of this file, as SAELens's directory has it for the release
    assert directory.get_norm_scaling_factor("llama_scope_lxm_8x", "l16m_8x") is not None
    sae, where = through_saelens("llama-scope", repository, "llama_scope_lxm_8x", "l16m_8x")
    given = torch.tensor(x)
    done("llama-scope", where, x, sae.encode(given) / scale, sae(given))

    case, repository, path = "llama-scope-r1", "Llama-Scope-R1-Distill", "800M-Slimpajama-0-OpenR1-Math-220k/L15R"
    folder = HERE / case / repository / path
    folder.mkdir(parents=True)
    save_file(
        arrays | {"log_jumprelu_threshold": np.log(abs(draw("lt", FEATURES)))}, folder / "sae_weights.safetensors"
    )
    said = {"hook_point_in": "blocks.15.hook_resid_post", "hook_point_out": "blocks.15.hook_resid_post", "d_model": D}
    said |= {"expansion_factor": 2, "act_fn": "jumprelu", "norm_activation": "dataset-wise", "sae_type": "sae"}
    said |= {"sparsity_include_decoder_norm": True, "use_decoder_bias": True, "dtype": "torch.float32"}
    (folder / "config.json").write_text(json.dumps(said))
    sae, where = through_saelens(case, repository, "llama_scope_r1_distill", "l15r_800m_slimpajama")
    done(case, where, x, sae.encode(given), sae(given), scaling_factor=scale)


def torch_files() -> None:
    from sae_lens.loading import pretrained_sae_loaders as loaders

    tensor = {
        "W_enc": torch.tensor(draw("qe", FEATURES, D)),
        "W_dec": torch.tensor(draw("qd", D, FEATURES)),
        "b_enc": torch.tensor(draw("qb", FEATURES)),
        "b_dec": torch.tensor(draw("qo", D)),
    }
    sizes = {"d_in": D, "d_sae": FEATURES}
    x, case = draw("q", ROWS, D, scale=1), "qwen-scope"
    small = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    folder = HERE / case / small
    folder.mkdir(parents=True)
    torch.save(tensor, folder / "layer14.sae.pt")
    own = loaders.get_qwen_scope_config_from_hf

    def fewer(*given: Any, **options: Any) -> dict[str, Any]:
        config = own(*given, **options)
        return config | {"activation_fn_kwargs": {"k": K}}

    loaders.get_qwen_scope_config_from_hf = fewer
    saelens_case(case, small, "qwen-scope-3-1.7b-base-w32k-l50", "layer14", x, sizes)

    case, name = (
        "hook-z",
        "gpt2-small_L6_Hcat_z_lr1.20e-03_l11.10e+00_ds24576_bs4096_dc1.00e-06_rsanthropic_rie25000_nr4_v9",
    )
    repository = "attn-saes-gpt2-small-all-layers"
    folder = HERE / case / repository
    folder.mkdir(parents=True)
    along = {"W_enc": tensor["W_enc"].T.contiguous(), "W_dec": tensor["W_dec"].T.contiguous()}
    torch.save(along | {"b_enc": tensor["b_enc"], "b_dec": tensor["b_dec"]}, folder / f"{name}.pt")
    said = {"act_size": D, "dict_size": FEATURES, "act_name": "blocks.6.attn.hook_z", "layer": 6}
    (folder / f"{name}_cfg.json").write_text(json.dumps(said))
    sae, where = through_saelens(case, repository, "gpt2-small-hook-z-kk", "blocks.6.hook_z")
    heads = torch.tensor(x.reshape(ROWS, 3, D // 3))
    done(case, where, x, sae.encode(heads), sae(heads).reshape(ROWS, D))

    linear = {"encoder_linear.weight": tensor["W_enc"], "encoder_linear.bias": tensor["b_enc"]}
    linear |= {"decoder_linear.weight": tensor["W_dec"], "decoder_linear.bias": tensor["b_dec"]}
    case, repository, file = "goodfire", "Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"
    folder = HERE / case / repository
    folder.mkdir(parents=True)
    torch.save(linear, folder / file)
    saelens_case(case, repository, "goodfire-llama-3.1-8b-instruct", "layer_19", x, sizes, site="blocks/19/resid/post")

    case, repository = "deepseek-r1", "DeepSeek-R1-Distill-Llama-8B-SAE-l19"
    folder = HERE / case / repository
    folder.mkdir(parents=True)
    bare = {name.replace("_linear", ""): array for name, array in linear.items()}
    torch.save(bare, folder / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt")
    release = "deepseek-r1-distill-llama-8b-qresearch"
    saelens_case(case, repository, release, "blocks.19.hook_resid_post", x, sizes, site="blocks/19/resid/post")


def saelens_norms() -> None:
    from sae_lens import SAE

    for kind in ("layer_norm", "constant_norm_rescale"):
        case = f"saelens-{kind}"
        config = {"architecture": "topk", "k": K, "d_in": D, "d_sae": FEATURES, "normalize_activations": kind}
        config |= {"metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2-small"}}
        sae = SAE.from_dict(config)
        for name, parameter in sae.named_parameters():
            parameter.data = torch.tensor(draw(f"{kind}{name}", *parameter.shape))
        sae.save_model(HERE / case / "it")
        sae = SAE.load_from_disk(HERE / case / "it")
        x = draw(kind, ROWS, D, scale=3) + 1
        z = sae.encode(torch.tensor(x))
        done(case, "it", x, z, sae.decode(z))


def sparsify_groups() -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    case = "sparsify-groupmax"
    k = 6
    coder = SparseCoder(D, SparseCoderConfig(num_latents=FEATURES, k=k, activation="groupmax", transcode=True))
    for name, parameter in coder.named_parameters():
        parameter.data = torch.tensor(draw(f"group{name}", *parameter.shape))
    coder.save_to_disk(HERE / case / "layers.1.mlp")
    x = torch.tensor(draw("group", ROWS, D, scale=1))
    found = SparseCoder.load_from_disk(HERE / case / "layers.1.mlp")(x)
    z = torch.zeros(ROWS, FEATURES).scatter_(1, found.latent_indices, found.latent_acts)
    done(case, "layers.1.mlp", x, z, found.sae_out)


def tracer_modules(root: Path) -> tuple[Any, Any]:
    """circuit-tracer's two modules of transcoders, without the package around them and what that needs."""
    for name, path in {"circuit_tracer": root / "circuit_tracer", "circuit_tracer.utils": None}.items():
        module = types.ModuleType(name)
        module.__path__ = [str(path)] if path else []
        sys.modules[name] = module
    sys.modules["circuit_tracer.utils"].get_default_device = lambda: torch.device("cpu")
    package = types.ModuleType("circuit_tracer.transcoder")
    package.__path__ = [str(root / "circuit_tracer" / "transcoder")]
    sys.modules["circuit_tracer.transcoder"] = package
    names = ("single_layer_transcoder", "cross_layer_transcoder")
    return tuple(importlib.import_module(f"circuit_tracer.transcoder.{name}") for name in names)


def tracer_outputs(path: Path, layer: int, x: torch.Tensor, single: Any) -> tuple[torch.Tensor, torch.Tensor]:
    coder = single.load_relu_transcoder(
        str(path), layer, device=torch.device("cpu"), lazy_encoder=False, lazy_decoder=False
    )
    z = coder.encode(x)
    y = coder.decode(z, x) if coder.W_skip is not None else coder.decode(z)
    return z, y


def circuit_tracer(root: Path) -> None:
    single, cross = tracer_modules(root)
    for case, more in {
        "tracer-relu": {},
        "tracer-jump-skip": {"activation_function.threshold": abs(draw("tt", FEATURES)), "W_skip": draw("ts", D, D)},
    }.items():
        repository = "qwen3-4b-transcoders"
        folder = HERE / case / repository
        folder.mkdir(parents=True)
        arrays = {"W_enc": draw("te", FEATURES, D), "W_dec": draw("td", FEATURES, D)}
        arrays |= {"b_enc": draw("tb", FEATURES), "b_dec": draw("to", D)} | more
        save_file(arrays, folder / "layer_3.safetensors")
        config = "model_name: Qwen/Qwen3-4B\nmodel_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
        (folder / "config.yaml").write_text(config + "feature_output_hook: hook_mlp_out\n")
        x = torch.tensor(draw(case, ROWS, D, scale=1))
        z, y = tracer_outputs(folder / "layer_3.safetensors", 3, x, single)
        done(case, f"{repository}/layer_3.safetensors", x, z, y)
    for case, threshold in {"tracer-clt": None, "tracer-clt-jump": 0.4}.items():
        layers, folder = 3, HERE / case / "clt"
        folder.mkdir(parents=True)
        activation = "relu" if threshold is None else "jump_relu"
        clt = cross.CrossLayerTranscoder(
            layers,
            FEATURES,
            D,
            activation_function=activation,
            lazy_decoder=False,
            lazy_encoder=False,
            feature_input_hook="mlp.hook_in",
            feature_output_hook="mlp.hook_out",
            dtype=torch.float32,
        )
        for name, parameter in clt.named_parameters():
            values = draw(f"{case}{name}", *parameter.shape)
            parameter.data = torch.tensor(abs(values) if "threshold" in name else values)
        clt.to_safetensors(str(folder))
        config = "model_name: google/gemma-3-1b\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: mlp.hook_in\n"
        (folder / "config.yaml").write_text(
            config.replace("google/gemma-3-1b", "Qwen/Qwen3-4B") + "feature_output_hook: mlp.hook_out\n"
        )
        loaded = cross.load_clt(str(folder), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)
        x = torch.tensor(draw(case, layers, ROWS, D, scale=1))
        z = loaded.encode(x)
        done(case, "clt", x, z, loaded.decode(z))


def check(root: Path, written: Path) -> int:
    """Open what we wrote with circuit-tracer's own loaders; the worst difference of codes and outputs."""
    single, cross = tracer_modules(root)
    worst = 0.0
    for folder in sorted(path.parent for path in written.rglob("expected.npz")):
        if not (folder / "config.yaml").exists():
            continue
        ours = np.load(folder / "expected.npz", allow_pickle=False)
        x = torch.tensor(ours["x"])
        if "cross_layer" in (folder / "config.yaml").read_text():
            clt = cross.load_clt(str(folder), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)
            z = clt.encode(x)
            y = clt.decode(z)
        else:
            (path,) = folder.glob("layer_*.safetensors")
            z, y = tracer_outputs(path, int(re.findall(r"layer_(\d+)", path.name)[0]), x, single)
        differences = [float(np.abs(ours[n] - t.detach().numpy()).max()) for n, t in (("z", z), ("y", y))]
        print(f"{folder.relative_to(written)}: codes differ by {differences[0]:.1e}, outputs by {differences[1]:.1e}")
        worst = max(worst, *differences)
    print(f"worst {worst:.1e}")
    return int(worst > 1e-5)


def main() -> int:
    """Make the goldens, or check what we wrote."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tracer", type=Path)
    parser.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    if arguments.check:
        return check(arguments.tracer, arguments.check)
    shutil.rmtree(HERE, ignore_errors=True)
    for make in (gemma_scope_2, llama_scope, torch_files, saelens_norms, sparsify_groups):
        make()
    circuit_tracer(arguments.tracer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
