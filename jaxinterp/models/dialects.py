"""Names in four dialects: ours, TransformerLens', interp-engine's, and the module paths of Hugging Face transformers.

    ours                  TransformerLens           interp-engine    transformers (Llama)
    blocks/3/resid/post   blocks.3.hook_resid_post  resid_post.3     model.layers.3
    blocks/3/mlp          blocks.3.mlp                               model.layers.3.mlp
    blocks/3/mlp/out      blocks.3.hook_mlp_out     mlp_out.3

Module paths follow from the tensor tables of the families. A module's name means its output: a norm's is what the
sublayer reads, a block's is the residual stream behind it; sublayers and linear maps are leaves. `site="..."` takes any
dialect. The whole table, for every family, is docs/names.md: `python -m jaxinterp.models.dialects > docs/names.md`.

In models with norms behind their sublayers (Gemma 2 and 3, OLMo 2 and 3) TransformerLens' `hook_mlp_out` lies behind
that norm and is our `mlp/added`; its `hook_attn_out` there has no name here. interp-engine's `mlp_out` lies before it.
Where positions are learned, our `embed` has them added and the others' names are refused.

Sources: TransformerLens 3 (hook names of `HookedTransformer`), interp-engine 1.14 (points.py, address.py).
"""

import re
from collections.abc import Collection
from typing import Any, NamedTuple

from jaxinterp.core.errors import UserError
from jaxinterp.models.families.base import Family
from jaxinterp.models.families.tables import FAMILIES
from jaxinterp.models.transformer import Transformer


class Row(NamedTuple):
    """One name in three dialects; "" where a dialect has none. `*` is the number of the layer."""

    ours: str
    transformer_lens: str
    interp_engine: str


ROWS = (
    Row("embed", "hook_embed", "embeddings"),
    Row("blocks/*/resid/pre", "blocks.*.hook_resid_pre", "resid_pre.*"),
    Row("blocks/*/attn", "blocks.*.attn", ""),
    Row("blocks/*/attn/in", "blocks.*.ln1.hook_normalized", "attn_in.*"),
    Row("blocks/*/attn/pattern", "blocks.*.attn.hook_pattern", "attn_probs.*"),
    Row("blocks/*/attn/z", "blocks.*.attn.hook_z", "z.*"),
    Row("blocks/*/attn/gate", "", "attn_gate.*"),
    Row("blocks/*/attn/out", "blocks.*.hook_attn_out", "attn_out.*"),
    Row("blocks/*/resid/mid", "blocks.*.hook_resid_mid", "resid_mid.*"),
    Row("blocks/*/mlp", "blocks.*.mlp", ""),
    Row("blocks/*/mlp/in", "blocks.*.ln2.hook_normalized", "mlp_in.*"),
    Row("blocks/*/mlp/pre", "blocks.*.mlp.hook_pre", "mlp_pre.*"),
    Row("blocks/*/mlp/up", "blocks.*.mlp.hook_pre_linear", "mlp_pre_linear.*"),
    Row("blocks/*/mlp/hidden", "blocks.*.mlp.hook_post", "mlp_act.*"),
    Row("blocks/*/mlp/router", "", "router_logits.*"),
    Row("blocks/*/mlp/experts/index", "blocks.*.mlp.hook_expert_indices", "expert_indices.*"),
    Row("blocks/*/mlp/experts/weight", "blocks.*.mlp.hook_expert_weights", "expert_weights.*"),
    Row("blocks/*/mlp/out", "blocks.*.hook_mlp_out", "mlp_out.*"),
    Row("blocks/*/mlp/added", "", "mlp_out_post.*"),
    Row("blocks/*/resid/post", "blocks.*.hook_resid_post", "resid_post.*"),
    Row("final", "ln_final.hook_normalized", "final_norm"),
)
INSIDE_DELTA = ("conv", "decay", "beta", "recalled")
"""Arrays of a Gated DeltaNet, below `blocks/*/attn`, for which the other dialects have no name."""

BEHIND_A_NORM = {"blocks.*.hook_mlp_out": "blocks/*/mlp/added", "blocks.*.hook_attn_out": ""}
"""TransformerLens' names that mean another array in models with norms behind their sublayers."""

OUTPUTS = {"attn_norm": "attn/in", "mlp_norm": "mlp/in"}
"""Norms of a block: what they return, under our names."""


def module_paths(family: Family) -> dict[str, str]:
    """By our name, the module path of a family: `blocks/*/mlp/down_proj` is `model.layers.*.mlp.down_proj`.

    Left out are maps that share a module (GPT-2's `c_attn`), and sublayers that are no module of their own (OPT's MLP).
    """
    modules: dict[str, str] = {}
    for leaf, (tensor, _) in family.tensors.items():
        ours, theirs = leaf.removesuffix("/weight"), tensor.removesuffix(".weight")
        if ours != leaf and theirs != tensor and "#" not in theirs:
            modules[ours] = theirs
    shared = [theirs for theirs in modules.values() if list(modules.values()).count(theirs) > 1]
    found = {}
    before = dict(family.constants).get("pre_norms", True)
    for ours, theirs in modules.items():
        sublayer, _, port = ours.removeprefix("blocks/*/").partition("/")
        if ours == "final_norm":
            found["final"] = theirs
        elif before and sublayer in OUTPUTS and not (theirs in shared and sublayer == "mlp_norm"):
            found[f"blocks/*/{OUTPUTS[sublayer]}"] = theirs
        elif port.endswith("_proj") and theirs not in shared and sublayer != "per_layer":
            found[ours] = theirs
    block = modules["blocks/*/attn/o_proj"].partition("*")[0] + "*"
    found["blocks/*/resid/post"] = block
    inside_mlp = "blocks/*/mlp/router" if "blocks/*/mlp/router" in modules else "blocks/*/mlp/down_proj"
    for leaf, inside in (("blocks/*/attn", "blocks/*/attn/o_proj"), ("blocks/*/mlp", inside_mlp)):
        parent = modules[inside].rpartition(".")[0]
        if parent not in (block, f"{block}.output", f"{block}.attention.output"):  # not a sublayer's own module
            found[leaf] = parent
    return found


def other_paths(family: Family) -> dict[str, str]:
    """Module paths of sublayers that have two, by the kind of layer: Gated DeltaNet beside attention."""
    tensor, _ = family.tensors.get("blocks/*/attn/out_proj/weight", ("", None))
    return {"blocks/*/attn": tensor.removesuffix(".out_proj.weight")} if tensor else {}


def names_of(family: Family) -> list[tuple[str, str, str, str]]:
    """The table of one family: ours, TransformerLens', interp-engine's, transformers'; "" where there is none."""
    paths, fixed = module_paths(family), dict(family.constants)
    behind, routed = bool(fixed.get("post_norms")), "blocks/*/mlp/router/weight" in family.tensors
    absent = set() if fixed.get("attention_gate") else {"blocks/*/attn/gate"}  # of what no model of the family has
    absent |= set() if routed else {row.ours for row in ROWS if "router" in row.ours or "experts" in row.ours}
    absent |= {"blocks/*/mlp/up"} if fixed.get("gated") is False else set()
    absent |= {"blocks/*/resid/mid"} if fixed.get("parallel") else set()
    rows = []
    for row in ROWS:
        if row.ours in absent:
            continue
        if row.ours == "embed" and fixed.get("learned_positions"):
            row = Row("embed", "", "")
        lens = row.transformer_lens
        if behind and row.ours == "blocks/*/mlp/added":
            lens = "blocks.*.hook_mlp_out"
        elif behind and lens in BEHIND_A_NORM:
            lens = ""
        rows.append((row.ours, lens, row.interp_engine, paths.pop(row.ours, "")))
    others = other_paths(family)
    inside = [(f"blocks/*/attn/{name}", "", "", "") for name in INSIDE_DELTA if others]
    return rows + inside + [(ours, "", "", theirs) for ours, theirs in sorted(paths.items())]


def understood(model: Any, name: str, known: Collection[str]) -> str:
    """Our name for a name of any dialect; the name itself where it is ours, or no dialect has it.

    Args:
      name: may have `*` for the layer.
      known: the sites of the model.
    Raises:
      UserError: families use the name for different arrays, or TransformerLens' name has no array here.
    """
    if name in known or "/" in name or ("." not in name and name not in ("hook_embed", "embeddings", "final_norm")):
        return name
    if name in ("hook_embed", "embeddings") and isinstance(model, Transformer) and model.config.learned_positions:
        raise UserError(
            f"{name!r} has no positions in it yet, and our 'embed' has: take 'embed' or 'blocks/0/resid/pre' where the "
            "sum is meant."
        )
    behind = isinstance(model, Transformer) and model.config.post_norms
    templates: dict[str, set[str]] = {}
    for row in ROWS:
        ours = BEHIND_A_NORM.get(row.transformer_lens, row.ours) if behind else row.ours
        templates.setdefault(row.transformer_lens, set()).add(ours)
        templates.setdefault(row.interp_engine, set()).add(row.ours)
    for family in FAMILIES.values():
        for ours, theirs in (*module_paths(family).items(), *other_paths(family).items()):
            templates.setdefault(theirs, set()).add(ours)
    found: set[str] = set()
    for template, meanings in templates.items():
        match = re.fullmatch(re.escape(template).replace(r"\*", r"(\d+|\*)"), name) if template else None
        if match:
            found |= {ours.replace("*", match[1]) if match.groups() else ours for ours in meanings}
    if "" in found:
        raise UserError(
            f"{name!r} lies behind the norm of what attention writes in this model, which has no name here: take "
            f"{name.replace('.', '/').replace('hook_attn_out', 'attn/out')!r}, before the norm, or resid/mid."
        )
    shaped = [re.compile(re.escape(each).replace(r"\*", r"\d+")) for each in sorted(found)]
    real = [each for each, shape in zip(sorted(found), shaped, strict=True) if any(map(shape.fullmatch, known))]
    if len(real) > 1:
        raise UserError(f"{name!r} is {' or '.join(map(repr, real))}, by family: say which.")
    return real[0] if real else name


def near(name: str) -> str:
    """A name of another dialect in our spelling, so that the nearest of ours can be offered."""
    return re.sub(r"hook_", "", name).replace(".", "/").replace("_", "/")


def page() -> str:
    """docs/names.md."""
    lines = [
        "# Names in four dialects",
        "",
        "Made by `python -m jaxinterp.models.dialects > docs/names.md` from the tables of the families. `*` is the",
        'number of the layer. Every name can be given as `site="..."`. Empty: the dialect has no such name.',
    ]
    for name, family in FAMILIES.items():
        lines += ["", f"## {name}", "", "| ours | TransformerLens | interp-engine | transformers |"]
        lines += ["|---|---|---|---|"]
        lines += ["| " + " | ".join(f"`{each}`" if each else "" for each in row) + " |" for row in names_of(family)]
        lines += [f"\n`{theirs}` is `{ours}`, too." for ours, theirs in other_paths(family).items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
