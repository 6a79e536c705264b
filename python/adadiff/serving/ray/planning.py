"""Number of workers, and checks that they can draw. Does not import Ray."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ...checkpoint import find
from ...output.asked import Asked, device_of, digest
from ...output.filling import Process
from ...output.shards import Manifest
from ...sampling.sample_batch import whole

MOST_PAYLOAD = 2**30  # bytes of a shard in transit; an Arrow column holds up to twice as many
MOST_ACTORS = 4096
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, with its total resources."""

    id: str
    address: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Workers:
    """actors: number of processes; None: as many as fit. cpus, gpus: of each. Raises ValueError for invalid values."""

    actors: int | None = None
    cpus: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.actors is not None:
            whole("actors", self.actors, 1, MOST_ACTORS)
        whole("cpus of an actor", self.cpus, 1)
        whole("gpus of an actor", self.gpus, 0)

    @staticmethod
    def of(asked: Asked, actors: int | None = None, cpus: int = 1) -> "Workers":
        """Workers for a request; each has a GPU if the device is cuda. Raises ValueError for other devices."""
        device = device_of(asked)
        kind, colon, _ = device.partition(":")
        if kind not in DEVICES:
            raise ValueError(f"Ray's workers draw on {' or '.join(DEVICES)}, got device {device!r}")
        if colon:
            raise ValueError(f"Ray gives each actor a GPU of its own; give device {kind!r} instead of {device!r}")
        return Workers(actors, cpus, 0 if kind == "cpu" else 1)

    def usable(self, nodes: Sequence[Node]) -> list[Node]:
        """The machines on which an actor fits. ValueError, which lists their resources, if there are none."""
        found = [node for node in nodes if self._fit(node)]
        if not found:
            biggest = ", ".join(sorted({f"{n.cpus:g} CPUs and {n.gpus:g} GPUs" for n in nodes})) or "nothing"
            raise ValueError(f"an actor takes {self._each}, but the cluster's machines have {biggest}")
        return found

    def count(self, nodes: Sequence[Node], missing: int) -> int:
        """Number of actors for `missing` shards. ValueError for more than fit, which would wait forever."""
        fit = sum(map(self._fit, nodes))
        if self.actors is not None and self.actors > fit:
            raise ValueError(
                f"{self.actors} actors of {self._each} each do not fit in this cluster, where {fit} do; give fewer "
                "actors, or add machines first"
            )
        return max(1, min(self.actors or fit, missing))

    def waits_for(self, free: Mapping[str, float]) -> str | None:
        """Why no actor can start yet, or None. free: resources of the cluster that nobody uses, by Ray's names."""
        cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
        if cpus >= self.cpus and gpus >= self.gpus:
            return None
        return f"waiting for {self._each}: {cpus:g} CPUs and {gpus:g} GPUs of the cluster are free"

    def _fit(self, node: Node) -> int:
        by_gpu = node.gpus // self.gpus if self.gpus else float("inf")
        return int(min(node.cpus // self.cpus, by_gpu))

    @property
    def _each(self) -> str:
        return f"{self.cpus} CPU{'s' * (self.cpus > 1)}" + (f" and {self.gpus} GPU" if self.gpus else "")


def check_payload(manifest: Manifest) -> None:
    """ValueError for shards that are too large to send."""
    size = prod(manifest.shape) * (1 if manifest.array == "images" else 4)
    if min(manifest.shard, manifest.n) * size > MOST_PAYLOAD:
        raise ValueError(
            f"a shard of {manifest.shard} samples takes {manifest.shard * size / 2**30:.1f} GiB, more than the 1 GiB "
            f"that a worker sends at once; give at most {MOST_PAYLOAD // size} samples a shard"
        )


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """ValueError under torchrun, whose processes would all do the same work."""
    if Process.of(environment).world > 1:
        raise ValueError("Ray spreads the work itself; start this without torchrun")


def fault_of_files(files: Mapping[str, str]) -> str | None:
    """What is wrong with files on this machine, or None. files: path, or name of a model in the package -> SHA-256."""
    for name, expected in files.items():
        try:
            found = digest(name)
        except (ValueError, OSError) as error:
            advice = "" if os.path.isabs(name) else f" (looked for in {os.getcwd()}; an absolute path helps)"
            return f"{error}{advice}"
        if found != expected:
            return f"{name} differs from the file of that name here ({find(name)})"
    return None
