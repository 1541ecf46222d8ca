"""What the command line takes for each model where nothing is asked for."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from jaxinterp.commands.methods import SEVERAL
from jaxinterp.core.errors import UserError
from jaxinterp.models.files.shapes import PUBLISHED
from jaxinterp.models.load import KNOWN, check_source


@dataclass(frozen=True)
class Plan:
    """What depends on the model."""

    site: str
    features: int
    k: int
    learning_rate: float
    tokens: int
    effect: str = "next_token"


PRESETS = {
    "tiny": Plan("blocks/1/mlp", features=256, k=16, learning_rate=3e-3, tokens=200_000),
    "smollm2-135m": Plan("blocks/1/mlp", features=4608, k=32, learning_rate=2e-3, tokens=900_000),
    "minilm-l6": Plan("blocks/4/mlp", features=3072, k=32, learning_rate=2e-3, tokens=400_000, effect="pooled"),
}
OTHERWISE = Plan("", features=4096, k=32, learning_rate=1e-3, tokens=1_000_000)


def preset_of(model: str, method: str) -> Plan:
    """The values for a model and a method; the site is empty where the model has no preset."""
    plan = PRESETS.get(model, OTHERWISE)
    if method in SEVERAL:
        return replace(plan, site="blocks/*/mlp", features=max(256, plan.features // 8))
    if method == "attention" and plan.site:
        return replace(plan, site=plan.site.replace("/mlp", "/attn"))
    return plan


def table() -> str:
    """The presets as lines of --help."""
    rows = {name: asdict(plan) for name, plan in PRESETS.items()} | {"any other": asdict(OTHERWISE) | {"site": "none"}}
    return "\n".join(
        f"  {name}: " + ", ".join(f"{key} {value}" for key, value in row.items()) for name, row in rows.items()
    )


def planned(config: Any) -> Plan:
    """The values that a configuration asks for, and those of its model's preset where it has None.

    Raises:
      UserError: there is no such model; or no site was named and the model has no preset.
    """
    if not (config.preflight and config.model in PUBLISHED):  # whose shapes are known, and a preflight takes no more
        check_source(config.model)
    asked = {field.name: getattr(config, field.name) for field in fields(Plan)}
    plan = replace(
        preset_of(config.model, config.method), **{name: value for name, value in asked.items() if value is not None}
    )
    if not plan.site:
        raise UserError(
            f"site is not set, and model={config.model!r} has no preset: name an MLP leaf of it, such as --site "
            f"blocks/1/mlp. (Presets: {', '.join(PRESETS)}; models that come with a package: {', '.join(KNOWN)}.)"
        )
    return plan
