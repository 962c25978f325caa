"""What the last good night counted, which is what the next one builds on: read, put back in place, and told apart from another rule.

A night's counts are of use to the next one if the same code and settings would count them again. `counted_by` and `totaled_by` are hashes
of everything that decides, per day, the counts, and beyond that the totals.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from deltalake.exceptions import DeltaError
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.errors import TableError
from conf.settings import PairSettings
from conf.tables import CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_DAYS, CO_ENGAGEMENT_PAIRS, CO_ENGAGEMENT_TOTALS, ITEM_POPULARITY, Table
from features.increments import DayState
from jobs.ledger import code_fingerprint
from jobs.stage import StageRun


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What is counted into tables of its own: all actions, or some of them.

    Attributes:
        name: of pairs.signals; None: all actions.
        actions: that count; None: all.
        settings: how it is counted.
    """

    name: str | None
    actions: tuple[str, ...] | None
    settings: PairSettings

    @classmethod
    def all_of(cls, settings: PairSettings) -> list["Signal"]:
        """All actions together, then each of pairs.signals."""
        named = [cls(name=name, actions=tuple(of.actions), settings=settings.of_signal(name)) for name, of in settings.signals.items()]
        return [cls(name=None, actions=None, settings=settings), *named]

    @property
    def label(self) -> str:
        """What notes call it."""
        return "pairs" if self.name is None else f"pairs of signal {self.name}"

    @property
    def where(self) -> str:
        """The section of the settings that its window stands in."""
        return "pairs" if self.name is None else f"pairs.signals.{self.name}"

    @property
    def prefix(self) -> str:
        """Begins the names of its metrics."""
        return "" if self.name is None else f"{self.name}_"

    @property
    def daily(self) -> Table:
        """Its co_engagement_daily."""
        return CO_ENGAGEMENT_DAILY.of_signal(self.name)

    @property
    def days(self) -> Table:
        """Its co_engagement_days."""
        return CO_ENGAGEMENT_DAYS.of_signal(self.name)

    @property
    def totals(self) -> Table:
        """Its co_engagement_totals."""
        return CO_ENGAGEMENT_TOTALS.of_signal(self.name)

    @property
    def pairs(self) -> Table:
        """Its co_engagement_pairs."""
        return CO_ENGAGEMENT_PAIRS.of_signal(self.name)

    @property
    def popularity(self) -> Table:
        """Its item_popularity."""
        return ITEM_POPULARITY.of_signal(self.name)

    @property
    def state(self) -> tuple[Table, ...]:
        """Tables of the last good night that the next one reads; all of one run."""
        return self.days, self.daily, self.totals

    def take(self, engagements: DataFrame) -> DataFrame:
        """The engagements that count."""
        return engagements if self.actions is None else engagements.where(F.col("action").isin(*self.actions))


@dataclass(frozen=True, kw_only=True)
class PairState:
    """The days of the last good night, the versions of the tables that hold their counts, and rows of the daily one."""

    days: dict[date, dict[str, Any]]
    versions: dict[str, int]
    num_daily_rows: int

    @property
    def states(self) -> dict[date, DayState]:
        """What each day was counted from."""
        return {day: DayState(num_events=row["num_events"], fingerprint=row["fingerprint"]) for day, row in self.days.items()}

    def rows_of(self, stale: Collection[date], moved: Collection[date], num_events: Mapping[date, int]) -> int:
        """About how many rows of co_engagement_daily a night compares: of days counted again those of then and of now, and of days that
        the holdout has moved over.
        """
        then: dict[date, int] = {day: row["num_events"] for day, row in self.days.items()}
        events = sum(num_events.get(day, 0) for day in stale) + sum(then.get(day, 0) for day in {*stale, *moved})
        return round(self.num_daily_rows * events / max(1, sum(then.values())))

    def common(self, column: str) -> Any:
        """The value that all days share."""
        return next(iter(self.days.values()))[column]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The last good night, or why there is none to build on."""

    state: PairState | None
    reason: str = ""


def find_state(run: StageRun, signal: Signal) -> Found:
    """The state of the last good night, with its tables as the latest versions."""
    if run.force:
        return Found(state=None, reason="--force asks for it")
    record = run.night.ledger.last_success(stage=run.stage)
    if record is None:
        return Found(state=None, reason="no night has counted pairs before")
    versions = {table.name: record.output_versions[table.name] for table in signal.state if table.name in record.output_versions}
    if not versions and signal.name is not None:
        return Found(state=None, reason=f"the last good night, {record.run_id}, did not count this signal")
    if len(versions) < len(signal.state):
        return Found(state=None, reason=f"the last good night, {record.run_id}, was made by an earlier version of this code")
    for table in signal.state:
        if not _in_place(run, table, versions[table.name]):
            return Found(state=None, reason=f"{table.name} of the last good night, {record.run_id}, is gone or vacuumed")
    rows = run.night.lake.read(signal.days).collect()
    if not rows:
        return Found(state=None, reason=f"the last good night, {record.run_id}, had no engagements")
    latest = {table.name: run.night.lake.version(table) for table in signal.state}
    num_daily_rows = int(record.metrics[f"{signal.prefix}num_daily_rows"])
    return Found(state=PairState(days={row["event_date"]: row.asDict() for row in rows}, versions=latest, num_daily_rows=num_daily_rows))


def _in_place(run: StageRun, table: Table, version: int) -> bool:
    """Whether the table's latest version holds what that version held: a night that was killed may have left another one."""
    try:
        run.night.lake.restore(table, version)
    except (DeltaError, TableError, OSError) as error:
        run.note(f"cannot restore {table.name} to version {version}: {str(error).splitlines()[0]}")
        return False
    return run.night.lake.version(table) >= version


def counting_rule(settings: PairSettings, hash_key: bytes, actions: Sequence[str] | None = None) -> str:
    """Hash of the code and the settings that decide the counts of a day."""
    names = {"window", "max_items_per_user_day", "max_triggers_per_target", "min_users_per_pair"}
    given = settings.model_dump(mode="json", include=names) | ({} if actions is None else {"actions": sorted(actions)})
    return _digest(given, code_fingerprint(["features"]), hashlib.sha256(hash_key).hexdigest())


def totaling_rule(settings: PairSettings, landmark: date) -> str:
    """Hash of what else decides a total, but for the holdout, which moves every night."""
    return _digest(settings.half_life_days, landmark.isoformat())


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
