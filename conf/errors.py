"""Errors that a user can act on. Each message says what was found, what was wanted, where, and what to change.

A job that ends with one exits with its class's `exit_code`, so that a scheduler can tell what is worth a retry; 1 is a defect (with its
traceback), 2 also a wrong command line.
"""

from typing import ClassVar


class MtmhError(Exception):
    """Base of every error that is reported without a traceback."""

    exit_code: ClassVar[int] = 1


class SettingsError(MtmhError):
    """A settings file or `--set` is wrong; lists every fault at once."""

    exit_code = 2


class SourceError(MtmhError):
    """A user's table is missing, unreadable, lacks a column or holds nothing usable."""

    exit_code = 3


class MachineError(MtmhError):
    """The machine lacks something: Java, a writable lake, a free port."""

    exit_code = 7


class GateError(MtmhError):
    """Data failed a critical expectation; nothing of the stage is published."""

    exit_code = 4


class BrokenGateError(MtmhError):
    """A check itself could not run, which says nothing about the data."""

    exit_code = 5


class TrainingError(MtmhError):
    """A training rank failed; carries the rank and its traceback."""

    exit_code = 8


class PublishError(MtmhError):
    """Another writer published in between, or the night to publish is not there."""

    exit_code = 6


class TableError(MtmhError):
    """A table of the lake is missing, has another schema, or is at another version than expected."""

    exit_code = 6


_MACHINE_FAULTS = {
    "No space left on device": "free some space there, or set lake.root to a larger place",
    "Disk quota exceeded": "free some space there, or have the quota raised",
    "Read-only file system": "make it writable again",
}


def machine_fault(error: BaseException, root: str) -> MachineError | None:
    """The machine's fault behind an error of Spark, Delta or Python, however deep; None if none is known."""
    texts, found = list[str](), error
    while found is not None:
        texts.append(str(found))
        found = found.__cause__ or found.__context__  # type: ignore[assignment]
    for phrase, advice in _MACHINE_FAULTS.items():
        if any(phrase in text for text in texts):
            return MachineError(f"{phrase.lower()}, while the lake at {root} was written: {advice}; then run the same command again")
    return None
