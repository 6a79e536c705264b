"""Export of a finished folder of shards to Parquet: a file for each shard, a row for each sample."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..writing import check_replaceable, replace_file
from .shards import Manifest, present, read_shard

if TYPE_CHECKING:
    import pyarrow

KEY = b"adadiff"  # of the schema's metadata


def export(folder: str | Path, out: str | Path, force: bool = False) -> int:
    """Writes the shards of `folder` to `out` (created if missing) as shard-00000.parquet and so on. Existing files of
    the same samples are kept, so an interrupted export can be completed. Returns the number of files written.

    Columns: `slot`, `seed`, int64; `label`, int64, if there are labels; `image`, bytes of a PNG file, or `latent`,
    float32 [C * H * W]; `exit_layers`, uint8 for each step, and, with guidance, `exit_layers_unconditional`. The
    schema's metadata holds configuration, shape and slots as JSON under "adadiff".
    force: replace files of other samples. Raises ValueError if `folder` lacks shards or `out` holds files of other
    samples; ImportError, with the pip command, without pyarrow.
    """
    folder, out = Path(folder), Path(out)
    manifest = Manifest.read(folder)
    check(manifest, out, force)
    if missing := manifest.shards - len(present(folder, manifest)):
        raise ValueError(f"{folder} lacks {missing} of {manifest.shards} shards; the command that began it draws them")
    parquet = _pyarrow_parquet()
    out.mkdir(parents=True, exist_ok=True)
    written = 0
    for number in range(manifest.shards):
        path = _path(out, number)
        if path.exists() and _metadata(path) == _described(manifest, number):
            continue
        table = _table(manifest, number, read_shard(folder, manifest, number))
        replace_file(path, lambda temporary, table=table: parquet.write_table(table, temporary))
        written += 1
    return written


def check(manifest: Manifest, out: Path, force: bool = False) -> None:
    """Raises the errors of `export` that concern `out`, before there are any samples. Writes nothing."""
    _pyarrow_parquet()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is no folder")
    for path in sorted(out.glob("shard-*.parquet")):
        check_replaceable(path)
        number = path.name.removeprefix("shard-").removesuffix(".parquet")
        expected = _described(manifest, int(number)) if number.isdecimal() else None
        if not force and _metadata(path) != expected:
            raise ValueError(f"{path} holds other samples; choose another folder, empty this one, or give --force")


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'adadiff_kernels[ray]'") from error
    return pyarrow.parquet


def _path(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.parquet"


def _described(manifest: Manifest, number: int) -> dict[str, Any]:
    """Metadata that identifies the samples of a file. n is left out, so that full shards stay valid when a folder
    grows."""
    slots = manifest.slots(number)
    return {
        "configuration": {**manifest.configuration, "n": None},
        "array": manifest.array,
        "shape": manifest.shape,
        "num_layers": manifest.num_layers,
        "slots": [slots.start, slots.stop],
    }


def _metadata(path: Path) -> dict[str, Any] | None:
    """Metadata of a file that `export` wrote; None for any other file."""
    try:
        found = (_pyarrow_parquet().read_schema(path).metadata or {}).get(KEY)
        return None if found is None else json.loads(found)
    except (OSError, ValueError):  # Arrow's exceptions are ValueErrors
        return None


def _table(manifest: Manifest, number: int, arrays: dict[str, np.ndarray]) -> "pyarrow.Table":
    import pyarrow

    columns: dict[str, Any] = {"slot": arrays["slots"], "seed": arrays["seeds"]}
    if "labels" in arrays:
        columns["label"] = arrays["labels"]
    if manifest.array == "images":
        columns["image"] = pyarrow.array([_png(image) for image in arrays["images"]], pyarrow.binary())
    else:
        flat = pyarrow.array(arrays["latents"].ravel())
        columns["latent"] = pyarrow.FixedSizeListArray.from_arrays(flat, int(np.prod(manifest.shape)))
    halves = {"exit_layers": 0, "exit_layers_unconditional": 1}
    for name, half in halves.items():
        layers = arrays["exit_layer"][..., half].T
        if half == 0 or layers.any():
            rows = [np.trim_zeros(row, "b") for row in layers]  # without the steps that a sample did not take
            columns[name] = pyarrow.array(rows, pyarrow.list_(pyarrow.uint8()))
    table = pyarrow.table(columns)
    return table.replace_schema_metadata({KEY: json.dumps(_described(manifest, number)).encode()})


def _png(image: np.ndarray) -> bytes:
    """Bytes of a PNG file. image: uint8 [H, W, C], C 1 or 3."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()
