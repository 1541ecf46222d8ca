"""The table of experiments that compare methods at equal L0."""

from collections.abc import Sequence

from jaxinterp.commands.shell import Columns, print_table, say
from jaxinterp.evaluation.equal_sparsity import Row


def shown(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The columns of the table at equal L0."""
    return tuple(
        {
            "method": row["method"],
            "reads": _port(row),
            "L0": row["l0"],
            "read off": row["how"],
            "FVU": row["fvu"],
            "CE": row["ce_replaced"],
            "CE added": row["ce_replaced"] - row["ce_clean"],
            "recovered, zero": row["ce_recovered_zero"],
            "recovered, mean": row["ce_recovered_mean"],
            "KL": row["kl"],
            "dead": row["dead_fraction"],
        }
        for row in rows
    )


AT_L0: Columns = {
    "method": ("method", "{}"),
    "reads": ("port", "{}"),
    "L0": ("l0", "{:.1f}"),
    "": ("mark", "{}"),
    "FVU": ("fvu", "{:.3f}"),
    "CE": ("ce_replaced", "{:.3f}"),
    "rec zero": ("ce_recovered_zero", "{:.3f}"),
    "KL": ("kl", "{:.3f}"),
    "dead": ("dead_fraction", "{:.0%}"),
}


def print_rows(rows: Sequence[Row]) -> None:
    """The table at equal L0, in 80 columns."""
    marks = {"measured": "", "between": "~", "nearest": "!"}
    print_table(AT_L0, [row | {"port": _port(row), "mark": marks[row["how"]]} for row in rows])
    say("~ read off between two settings, ! no setting has this L0: the nearest one")


def _port(row: Row) -> str:
    return str(row["reads"]).rpartition("/")[2]
