"""Settings of a service, checked on construction. Needs no package of the extra `serve`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..policies.spelling import parts_from
from ..reading import read_text
from ..sampling.sample_batch import whole

MOST_STEPS = 1000  # timesteps of a noise schedule
MOST_NAME = 64  # characters
DEFAULT_PRESET = "default"  # name of the preset for requests without a policy
LEAST_KEY = 8  # characters
KEY_VARIABLE = "ADADIFF_API_KEY"
DEFAULT_STEPS = 50
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Settings:
    """Limits are inclusive. A request that exceeds one is refused; nothing is clipped.

    max_images, max_steps, max_partial_images, max_guidance_scale: of one request. steps: default of requests.
    max_body: bytes of a body; max_depth: nested arrays and objects in it; body_seconds: time for it to arrive.
    head_seconds: time for request line and headers to arrive, under `adadiff serve`.
    write_seconds: a client that reads nothing of a stream for this long is disconnected. policies: presets, name ->
    policy, which may read files and import classes. api_keys: requests to /v1/ must send one of them; empty: no key is
    required.
    Raises ValueError for invalid values.
    """

    max_images: int = 16
    max_steps: int = 250
    max_partial_images: int = 64
    max_guidance_scale: float = 100.0
    steps: int = DEFAULT_STEPS
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
                if "not calibrated" not in str(error):  # this depends on the model, which is not known here
                    raise ValueError(f"policy {name}={spelling}: {error}") from None
        object.__setattr__(self, "policies", MappingProxyType(dict(self.policies)))
        for key in self.api_keys:
            if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(
                    f"an API key must have {LEAST_KEY} or more printable ASCII characters and no space; one of the "
                    "keys does not"
                )


def steps_of(steps: int | None, max_steps: int) -> int:
    """Steps of requests that name none: `steps`, or the default, which a lower limit lowers."""
    return min(DEFAULT_STEPS, max_steps) if steps is None else steps


def check_name(what: str, name: str) -> None:
    """ValueError for a name that does not fit in URLs, logs and metrics."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{what} has letters, digits, '.', '_' and '-', at most {MOST_NAME}, got {name!r}")


def presets_of(texts: Sequence[str], option: str = "--policy") -> dict[str, str]:
    """name -> policy, from texts NAME=SPELLING. ValueError, which names the option, for anything else."""
    policies: dict[str, str] = {}
    for text in texts:
        name, equals, spelling = text.partition("=")
        if not (equals and spelling) or name in policies:
            raise ValueError(f"{option} takes NAME=SPELLING, each name once, as in best=exit:0.135; got {text!r}")
        policies[name] = spelling
    return policies


def names_of(models: Sequence[str]) -> dict[str, str]:
    """name -> file, from NAME=FILE, a file, or the name of a model in the package. ValueError for two models of the
    same name."""
    named: dict[str, str] = {}
    for text in models:
        name, equals, file = text.partition("=")
        if not equals:
            name, file = Path(text).stem, text
        if name in named:
            raise ValueError(f"two models are called {name!r}; give one as NAME=FILE")
        named[name] = file
    return named


def shallow_of(texts: Sequence[str], named: Mapping[str, str], t_switch: float | None) -> dict[str, str]:
    """Name of a model -> file of its shallow model, from NAME=FILE, or a file alone if there is a single model.
    ValueError for an unknown name, and for two shallow models of one model."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals:
            name, file = next(iter(named)), text
        if name not in named or name in found or (not equals and len(named) > 1):
            known = ", ".join(named)
            raise ValueError(f"--shallow-model takes NAME=FILE, each of the models {known} once; got {text!r}")
        found[name] = file
    if t_switch is not None and not found:
        raise ValueError("--t-switch is where a shallow model hands over; give --shallow-model, too")
    return found


def keys_of(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """API keys: from the environment variable KEY_VARIABLE, and from a file, one a line. ValueError for a file without
    keys."""
    keys = [environment[KEY_VARIABLE]] if environment.get(KEY_VARIABLE) else []
    if file is not None:
        found = read_text(file).split()
        if not found:
            raise ValueError(f"{file} holds no key; one a line")
        keys += found
    return tuple(keys)
