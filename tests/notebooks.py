"""Runs the code of a notebook without Jupyter, and keeps what it shows in the form of a notebook's outputs.

    python tests/notebooks.py examples/tour.ipynb      runs it and writes its outputs anew

As Jupyter does: cells share one namespace; what a cell prints is kept, the pictures it leaves open in matplotlib, and
the value of its last expression, of an image as PNG.
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLBACKEND", "Agg")  # read when matplotlib is first imported

DPI = 72  # of pictures: the file is small, and the text readable


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The outputs of each code cell. What a cell raises is raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    return [_run_cell("".join(cell["source"]), names, i) for i, cell in enumerate(code_cells(notebook), 1)]


def texts(outputs: list[dict[str, Any]]) -> str:
    """All text of a cell's outputs, seconds and rates left out, which differ from run to run."""
    found = ["".join(one["text"]) for one in outputs if one["output_type"] == "stream"]
    found += ["".join(one["data"]["text/plain"]) for one in outputs if "data" in one]
    return re.sub(r"\d+\.\d+ s \([\d.]+/s\)", "... s", "\n".join(found))


def pictures(outputs: list[dict[str, Any]]) -> list[bytes]:
    """The PNG files among a cell's outputs."""
    return [base64.b64decode(one["data"]["image/png"]) for one in outputs if "image/png" in one.get("data", ())]


def _run_cell(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree, outputs = ast.parse(source), []
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    name, value = f"<cell {number}>", None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            value = eval(compile(last, name, "eval"), names)
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None:
        data = _shown(value)
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return [*outputs, *_figures()]


def _shown(value: Any) -> dict[str, Any]:
    plain = {"text/plain": [re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))]}
    return {"image/png": _base64(value._repr_png_()), **plain} if hasattr(value, "_repr_png_") else plain


def _figures() -> list[dict[str, Any]]:
    if "matplotlib.pyplot" not in sys.modules:
        return []
    plt, outputs = sys.modules["matplotlib.pyplot"], []
    for number in plt.get_fignums():
        figure, file = plt.figure(number), io.BytesIO()
        figure.savefig(file, dpi=DPI, format="png", metadata={"Software": None})
        data = {"image/png": _base64(file.getvalue()), "text/plain": [repr(figure)]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        notebook = read(path)
        for number, (cell, outputs) in enumerate(zip(code_cells(notebook), run(notebook), strict=True), 1):
            cell |= {"outputs": outputs, "execution_count": number}
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
