"""Many images over many machines: Ray's workers draw shards, this process writes them into one folder.

The folder is the one that `adadiff sample` fills, so either goes on with what the other began, and all that reads such
folders reads this one. Shards are the unit: a worker that dies has its shard drawn again by another, and a later run
keeps all that are there. Only this process writes, so workers need no file system in common.
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

ANSWER_SECONDS = 120.0  # that a machine has to say whether it can draw
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
    """Draws n samples into the folder `out`, as `adadiff sample --ray`. Called again after any interruption, it draws
    what is missing.

    actors: workers, each with a copy of the model, `cpus` CPUs and, for device="cuda", a GPU (None: as many as fit in
    the cluster). settings: as in `Asked`; the others have the meaning of the options of `adadiff sample`.
    Uses the cluster that this process is connected to, or that RAY_ADDRESS names, or starts one on this machine.
    Returns the totals that report.json has. Raises ValueError, before anything is drawn, for settings that do not fit,
    a folder of another run, and machines that lack the files; FloatingPointError where a sample is not finite.
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
    """Shards that Ray's workers draw. texts: of the prompts, for models of text. files: that workers need, see
    `Asked.files`."""

    asked: Asked
    manifest: Manifest
    workers: Workers
    texts: Texts | None
    files: dict[str, str]

    @staticmethod
    def of(asked: Asked, networks: Networks, manifest: Manifest, workers: Workers) -> "Job":
        """networks: on any device. Raises ValueError for settings that do not fit, before a cluster is asked for
        anything; loads the text encoder where there are prompts."""
        check_launch()
        check_payload(manifest)
        asked = dataclasses.replace(asked, device=device_of(asked))  # not what each worker finds
        asked.check_anywhere(networks)
        return Job(asked, manifest, workers, contexts_of(asked, networks.model), asked.files(networks.model))

    def check_cluster(self) -> list[Node]:
        """The machines that can draw. Raises ValueError where one of those with room for an actor cannot, or more
        actors are asked for than fit. For a process that is connected."""
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
            except RayError as error:  # as where the package is not installed
                wrong = reason(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            if wrong is not None:
                raise ValueError(f"the machine {node.address} cannot draw: {wrong}")
        return nodes

    def draw(self, folder: ShardFolder, progress: bool = True) -> int:
        """Draws the folder's missing shards, and returns how many. Starts or joins a cluster if there are any."""
        missing = folder.missing
        if not missing:
            return 0
        blocks = passes = 0
        with connected():
            count = self.workers.count(self.check_cluster(), len(missing))
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
        """What a `Drawer` returns for each, as soon as it does, in any order."""
        shards = ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RayDeprecationWarning)  # of max_task_retries, which has no successor yet
            drawn = shards.map_batches(
                Drawer,
                fn_constructor_args=(self.asked, self.manifest, self.texts, self.files),
                batch_size=1,
                # none is promised to a worker that is busy while another has nothing to do
                compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
                num_cpus=self.workers.cpus,
                num_gpus=self.workers.gpus or None,
                max_task_retries=RETRIES,  # Ray Data's own is for ever
            )
        drawn.context.enable_progress_bars = False
        # without prefetching, a shard is on the disk before the next one is waited for
        for batch in drawn.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy"):
            yield {name: values[0] for name, values in batch.items()}


@contextmanager
def lost_workers() -> Iterator[None]:
    """OSError for a shard that costs worker after worker, as where their machine kills them for its memory. A defect of
    ours, raised in a worker, stays what it is."""
    try:
        yield
    except RayTaskError:
        raise
    except RayError as error:
        raise OSError(f"workers died over a shard again and again: {reason(error)}") from error


@contextmanager
def connected() -> Iterator[None]:
    """To the cluster that this process has joined already, or that RAY_ADDRESS names, or one of this machine, which
    ends with it."""
    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it says something of every run
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
