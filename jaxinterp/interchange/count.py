"""How many public dictionaries can be read, on models that can be loaded: `python -m jaxinterp.interchange.count`.

For every release of SAELens's directory, tiny files are written (`samples.py`) for every combination of values that its
entries have in the YAML (`values_of`), and read by the path that the directory gives; and for every model a small one
of its own configuration is written (`public_models.py`) and loaded with random weights. Entries count where both hold.
`--releases` prints every release with its evidence, `--snapshot` writes the names anew from an installed SAELens.
"""

import argparse
import json
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jaxinterp.core.errors import UserError
from jaxinterp.interchange import releases as names
from jaxinterp.interchange.formats import read_place
from jaxinterp.interchange.public_models import MODELS, SAME, shrunken
from jaxinterp.interchange.releases import Entry, Release, directory, place
from jaxinterp.interchange.samples import OWN_SCALE, shape_of, values_of, write_sample
from jaxinterp.models.files.wanted import wanted_tensors
from jaxinterp.models.load import load
from jaxinterp.models.run import run

CLASSES = {
    **{"AutoEncoder": "AutoEncoder", "AutoEncoderTopK": "AutoEncoderTopK", "BatchTopKSAE": "BatchTopKSAE"},
    **{"GatedAutoEncoder": "GatedAutoEncoder", "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE"},
}
GEMMA_3 = {
    **{"resid_post": "gs2-res", "attn_out": "gs2-att", "mlp_out": "gs2-mlp", "transcoder": "gs2-transcoder"},
    "transcoder, affine": "gs2-affine",
}
GOLDENS = {
    **{"gemma_2": "goldens/gemma-scope-2b-pt-res", "gemma_2_transcoder": "goldens/gemma-scope-2b-pt-res"},
    **{"qwen_scope": "goldens_public/qwen-scope", "llama_scope": "goldens_public/llama-scope"},
    "llama_scope_r1_distill": "goldens_public/llama-scope-r1",
    **{"mwhanna_transcoder": "goldens_public/tracer-relu", "goodfire": "goldens_public/goodfire"},
    **{"mntss_clt_layer_transcoder": "goldens_public/tracer-clt", "connor_rob_hook_z": "goldens_public/hook-z"},
    **{"deepseek_r1": "goldens_public/deepseek-r1"},
}
"""Which golden of tests/interchange, made by the peer's own code, has a loader's layout."""


def golden_of(release: Release, entry: Entry) -> str:
    """The golden, made by the peer's own code, whose layout and computation an entry has; "" where there is none."""
    shape = shape_of(release, entry)
    if release.loader == "gemma_3":
        return f"goldens_public/{GEMMA_3[shape]}" if shape in GEMMA_3 else ""
    if release.loader == "dictionary_learning_1":
        return f"goldens/dictionary_learning-{CLASSES[shape]}" if shape in CLASSES else ""
    if release.loader == "saelens":
        if "normalize_activations" in release.overrides:
            return f"goldens_public/saelens-{release.overrides['normalize_activations']}"
        kind = "old-topk" if "v5" in release.name else "jumprelu" if "matryoshka" in release.name else "old-relu"
        if kind == "old-topk":
            return "goldens_public/saelens-layer_norm"
        return f"goldens/saelens-{kind}{'' if entry.scale is None else ', whose scale is 1'}"
    return GOLDENS.get(release.loader, "")


HOOKS = {
    **{"hook_resid_pre": "resid/pre", "hook_resid_mid": "resid/mid", "hook_resid_post": "resid/post"},
    **{"hook_attn_out": "attn/out", "hook_mlp_out": "mlp/out", "hook_z": "attn/z"},
}


def misplaced(entry: Entry, site: str) -> str | None:
    """Why a site contradicts the layer and the hook in an entry's name or path; None where it does not."""
    text = f"{entry.name} {entry.path}"
    layer = re.search(r"(?:layer_|blocks\.|layer|/L|-L|^W_enc_|^l)(\d+)", text)
    layer = layer or re.search(r"_l(\d+)|^(\d+)$", entry.path)
    if layer is not None and f"/{next(filter(None, layer.groups()))}/" not in f"/{site}/":
        return f"it was put at {site}, and its name says layer {layer[1]}"
    hook = re.search("|".join(HOOKS), entry.name)
    if hook and not site.endswith(HOOKS[hook[0]]) and not (hook[0] == "hook_mlp_out" and site.endswith("mlp/added")):
        return f"it was put at {site}, and its name says {hook[0]}"
    return None


@dataclass(frozen=True)
class Found:
    """One release: entries, how many can be read, why others cannot, and whether its model loads (else why not).

    `values`: of its YAML, that samples were made of and read; `goldens`: of the peers' own code for such files.
    """

    release: Release
    readable: int
    samples: int
    values: tuple[str, ...]
    goldens: tuple[str, ...]
    reasons: tuple[str, ...]
    model: str | None

    @property
    def counted(self) -> int:
        """Entries that can be read on a model that can be loaded."""
        return self.readable if self.model is None else 0


def try_entry(release: Release, entry: Entry, root: Path, model: Path | None = None) -> str | None:
    """Why an entry of this shape cannot be read; None where it can: a sample of it was.

    Args:
      model: of a small model of the release, for those that need its norms.
    """
    try:
        known = place(release, entry)
        where = write_sample(release, entry, root)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = load(model, dtype="float32") if model and release.loader == "gemma_2_transcoder" else None
            found: Any = read_place(known, where, subject=subject)
    except UserError as error:
        return str(error)
    if not np.all(np.isfinite(np.asarray(found(jnp.ones((2, found.encoder.shape[1])))))):
        return "its outputs are not finite"
    needed = entry.scale if release.loader not in OWN_SCALE else None
    if needed is not None and not np.isclose(found.input_scale, 1 / needed):
        return f"norm_scaling_factor={entry.scale} was not used"
    site = found.sites.reads
    return misplaced(entry, site if isinstance(site, str) else site[0])


def try_model(name: str, root: Path) -> str | None:
    """Why a model cannot be loaded; None where a small one of its configuration was."""
    fields = MODELS.get(SAME.get(name, name))
    if fields is None:
        return "no configuration of it is kept"
    try:
        wanted = wanted_tensors(fields)  # of the published sizes: nothing is read or made
        small = shrunken(fields)
        arrays = wanted_tensors(small)
        rng = np.random.default_rng(0)
        root.mkdir(parents=True)
        save_file(
            {each: (0.1 * rng.normal(size=shape)).astype(np.float32) for each, shape in arrays.items()},
            root / "model.safetensors",
        )
        (root / "config.json").write_text(json.dumps(small))
        logits = run(load(root, dtype="float32").model, jnp.arange(6)[None]).logits
    except UserError as error:
        return str(error)
    assert len(wanted) >= len(arrays)
    return None if np.all(np.isfinite(np.asarray(logits))) else "its logits are not finite"


def count(releases: Mapping[str, Release]) -> list[Found]:
    """Every release, tried."""
    found = []
    with tempfile.TemporaryDirectory() as place_of_all:
        root = Path(place_of_all)
        folders = {release.model: root / "models" / release.model.replace("/", "--") for release in releases.values()}
        models = {name: try_model(name, folder) for name, folder in folders.items()}
        for release in releases.values():
            alike: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
            for entry in release.entries.values():
                alike[values_of(release, entry)].append(entry)
            reasons, readable = [], 0
            read_values: dict[str, None] = {}
            goldens: dict[str, None] = {}
            for number, (values, entries) in enumerate(alike.items()):
                model = folders[release.model] if models[release.model] is None else None
                reason = try_entry(release, entries[0], root / f"{release.name}-{number}", model)
                readable += len(entries) if reason is None else 0
                if reason is None:
                    read_values |= dict.fromkeys(values)
                    goldens[golden_of(release, entries[0])] = None
                else:
                    reasons.append(reason.replace(str(root), ""))
            seen = (tuple(read_values), tuple(goldens))
            found.append(Found(release, readable, len(alike), *seen, tuple(reasons), models[release.model]))
    return found


def table(found: list[Found], key: str) -> list[str]:
    """Counts by `loader` or by `model`, one line each."""
    every, read_, both = Counter[str](), Counter[str](), Counter[str]()
    for each in found:
        name = getattr(each.release, key)
        every[name] += len(each.release.entries)
        read_[name] += each.readable
        both[name] += each.counted
    lines = [f"| {key} | dictionaries | readable | and on a loadable model |", "|---|---|---|---|"]
    lines += [f"| {name} | {n:,} | {read_[name]:,} | {both[name]:,} |" for name, n in every.most_common()]
    return [*lines, f"| all | {every.total():,} | {read_.total():,} | {both.total():,} |"]


def main() -> None:
    """Print the tables, and the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", action="store_true", help="every release with its evidence")
    parser.add_argument("--snapshot", action="store_true", help="write the names anew, from an installed SAELens")
    arguments = parser.parse_args()
    if arguments.snapshot:
        names.SNAPSHOT.write_bytes(names.snapshot_of(directory()))
        return
    found = count(directory())
    print("\n".join([*table(found, "loader"), "", *table(found, "model")]))
    if arguments.releases:
        print("\n| release | dictionaries | readable | evidence | model |\n|---|---|---|---|---|")
        for each in found:
            said = f"samples with {'; '.join(each.values)}. Golden: {', '.join(each.goldens)}"
            said = f"{each.samples} {said}" if each.values else "no sample was read"
            said = said.replace("|", "/") + "".join(f". Not: {reason[:160]}" for reason in each.reasons)
            loaded = "loads" if each.model is None else each.model[:120]
            print(f"| {each.release.name} | {len(each.release.entries)} | {each.readable} | {said} | {loaded} |")
    total, good = sum(len(each.release.entries) for each in found), sum(each.counted for each in found)
    print(f"\n{good:,} of {total:,} public dictionaries can be read on a model that loads: {100 * good / total:.1f} %")


if __name__ == "__main__":
    main()
