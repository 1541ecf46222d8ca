"""What every adapted model has in common."""

from jaxinterp.core.errors import UserError
from jaxinterp.models.rules import EXACT, Rules


def check_rules(rules: Rules, kind: str) -> None:
    """Raises UserError if other derivatives are asked for than those of the foreign model's own layers."""
    if rules != EXACT:
        raise UserError(
            f"rules={rules}: the layers of a {kind} model know no rules, only their own derivatives: take "
            "rules=EXACT, or load the same weights as a model of this package."
        )
