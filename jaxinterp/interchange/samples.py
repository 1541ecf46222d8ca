"""Tiny files in the layout of a public release: what `count` reads to say that a release can be read.

Sizes are small and weights random; names of folders, files, arrays and fields are those that SAELens's loader of the
release asks for. A sample shows that a layout is read and where it belongs; that its numbers are right is shown by the
goldens of the tests, which the peers' own loaders made.
"""

import json
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jaxinterp.core.json_value import Json
from jaxinterp.interchange.releases import Entry, Release

D, FEATURES = 32, 128
"""`D` is the width of the small models of `public_models.py`."""

OWN_SCALE = ("llama_scope",)
"""Loaders whose files hold the scale that SAELens's YAML repeats: readers take it from the file, into the weights."""

Arrays = Mapping[str, np.ndarray]


def draw(*shape: int) -> np.ndarray:
    """Normal numbers of that shape, the same every time."""
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def write_sample(release: Release, entry: Entry, root: Path) -> Path:
    """Write the files of an entry below `root`, as they lie in its repository; the file or folder to read.

    Raises:
      KeyError: nothing is known of the release's loader.
    """
    repository = root / release.repository.split("/")[1]
    return WRITE[release.loader](release, entry, repository)


def shape_of(release: Release, entry: Entry) -> str:
    """What distinguishes entries of one release: those of one shape differ in numbers only."""
    if release.loader == "gemma_3":
        kind = re.findall(r"resid_post|attn_out|mlp_out|transcoder|crosscoder|clt", entry.path)[0]
        return f"{kind}{', affine' if entry.path.endswith('_affine') else ''}"
    if release.loader == "gemma_2":
        return "embedding" if entry.path.startswith("embedding") else release.repository.rpartition("-")[2]
    if release.loader == "dictionary_learning_1":
        return _class(release)
    return release.loader


def values_of(release: Release, entry: Entry) -> tuple[str, ...]:
    """Every value of SAELens's YAML that says how an entry is read: what entries of one sample must have in common.

    Numbers in names and paths are left out: layers, widths, sparsities. Links, dashboards and measures are not read.
    """
    said = [f"{release.loader} {shape_of(release, entry)}", f"name {_pattern(entry.name)}"]
    said += [] if entry.path == entry.name else [f"path {_pattern(entry.path)}"]
    scale = "norm_scaling_factor (in the files, too, which are believed)"
    scale = scale if release.loader in OWN_SCALE else "norm_scaling_factor"
    said += [] if entry.scale is None else [scale]
    return (*said, *(f"{name}={json.dumps(value)}" for name, value in sorted(release.overrides.items())))


def _pattern(text: str) -> str:
    """A name with its numbers and sizes left out."""
    return re.sub(r"small|medium|big", "#", re.sub(r"\d+", "#", text))


def _class(release: Release) -> str:
    """Which class of dictionary_learning the trainers of a release make."""
    text = f"{release.name} {release.repository} {next(iter(release.entries.values())).path}".lower()
    if "matryoshka" in text:
        return "MatryoshkaBatchTopKSAE"
    if "andyrdt" in text:
        return "BatchTopKSAE"
    if "gated" in text:
        return "GatedAutoEncoder"
    return "AutoEncoderTopK" if "topk" in text else "AutoEncoder"


def _gemma_2(release: Release, entry: Entry, root: Path) -> Path:
    folder = root / entry.path
    folder.mkdir(parents=True)
    arrays = {"W_enc": draw(D, FEATURES), "W_dec": draw(FEATURES, D), "b_enc": draw(FEATURES), "b_dec": draw(D)}
    np.savez(folder / "params.npz", **arrays, threshold=abs(draw(FEATURES)))  # type: ignore[arg-type]
    return folder


def _gemma_3(release: Release, entry: Entry, root: Path) -> Path:
    folder = root / entry.path
    folder.mkdir(parents=True)
    arrays = {"w_enc": draw(D, FEATURES), "w_dec": draw(FEATURES, D), "b_enc": draw(FEATURES), "b_dec": draw(D)}
    affine = {"affine_skip_connection": draw(D, D)} if entry.path.endswith("_affine") else {}
    save_file({**arrays, "threshold": abs(draw(FEATURES)), **affine}, folder / "params.safetensors")
    layer, module = re.findall(r"layer_(\d+)", entry.path)[0], "post_feedforward_layernorm.output"
    kinds = {"resid_post": "output", "attn_out": "self_attn.o_proj.input", "mlp_out": module}
    reads = next((name for kind, name in kinds.items() if kind in entry.path), "pre_feedforward_layernorm.output")
    said = {"architecture": "jump_relu", "model_name": release.model.split("/")[1].replace("-3", "-v3")}
    said |= {"hf_hook_point_in": f"model.layers.{layer}.{reads}"}
    if "transcoder" in entry.path:
        said |= {"hf_hook_point_out": f"model.layers.{layer}.{module}", "affine_connection": bool(affine)}  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def _saelens(release: Release, entry: Entry, root: Path) -> Path:
    folder = root / entry.path
    folder.mkdir(parents=True)
    arrays = {"W_enc": draw(D, FEATURES), "W_dec": draw(FEATURES, D), "b_enc": draw(FEATURES), "b_dec": draw(D)}
    hook = re.findall(r"blocks\.\d+\.hook_[a-z_]+", entry.name)[0].rstrip("_")
    fields: dict[str, Json] = {"d_in": D, "d_sae": FEATURES, "dtype": "torch.float32", "hook_point": hook}
    fields |= {"hook_point_layer": int(hook.split(".")[1]), "hook_point_head_index": None, "model_name": release.model}
    if entry.scale is not None:  # of gpt2-small-mlp-tm and gemma-2b-res-jb: SAELens's table of its files says so
        fields |= {"normalize_activations": "expected_average_only_in"}
    if "v5" in release.name:
        fields |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "normalize_activations": "layer_norm"}
    if "matryoshka" in release.name:
        arrays |= {"threshold": abs(draw(FEATURES))}
        fields = {"architecture": "jumprelu", "d_in": D, "d_sae": FEATURES, "apply_b_dec_to_input": True}
        fields |= {"metadata": {"sae_lens_version": "6.0.0", "hook_name": hook, "model_name": release.model}}
    save_file(arrays, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(fields))
    return folder


def _dictionary_learning(release: Release, entry: Entry, root: Path) -> Path:
    folder = root / entry.path
    folder.mkdir(parents=True)
    name, layer = _class(release), int(re.findall(r"layer_(\d+)", entry.path)[0])
    scalar = lambda number, kind: np.asarray(number, kind)
    arrays = {"encoder.weight": draw(FEATURES, D), "encoder.bias": draw(FEATURES), "decoder.weight": draw(D, FEATURES)}
    if name == "AutoEncoder":
        arrays |= {"bias": draw(D)}
    elif name == "GatedAutoEncoder":
        del arrays["encoder.bias"]
        arrays |= {part: draw(FEATURES) for part in ("gate_bias", "r_mag", "mag_bias")} | {"decoder_bias": draw(D)}
    else:
        arrays |= {"b_dec": draw(D), "k": scalar(4, np.int64), "threshold": scalar(0.3, np.float32)}
    if name == "MatryoshkaBatchTopKSAE":
        arrays = {part: arrays[part] for part in ("b_dec", "k", "threshold")}
        arrays |= {"W_enc": draw(D, FEATURES), "W_dec": draw(FEATURES, D), "b_enc": draw(FEATURES)}
        arrays |= {"group_sizes": np.asarray([FEATURES // 2] * 2, np.int64)}
    save_torch(folder / "ae.pt", arrays)
    trainer = {"dict_class": name, "activation_dim": D, "dict_size": FEATURES, "layer": layer, "lm_name": release.model}
    trainer |= {"submodule_name": f"resid_post_layer_{layer}"} | ({"k": 4} if "k" in arrays else {})
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}))
    return folder


def _llama_scope(release: Release, entry: Entry, root: Path) -> Path:
    folder = root / entry.path
    (folder / "checkpoints").mkdir(parents=True)
    arrays = {"encoder.weight": draw(FEATURES, D), "encoder.bias": draw(FEATURES)}
    arrays |= {"decoder.weight": draw(D, FEATURES), "decoder.bias": draw(D)}
    kinds = {"A": "hook_attn_out", "M": "hook_mlp_out", "R": "hook_resid_post"}
    layer, kind = re.findall(r"L(\d+)([AMR])", entry.path)[0]
    fields: dict[str, Json] = {"hook_point_in": f"blocks.{layer}.{kinds[kind]}", "d_model": D, "d_sae": FEATURES}
    fields |= {"hook_point_out": fields["hook_point_in"], "act_fn": "jumprelu", "norm_activation": "dataset-wise"}
    fields |= {"use_decoder_bias": True, "sparsity_include_decoder_norm": True}
    if release.loader == "llama_scope":
        fields |= {"jump_relu_threshold": 0.3, "dataset_average_activation_norm": {"in": 2.0, "out": 2.0}}
        fields |= {"apply_decoder_bias_to_pre_encoder": False, "top_k": 50}
        save_file(arrays, folder / "checkpoints" / "final.safetensors")
        (folder / "hyperparams.json").write_text(json.dumps(fields))
    else:
        save_file(arrays | {"log_jumprelu_threshold": draw(FEATURES)}, folder / "sae_weights.safetensors")
        (folder / "config.json").write_text(json.dumps(fields | {"expansion_factor": 2, "sae_type": "sae"}))
    return folder


def _circuit_tracer(release: Release, entry: Entry, root: Path) -> Path:
    root.mkdir(parents=True)
    arrays = {"W_enc": draw(FEATURES, D), "W_dec": draw(FEATURES, D), "b_enc": draw(FEATURES), "b_dec": draw(D)}
    config = f"model_name: {release.model}\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    if release.loader == "mntss_clt_layer_transcoder":
        number = int(entry.path)
        named = {f"{name}_{number}": array for name, array in arrays.items() if name != "W_dec"}
        save_file(named, root / f"W_enc_{number}.safetensors")
        save_file({f"W_dec_{number}": draw(FEATURES, 26 - number, D)}, root / f"W_dec_{number}.safetensors")
        (root / "config.yaml").write_text(config)
        return root / f"W_enc_{number}.safetensors"
    save_file(arrays, root / entry.path)
    if "14b" not in release.name:  # whose repositories have none
        (root / "config.yaml").write_text(config)
    return root / entry.path


def _torch(release: Release, entry: Entry, root: Path) -> Path:
    root.mkdir(parents=True)
    across = {"W_enc": draw(FEATURES, D), "W_dec": draw(D, FEATURES), "b_enc": draw(FEATURES), "b_dec": draw(D)}
    along = across | {"W_enc": draw(D, FEATURES), "W_dec": draw(FEATURES, D)}
    linear = {"encoder{}.weight": draw(FEATURES, D), "encoder{}.bias": draw(FEATURES)}
    linear |= {"decoder{}.weight": draw(D, FEATURES), "decoder{}.bias": draw(D)}
    path = root / entry.path
    if release.loader == "qwen_scope":
        save_torch(path, across)
    elif release.loader == "connor_rob_hook_z":
        save_torch(path, along)
        layer = re.findall(r"blocks\.(\d+)", entry.name)[0]
        said = {"act_size": D, "dict_size": FEATURES, "act_name": f"blocks.{layer}.attn.hook_z"}
        path.with_name(f"{path.name.removesuffix('.pt')}_cfg.json").write_text(json.dumps(said))
    else:
        kind = "_linear" if release.loader == "goodfire" else ""
        save_torch(path, {name.format(kind): array for name, array in linear.items()})
    return path


WRITE = {
    "gemma_2": _gemma_2,
    "gemma_2_transcoder": _gemma_2,
    "gemma_3": _gemma_3,
    "saelens": _saelens,
    "dictionary_learning_1": _dictionary_learning,
    "llama_scope": _llama_scope,
    "llama_scope_r1_distill": _llama_scope,
    "mwhanna_transcoder": _circuit_tracer,
    "mntss_clt_layer_transcoder": _circuit_tracer,
    "qwen_scope": _torch,
    "connor_rob_hook_z": _torch,
    "goodfire": _torch,
    "deepseek_r1": _torch,
}
"""What writes an entry, by SAELens's name of its loader."""


def save_torch(path: Path, arrays: Arrays) -> None:
    """A state dict as torch.save writes it: a zip with `data.pkl`, assembled here opcode by opcode, and the numbers."""
    kinds = {"float32": "FloatStorage", "int64": "LongStorage"}
    text = lambda word: b"X" + struct.pack("<I", len(word.encode())) + word.encode()
    number = lambda value: b"J" + struct.pack("<i", value)
    group = lambda *parts: b"(" + b"".join(parts) + b"t"
    program = b"\x80\x02}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, (name, array) in enumerate(arrays.items()):
            kind = f"ctorch\n{kinds[str(array.dtype)]}\n".encode()
            storage = group(text("storage"), kind, text(str(key)), text("cpu"), number(array.size)) + b"Q"
            strides = [stride // array.itemsize for stride in array.strides]
            sizes = (group(*map(number, array.shape)), group(*map(number, strides)))
            hooks = b"ccollections\nOrderedDict\n)R"
            program += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n"
            program += group(storage, number(0), *sizes, b"\x89", hooks) + b"Rs"
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/data.pkl", program + b".")
        archive.writestr("archive/byteorder", b"little")
