"""What the operator of a service decides, checked on construction. Imports nothing of the extra `serve`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..policies.spelling import parts_from
from ..sampling.sample_batch import whole

MOST_STEPS = 1000  # that a noise schedule has
MOST_NAME = 64  # characters
DEFAULT_PRESET = "default"  # the preset that requests without a policy get, where the operator names one so
LEAST_KEY = 8  # characters
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Settings:
    """Limits are inclusive; what exceeds one is refused, never clipped.

    max_images, max_steps, max_partial_images, max_guidance_scale: of one request. steps: of requests that name none.
    max_body: bytes of a body; max_depth: nested arrays and objects in it; body_seconds: until all of it has arrived.
    head_seconds: until the request line and all headers have, under `adadiff serve`.
    write_seconds: a client that reads nothing of a stream for so long is disconnected. policies: presets by name, any
    spelling that `policy` takes, files and classes included. api_keys: of which requests to /v1/ bring one; none: no
    key is asked for.
    Raises ValueError for what cannot be.
    """

    max_images: int = 16
    max_steps: int = 250
    max_partial_images: int = 64
    max_guidance_scale: float = 100.0
    steps: int = 50
    max_body: int = 65536
    max_depth: int = 16
    body_seconds: float = 10.0
    head_seconds: float = 10.0
    write_seconds: float = 60.0
    policies: Mapping[str, str] = field(default_factory=dict)
    api_keys: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name, most in (("max_images", 1024), ("max_steps", MOST_STEPS), ("max_partial_images", MOST_STEPS)):
            whole(name, getattr(self, name), 1, most)
        whole("max_body", self.max_body, 256, 2**24)
        whole("max_depth", self.max_depth, 2, 256)
        whole("steps", self.steps, 1)
        if self.steps > self.max_steps:
            raise ValueError(f"steps must be at most max_steps, {self.max_steps}, got {self.steps}")
        for name in ("max_guidance_scale", "head_seconds", "body_seconds", "write_seconds"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= 1e6:
                raise ValueError(f"{name} must be a positive number of at most 1e6, got {value!r}")
        for name, spelling in self.policies.items():
            check_name("a policy's name", name)
            try:
                parts_from(spelling)
            except ValueError as error:
                if "not calibrated" not in str(error):  # which depends on the model
                    raise ValueError(f"policy {name}={spelling}: {error}") from None
        object.__setattr__(self, "policies", MappingProxyType(dict(self.policies)))
        for key in self.api_keys:
            if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"an API key has {LEAST_KEY} or more printable ASCII characters and no space; one of those given "
                    "has not"
                )


def check_name(what: str, name: str) -> None:
    """ValueError for a name that does not fit in URLs, logs and metrics."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} has letters, digits, '.', '_' and '-', at most {MOST_NAME}, got {name!r}")
