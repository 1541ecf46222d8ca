"""Notebooks: made from their sources, executed, and what their cells show."""

import os
from pathlib import Path

import jupytext
import nbformat
from ipykernel.kernelspec import write_kernel_spec
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

COLAB = Path(__file__).parents[2] / "colab"
KERNEL = "jaxinterp-test"


def made_from(source, name="first-steps"):
    """The notebook that a percent-format source stands for: no outputs, cells numbered, metadata of the source only."""
    notebook = jupytext.reads(source, fmt="py:percent")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"{name}-{index:02}"
        cell["metadata"] = {}
    nbformat.validate(notebook)
    return nbformat.writes(notebook, version=4) + "\n"


def execute(path, folder):
    """A notebook after a kernel of the running interpreter has executed it, somewhere outside the checkout."""
    write_kernel_spec(folder / "kernels" / KERNEL)
    specs = KernelSpecManager(kernel_dirs=[str(folder / "kernels")], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name=KERNEL, kernel_spec_manager=specs)
    manager.connection_file = str(folder / "kernel.json")
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}  # one device, as users have
    environment |= {"JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(folder / "ipython")}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, km=manager, timeout=600, resources={"metadata": {"path": str(folder)}})
    return client.execute(env=environment, cleanup_kc=True)


def shown(notebook, code):
    """What the one cell that contains `code` shows: its text and its HTML."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source]
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts.append(output.get("text") or data.get("text/html") or data.get("text/plain") or "")
    return "".join(parts)
