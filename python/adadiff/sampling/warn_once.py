"""Warnings in the log that requests with the same settings would repeat."""

import logging
from functools import lru_cache


@lru_cache(maxsize=1024)
def warn_once(message: str, *values: object) -> None:
    """Logs `message % values`, once for the same ones."""
    logging.getLogger("adadiff").warning(message, *values)
