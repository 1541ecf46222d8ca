"""Pareto charts: FVU and added cross-entropy against the number of active features."""

from collections.abc import Callable, Mapping, Sequence

from jaxinterp.evaluation.effects import Row
from jaxinterp.report.scatter import Series, xy_chart
from jaxinterp.report.sections import Chart


def pareto(rows: Mapping[str, Sequence[Row]], *, emphasis: str = "") -> tuple[Chart, Chart]:
    """FVU and added cross-entropy against L0, a line for each method, a mark where it has one setting."""
    silent = [name for name, own in rows.items() if any(row["l0"] <= 0 for row in own)]
    absent = f"; settings without an active feature are not drawn ({', '.join(silent)})" if silent else ""

    def chart(title: str, note: str, value: Callable[[Row], float]) -> Chart:
        lines = [
            Series(name, tuple(sorted((row["l0"], value(row)) for row in own)), line=True, emphasis=name == emphasis)
            for name, own in rows.items()
        ]
        label = "active features per token (L0), log scale"
        svg = xy_chart(lines, x_label=label, y_label=title, title=title, log_x=True, height=460)
        return Chart(title, note + absent, svg)

    return (
        chart("Unexplained variance", "FVU, lower is better", lambda row: row["fvu"]),
        chart(
            "Cross-entropy added",
            "nats per token with the MLP replaced, lower is better",
            lambda row: row["ce_replaced"] - row["ce_clean"],
        ),
    )
