"""Arguments of the application: `serve run adadiff.serving.ray:app KEY=VALUE`, or a config file. Imports no Ray."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ...checkpoint import DTYPES
from ...forward.options import ExecutionOptions, Runner
from ..logs import Format
from ..settings import Settings, names_of, presets_of, shallow_of, steps_of


class Arguments(BaseModel):
    """models: as for `adadiff serve`, a list or comma-separated text; opened by the replicas, so paths should be
    absolute. policies: a mapping name -> policy, or NAME=SPELLING separated by semicolons. max_images, max_steps,
    max_body, steps, queue, capacity (lanes of a replica), admission, shallow_model (as models), t_switch, text_encoder,
    decoder, api_key_file, log_format: as the options of `adadiff serve`.

    num_replicas: a fixed number. Or min_replicas to max_replicas: autoscaling, with target_ongoing_requests for each
    replica (None: capacity). max_ongoing_requests: most requests in a replica; up to `queue` others wait at the proxy
    (None: twice the capacity, so that free lanes are filled at once). num_cpus, num_gpus: of a replica; with a GPU it
    draws on that. drain_timeout: seconds for requests in flight when a replica ends.
    Raises pydantic's ValidationError, a ValueError, for invalid values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: list[str] = Field(["digits"], min_length=1)
    policies: dict[str, str] = {}
    steps: int | None = None
    max_images: int = 16
    max_steps: int = 250
    max_body: int = 65536
    queue: int = Field(256, ge=1)
    capacity: int = Field(64, ge=1)
    dtype: str | None = None
    runner: Runner = "eager"
    batch_invariant: bool = False
    admission: Literal["arrival", "work"] = "arrival"
    shallow_model: list[str] = []
    t_switch: float | None = None
    text_encoder: str | None = None
    decoder: str | None = None
    api_key_file: Path | None = None
    log_format: Format = "text"

    num_replicas: int | None = Field(None, ge=1)
    min_replicas: int | None = Field(None, ge=0)
    max_replicas: int | None = Field(None, ge=1)
    target_ongoing_requests: float | None = Field(None, gt=0)
    max_ongoing_requests: int | None = Field(None, ge=1)
    num_cpus: float = Field(1, gt=0)
    num_gpus: float = Field(0, ge=0)
    drain_timeout: float = Field(30, gt=0, le=86400)
    health_check_period: float = Field(10, gt=0)
    health_check_timeout: float = Field(30, gt=0)

    @field_validator("models", "shallow_model", mode="before")
    @classmethod
    def _models(cls, given: Any) -> Any:
        return given.split(",") if isinstance(given, str) else given

    @field_validator("policies", mode="before")
    @classmethod
    def _policies(cls, given: Any) -> Any:
        return presets_of(given.split(";"), "policies") if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check(self) -> "Arguments":
        _ = self.shallow
        self.settings()
        _ = self.execution
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.max_replicas is None:
            for name in ("min_replicas", "target_ongoing_requests"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for a varying number of replicas; give max_replicas, too")
        elif self.num_replicas is not None:
            raise ValueError("give either num_replicas or max_replicas")
        elif self.least_replicas > self.max_replicas:
            raise ValueError(f"min_replicas must be at most max_replicas, {self.max_replicas}, got {self.min_replicas}")
        if self.ongoing < self.capacity:
            raise ValueError(
                f"max_ongoing_requests must be at least the capacity, {self.capacity}, or lanes stay empty; got "
                f"{self.ongoing}"
            )
        return self

    def settings(self, api_keys: tuple[str, ...] = ()) -> Settings:
        return Settings(
            max_images=self.max_images,
            max_steps=self.max_steps,
            max_body=self.max_body,
            steps=steps_of(self.steps, self.max_steps),
            policies=self.policies,
            api_keys=api_keys,
        )

    @property
    def execution(self) -> ExecutionOptions:
        return ExecutionOptions(batch_invariant=self.batch_invariant, runner=self.runner)

    @property
    def named(self) -> dict[str, str]:
        """Files of models by name."""
        return names_of(self.models)

    @property
    def shallow(self) -> dict[str, str]:
        return shallow_of(self.shallow_model, self.named, self.t_switch)

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        return "cuda" if self.num_gpus else "cpu"

    @property
    def least_replicas(self) -> int:
        return 1 if self.min_replicas is None else self.min_replicas

    @property
    def ongoing(self) -> int:
        """Most requests in a replica at once."""
        return 2 * self.capacity if self.max_ongoing_requests is None else self.max_ongoing_requests

    def deployment(self) -> dict[str, Any]:
        """Options for Ray Serve's `deployment`."""
        options: dict[str, Any] = {
            "name": "adadiff",
            "max_ongoing_requests": self.ongoing,
            "max_queued_requests": self.queue,
            "graceful_shutdown_timeout_s": self.drain_timeout,
            "health_check_period_s": self.health_check_period,
            "health_check_timeout_s": self.health_check_timeout,
            "max_constructor_retry_count": 3,  # retrying does not help if a file is missing
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
        }
        if self.max_replicas is None:
            return options | {"num_replicas": self.num_replicas or 1}
        autoscaling = {
            "min_replicas": self.least_replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_ongoing_requests or float(self.capacity),
        }
        return options | {"autoscaling_config": autoscaling}
