"""What a night has to do over: from what changed in `engagements` to the days and pairs that it touches.

A night knows, per day, a fingerprint of the engagements that the last good night counted. Whatever made a day differ (new, late,
corrected or deleted events, another user's history, a run date further back), its fingerprint tells. A changed day d touches the target
days d to d + reach, as far forward as the window reaches: these are counted again, whole. What that does to pairs and their totals is
said in `features.changed_pairs`.

Worked example, sessions within a day, night of March 5: a late event of March 1 changes day 1 only. Days 1 and 5 are counted again.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from math import ceil

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.settings import WindowSettings
from features.pairs import where_days

_EVENT = ["user_id", "item_id", "action", "engaged_at", "session_id"]  # unique, and nothing else of an event decides a count
_SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class DayState:
    """The engagements of a day: how many, and a hash of all of them."""

    num_events: int
    fingerprint: str


def fingerprint_days(engagements: DataFrame) -> DataFrame:
    """Engagements to (event_date, num_events, fingerprint).

    The fingerprint is the exclusive or of 128 bits per event: no order of rows matters, no sum overflows, and since keys are unique no
    event can cancel another.
    """
    halves = [F.bit_xor(F.xxhash64(*salt, *map(F.col, _EVENT))) for salt in ([], [F.lit("second half")])]
    fingerprint = F.concat(*(F.lpad(F.hex(half), 16, "0") for half in halves))
    return engagements.groupBy("event_date").agg(F.count(F.lit(1)).alias("num_events"), fingerprint.alias("fingerprint"))


def changed_days(old: Mapping[date, DayState], new: Mapping[date, DayState]) -> set[date]:
    """Days whose engagements differ, days that came and days that went."""
    return {day for day in old.keys() | new.keys() if old.get(day) != new.get(day)}


def stale_days(changed: Collection[date], known: Collection[date], *, reach_days: int | None) -> set[date]:
    """The target days, among those with engagements now or before, whose counts a changed day can reach.

    Args:
        changed: days whose engagements differ.
        known: days with engagements, now or before.
        reach_days: how many days after a trigger its target can be; None: any number.
    """
    order = sorted(changed)
    stale = set()
    for day in known:
        before = bisect_right(order, day)
        if before and (reach_days is None or (day - order[before - 1]).days <= reach_days):
            stale.add(day)
    return stale


def window_reach(window: WindowSettings, *, longest_session_days: int) -> int | None:
    """Days after a trigger within which its target lies; None: there is no such bound.

    Args:
        window: which later engagements count.
        longest_session_days: days from the first to the last engagement of any session.
    """
    if window.kind == "session":
        return longest_session_days
    return None if window.window_seconds is None else ceil(window.window_seconds / _SECONDS_PER_DAY)


def longest_session(engagements: DataFrame, changed: Collection[date]) -> DataFrame:
    """Engagements to one row: `days` that the longest session with an engagement on a changed day spans after its first day.

    What a session was before a change, a former night has seen.
    """
    keys = ["user_id", "session_id"]
    events = engagements.where(F.col("session_id").isNotNull())
    touched = events.join(events.where(where_days(changed)).select(*keys).distinct(), on=keys, how="left_semi")
    span = F.date_diff(F.max("event_date"), F.min("event_date"))
    return touched.groupBy(*keys).agg(span.alias("days")).agg(F.coalesce(F.max("days"), F.lit(0)).alias("days"))


def moved_days(before: date, now: date) -> set[date]:
    """Days that left or entered the holdout as its first day moved."""
    return {min(before, now) + timedelta(days=n) for n in range(abs((now - before).days))}
