"""What the last good night counted, which is what the next one builds on: read, put back in place, and told apart from another rule.

A night's counts are of use to the next one if the same code and settings would count them again. `counted_by` and `totaled_by` are hashes
of everything that decides, per day, the counts, and beyond that the totals.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import date
from typing import Any

from deltalake.exceptions import DeltaError

from conf.errors import TableError
from conf.settings import PairSettings
from conf.tables import CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_DAYS, CO_ENGAGEMENT_TOTALS, Table
from features.increments import DayState
from jobs.ledger import code_fingerprint
from jobs.stage import StageRun

STATE = (CO_ENGAGEMENT_DAYS, CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_TOTALS)
"""Tables of the last good night that the next one reads; all of one run."""


@dataclass(frozen=True, kw_only=True)
class PairState:
    """The days of the last good night, and the versions of the tables that hold their counts."""

    days: dict[date, dict[str, Any]]
    versions: dict[str, int]

    @property
    def states(self) -> dict[date, DayState]:
        """What each day was counted from."""
        return {day: DayState(num_events=row["num_events"], fingerprint=row["fingerprint"]) for day, row in self.days.items()}

    def common(self, column: str) -> Any:
        """The value that all days share."""
        return next(iter(self.days.values()))[column]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The last good night, or why there is none to build on."""

    state: PairState | None
    reason: str = ""


def find_state(run: StageRun) -> Found:
    """The state of the last good night, with its tables as the latest versions."""
    if run.force:
        return Found(state=None, reason="--force asks for it")
    record = run.night.ledger.last_success(stage=run.stage)
    if record is None:
        return Found(state=None, reason="no night has counted pairs before")
    versions = {table.name: record.output_versions[table.name] for table in STATE if table.name in record.output_versions}
    if len(versions) < len(STATE):
        return Found(state=None, reason=f"the last good night, {record.run_id}, was made by an earlier version of this code")
    for table in STATE:
        if not _in_place(run, table, versions[table.name]):
            return Found(state=None, reason=f"{table.name} of the last good night, {record.run_id}, is gone or vacuumed")
    rows = run.night.lake.read(CO_ENGAGEMENT_DAYS).collect()
    if not rows:
        return Found(state=None, reason=f"the last good night, {record.run_id}, had no engagements")
    latest = {table.name: run.night.lake.version(table) for table in STATE}
    return Found(state=PairState(days={row["event_date"]: row.asDict() for row in rows}, versions=latest))


def _in_place(run: StageRun, table: Table, version: int) -> bool:
    """Whether the table's latest version holds what that version held: a night that was killed may have left another one."""
    try:
        run.night.lake.restore(table, version)
    except (DeltaError, TableError, OSError) as error:
        run.note(f"cannot restore {table.name} to version {version}: {str(error).splitlines()[0]}")
        return False
    return run.night.lake.version(table) >= version


def counting_rule(settings: PairSettings, hash_key: bytes) -> str:
    """Hash of the code and the settings that decide the counts of a day."""
    names = {"window", "max_items_per_user_day", "min_users_per_pair"}
    return _digest(settings.model_dump(mode="json", include=names), code_fingerprint(["features"]), hashlib.sha256(hash_key).hexdigest())


def totaling_rule(settings: PairSettings, landmark: date) -> str:
    """Hash of what else decides a total, but for the holdout, which moves every night."""
    return _digest(settings.half_life_days, landmark.isoformat())


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
