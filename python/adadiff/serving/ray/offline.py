"""Many images on many machines: Ray's workers draw shards, and this process writes them to one folder.

The folder has the format of `adadiff sample`, so each can complete what the other began. The unit of work is a shard:
if a worker dies, another draws its shard again, and a later run keeps existing shards. Only this process writes, so
workers need no shared file system.
"""

import dataclasses
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ...output.asked import Asked, Networks, Texts, device_of
from ...output.filling import Process, ShardFolder, show_depth
from ...output.locking import only_launch
from ...output.shards import PER_SHARD, Manifest
from ...pipelines.contexts import contexts_of
from ...reading import reason
from .planning import Node, Workers, check_launch, check_payload
from .workers import Drawer, failure, fault, unpacked, versions

ANSWER_SECONDS = 120.0  # for a machine to answer whether it can draw
RETRIES = 3  # of a shard whose worker died


def sample(
    model: str | Path,
    n: int,
    out: str | Path,
    *,
    actors: int | None = None,
    cpus: int = 1,
    shard: int = PER_SHARD,
    progress: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    """Draws n samples into the folder `out`, like `adadiff sample --ray`. Called again after an interruption, it draws
    only the missing shards.

    actors: number of workers, each with a copy of the model, `cpus` CPUs and, for device="cuda", a GPU (None: as many
    as fit in the cluster). shard: samples in each file. settings: fields of `Asked`, which are named like the options
    of `adadiff sample`.
    Uses the cluster that this process is connected to, or the one that RAY_ADDRESS names, or starts one on this
    machine. Returns the totals in report.json. Raises ValueError, before anything is drawn, for settings that do not
    fit, a folder of another run, and machines that lack files; FloatingPointError for a sample that is not finite.
    """
    asked = Asked(model=str(model), n=n, **settings)
    networks = asked.load("cpu")  # the machine of this process need not have a GPU
    manifest = Manifest.of(networks.model, {**asked.configuration(networks.model), "shard": shard})
    job = Job.of(asked, networks, manifest, Workers.of(asked, actors, cpus))
    folder = Path(out)
    with only_launch(folder):
        filling = ShardFolder(folder, manifest, Process())
        filling.drop_damaged()
        job.draw(filling, progress)
        totals = filling.finish()
    assert totals is not None
    return totals


@dataclass(frozen=True)
class Job:
    """Shards to be drawn by Ray's workers. texts: contexts of the prompts, or None. files: that workers need, see
    `Asked.files`."""

    asked: Asked
    manifest: Manifest
    workers: Workers
    texts: Texts | None
    files: dict[str, str]

    @staticmethod
    def of(asked: Asked, networks: Networks, manifest: Manifest, workers: Workers) -> "Job":
        """networks: on any device. Loads the text encoder if there are prompts. Raises ValueError for settings that do
        not fit, before connecting to a cluster."""
        check_launch()
        check_payload(manifest)
        asked = dataclasses.replace(asked, device=device_of(asked))  # decided here, not by each worker
        asked.check_anywhere(networks)
        return Job(asked, manifest, workers, contexts_of(asked, networks.model), asked.files(networks.model))

    def check_cluster(self) -> list[Node]:
        """The machines that can draw. Raises ValueError if a machine with enough resources for an actor cannot draw, or
        if more actors are requested than fit. The process must be connected."""
        nodes = self.workers.usable(_nodes())
        self.workers.count(nodes, self.manifest.shards)
        look, expected = ray.remote(num_cpus=0)(fault), versions()
        asked = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                self.files, expected
            ): node
            for node in nodes
        }
        for answer, node in asked.items():
            try:
                wrong = ray.get(answer, timeout=ANSWER_SECONDS)
            except GetTimeoutError:
                wrong = f"no answer in {ANSWER_SECONDS:g} seconds"
            except RayError as error:  # for example, the package is not installed there
                wrong = reason(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            if wrong is not None:
                raise ValueError(f"the machine {node.address} cannot draw: {wrong}")
        return nodes

    def draw(self, folder: ShardFolder, progress: bool = True) -> int:
        """Draws the folder's missing shards and returns their number. If there are any, joins or starts a cluster."""
        missing = folder.missing
        if not missing:
            return 0
        blocks = passes = 0
        with connected():
            count = self.workers.count(self.check_cluster(), len(missing))
            if (busy := self.workers.waits_for(ray.available_resources())) is not None:
                logging.getLogger("adadiff").warning("%s", busy)
            with folder.bar(progress) as bar, lost_workers():
                for row in self._rows(missing, count):
                    if row["error"]:
                        raise failure(row["kind"], row["error"])
                    folder.write(int(row["shard"]), unpacked(row["npz"]))
                    blocks, passes = blocks + int(row["blocks"]), passes + int(row["passes"])
                    show_depth(bar, blocks, passes, self.manifest.num_layers)
                    bar.update(folder.count - bar.n)
        return len(missing)

    def _rows(self, missing: list[int], actors: int) -> Iterator[dict[str, Any]]:
        """Yields what a `Drawer` returns for each missing shard, in order of completion."""
        shards = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)  # of max_task_retries: no replacement yet
            drawn = shards.map_batches(
                Drawer,
                fn_constructor_args=(self.asked, self.manifest, self.texts, self.files),
                batch_size=1,
                # no shard is queued at a busy worker while another is idle
                compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
                num_cpus=self.workers.cpus,
                num_gpus=self.workers.gpus or None,
                max_task_retries=RETRIES,  # Ray Data's default is to retry forever
            )
        drawn.context.enable_progress_bars = False
        # without prefetching, each shard is written before waiting for the next one
        for batch in drawn.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
            yield {name: values[0] for name, values in batch.items()}


@contextmanager
def lost_workers() -> Iterator[None]:
    """Raises OSError for a shard whose workers die again and again, for example killed for lack of memory. Exceptions
    raised by our code in a worker pass unchanged."""
    try:
        yield
    except RayTaskError:
        raise
    except RayError as error:
        raise OSError(f"workers died over a shard again and again: {reason(error)}") from error


@contextmanager
def connected() -> Iterator[None]:
    """Connects to the cluster that this process has joined already, or that RAY_ADDRESS names, or to a new one on this
    machine, which is shut down at the end."""
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs every run
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (RayError, ConnectionError, RuntimeError) as error:
        raise OSError(f"no connection to a Ray cluster: {reason(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _nodes() -> list[Node]:
    alive = (node for node in ray.nodes() if node["Alive"])
    return [
        Node(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in alive
    ]
