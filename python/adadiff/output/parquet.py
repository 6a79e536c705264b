"""A finished folder of shards as Parquet files, one a shard, a row for each sample: for tools that read such tables."""

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
    """Writes the shards of `folder` into `out`, made if it is missing, as shard-00000.parquet and so on. Files that are
    there already are kept, so an interrupted export goes on. Returns how many were written.

    Columns: `slot`, `seed`, int64; `label`, int64, where there were any; `image`, a PNG file, or `latent`, float32
    [C * H * W]; `exit_layers`, uint8, of each step, and `exit_layers_unconditional` where there was guidance. The
    schema's metadata has, at "adadiff", the configuration, shape and slots as JSON.
    force: replace files of other samples. Raises ValueError for a folder that lacks shards, and for files of other
    samples in `out`; ImportError, with the remedy, without pyarrow.
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
    """What `export` raises for `out`, before there are any samples. Writes nothing."""
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
        raise ImportError("Parquet takes pyarrow: pip install 'adadiff_kernels[ray]'") from error
    return pyarrow.parquet


def _path(out: Path, number: int) -> Path:
    return out / f"shard-{number:05d}.parquet"


def _described(manifest: Manifest, number: int) -> dict[str, Any]:
    """What tells a file's samples. Of a folder that has grown, its full shards are the same ones."""
    slots = manifest.slots(number)
    return {
        "configuration": {**manifest.configuration, "n": None},
        "array": manifest.array,
        "shape": manifest.shape,
        "num_layers": manifest.num_layers,
        "slots": [slots.start, slots.stop],
    }


def _metadata(path: Path) -> dict[str, Any] | None:
    """None where it is no file that `export` wrote."""
    try:
        found = (_pyarrow_parquet().read_schema(path).metadata or {}).get(KEY)
        return None if found is None else json.loads(found)
    except (OSError, ValueError):  # those of Arrow are ValueErrors
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
            rows = [np.trim_zeros(row, "b") for row in layers]  # steps that a sample did not have
            columns[name] = pyarrow.array(rows, pyarrow.list_(pyarrow.uint8()))
    table = pyarrow.table(columns)
    return table.replace_schema_metadata({KEY: json.dumps(_described(manifest, number)).encode()})


def _png(image: np.ndarray) -> bytes:
    """image: uint8 [H, W, C], C 1 or 3."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()
