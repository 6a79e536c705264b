"""Logs of a service: a line for each request and each event, as text or as JSON."""

import json
import logging
import time
from typing import Any, Literal, TextIO

Format = Literal["text", "json"]
LOG = logging.getLogger("adadiff.serving")


def log(event: str, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Logs an event. fields: JSON values; None is left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    LOG.log(level, event, extra={"fields": known}, exc_info=error)


class TextFormatter(logging.Formatter):
    """`2026-05-04T10:00:00.000Z info request id=... status=200 ...`; values are escaped where needed."""

    def format(self, record: logging.LogRecord) -> str:
        values = (f"{name}={_plain(value)}" for name, value in getattr(record, "fields", {}).items())
        line = " ".join((_stamp(record), record.levelname.lower(), record.getMessage(), *values))
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, event, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _stamp(record), "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(form: Format, stream: TextIO) -> None:
    """Sends the logs of the package, of uvicorn and Python's warnings to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for name, level in (("adadiff", logging.INFO), ("uvicorn", logging.WARNING), ("py.warnings", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.captureWarnings(True)


def _stamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text and text else ascii(text)
