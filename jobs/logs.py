"""Logs of a job: text for people, or with `log.format: json` one object a line on standard error, for a collector.

An object has time (UTC), level, message, and run_id and stage where they are known. It goes through the logger `mtmh` of the standard
library, so that a handler of your own hears the same. No user id, and nothing of the environment, is ever logged.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TextIO

from rich.text import Text

from conf.settings import LogSettings

LOGGER = logging.getLogger("mtmh")
_FIELDS: dict[str, str] = {}
"""Of the night that this process runs; not a context variable, as the thread that shows progress speaks of the same night."""


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, what is known of the night, and the message; a message of several lines stays one line of the log."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        content = {"time": when, "level": record.levelname.lower(), **_FIELDS, "message": record.getMessage()}
        return json.dumps(content, ensure_ascii=False)


def configure(settings: LogSettings, *, stream: TextIO | None = None) -> None:
    """Say things as the settings want them from here on; `stream` defaults to standard error."""
    for handler in list(LOGGER.handlers):
        if isinstance(handler.formatter, JsonLines):
            LOGGER.removeHandler(handler)
    LOGGER.propagate, json_lines = False, settings.format == "json"
    if json_lines:
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(JsonLines())
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)


def is_json() -> bool:
    """Whether what is said becomes lines of JSON."""
    return any(isinstance(handler.formatter, JsonLines) for handler in LOGGER.handlers)


def log(text: str, *, level: str = "info") -> None:
    """One record; styles in square brackets are taken off."""
    LOGGER.log(logging.getLevelNamesMapping()[level.upper()], "%s", Text.from_markup(text).plain.strip())


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """What is logged in this block says so: run_id, stage."""
    before = dict(_FIELDS)
    _FIELDS.update(fields)
    try:
        yield
    finally:
        _FIELDS.clear()
        _FIELDS.update(before)
