"""Many machines with Ray (extra `ray`): `serve run adadiff.serving.ray:app` for a service, `sample` for many images.

Importing this package does not import Ray; using one of the two names does.
"""

import os
from typing import TYPE_CHECKING, Any

from .extra import check_extra

if TYPE_CHECKING:
    from .offline import sample as sample
    from .online import app as app

__all__ = ["app", "sample"]

# Ray's usage reports are off for clusters that this process starts, unless the variable is set.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def __getattr__(name: str) -> Any:
    if name == "sample":
        check_extra("ray.data")
        from .offline import sample

        return sample
    if name == "app":
        check_extra("ray.serve", "fastapi", "prometheus_client")
        from .online import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
