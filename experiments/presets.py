"""What `experiments.transcoder` takes for each model where nothing is asked for."""

from dataclasses import dataclass, fields, replace
from typing import Any

from jaxinterp.core.errors import UserError, suggest


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


def planned(config: Any) -> Plan:
    """The values that a configuration asks for, and those of its model's preset where it has None.

    Raises:
      UserError: no site was named and the model has no preset.
    """
    asked = {field.name: getattr(config, field.name) for field in fields(Plan)}
    plan = replace(
        PRESETS.get(config.model, OTHERWISE), **{name: value for name, value in asked.items() if value is not None}
    )
    if not plan.site:
        raise UserError(
            f"site is not set, and model={config.model!r} has no preset: name an MLP leaf of it, such as --site "
            f"blocks/1/mlp.{suggest(config.model, PRESETS)}"
        )
    return plan
