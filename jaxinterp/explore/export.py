"""The explorer as files: the same pages, their data in scripts that the browser loads when it needs them.

    index.html app.css data.js parts.js app.js    the page, from the package
    data/about.js                                 what it must know first, loaded with the page
    data/orders.js                                features by density and by largest activation
    data/rows-00000.js ...                        500 lines of the list each
    data/features-00000.js ...                    32 features each

Scripts rather than JSON, because a page that was opened from a disk (file://) may load the one and not the other. Your
own text, steering and new labels need the model and are left out; search is by token, logit, label and number.
"""

import json
from pathlib import Path

from jaxinterp.core.json_value import Json
from jaxinterp.explore import answers
from jaxinterp.explore.page import SCRIPTS, asset
from jaxinterp.explore.state import Explorer
from jaxinterp.storage.files import check_empty, write_text

ROWS, PAGES = 500, 32


def export(explorer: Explorer, folder: str | Path) -> Path:
    """Write the pages and return the path of index.html.

    Raises:
      UserError: the folder has files in it, or the disk is full.
    """
    folder, index, labels = check_empty(folder, overwrite=False), explorer.index, explorer.labels.all()
    html = asset("index.html").replace("<!-- data -->", '<script src="data/about.js"></script>')
    for name in ("app.css", *SCRIPTS):
        write_text(folder / name, asset(name))
    orders = {name: order.tolist() for name, order in index.order.items()}
    write_text(folder / "data" / "orders.js", script("orders", orders))
    for first in range(0, index.features, ROWS):
        last = min(first + ROWS, index.features)
        lines = [answers.row(index, j, labels) for j in range(first, last)]
        _shard(folder, f"rows-{first // ROWS:05}", lines)
    for first in range(0, index.features, PAGES):
        last = min(first + PAGES, index.features)
        _shard(folder, f"features-{first // PAGES:05}", [explorer.feature(j) for j in range(first, last)])
    about = explorer.about() | {"live": False, "other": None}
    write_text(folder / "data" / "about.js", f"window.EXPORT = {_json(about)};\n")
    return write_text(folder / "index.html", html)


def _shard(folder: Path, name: str, value: Json) -> None:
    write_text(folder / "data" / f"{name}.js", script(name, value))


def script(name: str, value: Json) -> str:
    """A call that hands a value to the page; what it holds is JSON, which is also JavaScript."""
    return f"explorerData({_json(name)}, {_json(value)});\n"


def _json(value: Json) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
