"""The command line that all jobs share: strings become typed objects here and nowhere else."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

from rich.markup import escape

from conf.errors import MtmhError, SettingsError
from conf.settings import Settings, load_settings, packaged_configs
from jobs import logs


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What a job was asked to do."""

    settings: Settings
    run_date: date
    plan: bool
    force: bool
    publish: bool
    accept: str | None
    last_date: date


def add_config(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Add `--config` and `--set`."""
    parser.add_argument(
        "--config", required=default is None, default=default, help=f"one of {', '.join(packaged_configs())}, or a path to your .yaml"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting; may be repeated")


def settings_of(values: argparse.Namespace) -> Settings:
    """The settings that `--config` and `--set` name; from here on the job says things as they want it.

    Raises:
        SettingsError: one is wrong.
    """
    settings = load_settings(values.config, values.set)
    logs.configure(settings.log)
    return settings


def parse_date(text: str, *, flag: str = "--run-date") -> date:
    """An ISO day.

    Raises:
        SettingsError: anything else.
    """
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise SettingsError(f"{flag} {text!r} is not a day; wanted YYYY-MM-DD, e.g. 2017-11-30") from error


def parse(argv: Sequence[str] | None, *, description: str, ranged: bool = False) -> Arguments:
    """Parse the flags of a stage or a night; `ranged`: of several nights, with a last date.

    Raises:
        SettingsError: a date or setting is wrong.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--run-date", required=True, help="the night: everything before the end of this UTC day counts, YYYY-MM-DD")
    add_config(parser)
    parser.add_argument("--plan", action="store_true", help="check the sources' columns and print what would be done; do nothing")
    parser.add_argument("--force", action="store_true", help="run again what has succeeded with the same inputs")
    parser.add_argument("--publish", action="store_true", help="publish the lists even if a later night is the current one")
    parser.add_argument("--accept", metavar="REASON", help="go on although critical expectations fail; `runs` keeps the reason")
    if ranged:
        parser.add_argument("--to", help="last night of a range that is run day by day, e.g. to fill in history; default: only --run-date")
    values = parser.parse_args(argv)
    first = parse_date(values.run_date)
    last = parse_date(values.to, flag="--to") if ranged and values.to else first
    if values.accept is not None and not values.accept.strip():
        raise SettingsError("--accept is empty; wanted the reason why bad numbers are good tonight, for those who read `runs`")
    if last < first:
        raise SettingsError(f"--to {last} is before --run-date {first}; wanted the same day or a later one")
    return Arguments(
        settings=settings_of(values),
        run_date=first,
        last_date=last,
        plan=values.plan,
        force=values.force,
        publish=values.publish,
        accept=values.accept,
    )


def report_errors(main: Callable[[], None]) -> None:
    """Run a job's main: an error that a user can act on ends it with its message and exit code, anything else with its traceback and 1."""
    try:
        main()
    except MtmhError as error:
        if logs.is_json():
            logs.log(escape(f"{type(error).__name__}: {error}"), level="error")
        else:
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
