"""Errors that a user can act on. Each message says what was found, what was wanted, where, and what to change."""


class MtmhError(Exception):
    """Base of every error that is reported without a traceback."""


class SettingsError(MtmhError):
    """A settings file or `--set` is wrong; lists every fault at once."""


class SourceError(MtmhError):
    """A user's table is missing, unreadable, lacks a column or holds nothing usable."""


class MachineError(MtmhError):
    """The machine lacks something: Java, a writable lake, a free port."""


class GateError(MtmhError):
    """Data failed a critical expectation; nothing of the stage is published."""


class BrokenGateError(MtmhError):
    """A check itself could not run, which says nothing about the data."""


class TrainingError(MtmhError):
    """A training rank failed; carries the rank and its traceback."""


class PublishError(MtmhError):
    """Another writer published in between, or the night to publish is not there."""


class TableError(MtmhError):
    """A table of the lake is missing, has another schema, or is at another version than expected."""
