"""The stage on a small lake: nights that build on each other, a way back, a killed night, other settings, and what it refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from conf.errors import SettingsError, SourceError
from conf.settings import PairSettings, WindowSettings, load_settings
from conf.tables import (
    CO_ENGAGEMENT_DAILY,
    CO_ENGAGEMENT_DAYS,
    CO_ENGAGEMENT_PAIRS,
    CO_ENGAGEMENT_TOTALS,
    ENGAGEMENTS,
    ITEM_POPULARITY,
    Table,
)
from features.increments import DayState
from jobs.build_pairs import _check_history, _longest_session, build_pairs, too_much
from jobs.ledger import StageRecord
from jobs.pair_state import PairState, counting_rule, totaling_rule
from jobs.progress import Display
from jobs.stage import Night, StageRun, make_night, run_stage
from tests.features.test_pairs import FIRST, LAST, SESSION, TIME, to_spark, world
from tests.worlds import write_config

NOW = datetime(2024, 6, 1, tzinfo=UTC)
BUILT = (CO_ENGAGEMENT_DAILY, CO_ENGAGEMENT_DAYS, CO_ENGAGEMENT_TOTALS, CO_ENGAGEMENT_PAIRS, ITEM_POPULARITY)


@dataclass(frozen=True, kw_only=True)
class Shop:
    """A lake whose engagements are written as they are given, in place of ingest."""

    spark: SparkSession
    config: str

    def night(self, day: int, *assignments: str) -> Night:
        run_date = FIRST + timedelta(days=day - 1)
        return make_night(
            load_settings(self.config, ("source.events.columns.action=action", *assignments)),
            run_date,
            spark=self.spark,
            display=Display(seconds_per_line=3600),
            now=NOW,
        )

    def build(self, day: int, events: pd.DataFrame, *assignments: str, force: bool = False) -> StageRecord:
        night = self.night(day, *assignments)

        def ingest(run: StageRun) -> None:
            taken = events[events.event_date <= run.run_date]
            run.replace(ENGAGEMENTS, to_spark(run.night.spark, taken), where=f"event_date <= '{run.run_date}'")

        run_stage(night, "ingest", ingest, force=True)
        return run_stage(night, "build_pairs", build_pairs, force=force)

    def content(self, table: Table) -> pd.DataFrame:
        return self.night(1).lake.read(table).toPandas().sort_values(list(table.key)).reset_index(drop=True)


@pytest.fixture
def shop(spark: SparkSession, tmp_path: Path) -> Callable[..., Shop]:
    def make(name: str, **pairs: object) -> Shop:
        (tmp_path / name).mkdir()
        given = {"window": {"kind": "session", "symmetric": True}, "half_life_days": 30, "max_items_per_user_day": 5, "holdout_share": 0.3}
        given |= {"rebuild_below": 0, "max_stale_share": 0.5}
        return Shop(spark=spark, config=str(write_config(tmp_path / name, pairs=given | pairs)))

    return make


def test_nights_build_on_each_other(shop: Callable[..., Shop]) -> None:
    window = {"kind": "time", "window_seconds": 21_600}
    pool = world(seed=9, num_events=400, num_items=12)
    mine = shop("mine", window=window)
    late, gone = pool.index[pool.event_date == FIRST + timedelta(days=3)][:2]
    first = mine.build(4, pool.drop(index=late))
    assert first.notes == ["pairs are counted from nothing: no night has counted pairs before"]
    assert first.metrics["built_from_nothing"] == first.metrics["touched_pairs_share"] == 1
    assert first.metrics["num_cut_items"] > 0

    lake = mine.night(5).lake  # a killed night left half its work
    lake.replace(CO_ENGAGEMENT_DAILY, lake.read(CO_ENGAGEMENT_DAILY).limit(3))
    events = pool.drop(index=gone)
    second = mine.build(5, events)
    assert second.notes == []
    assert second.metrics["recounted_days_share"] <= 0.5
    assert 0 < second.metrics["touched_pairs_share"] < 1
    other = ("pairs.half_life_days=40", "pairs.max_pairs_per_trigger=2")
    third = mine.build(5, events, *other)
    assert third.notes == ["pairs are counted from nothing: pairs.half_life_days or the landmark has changed"]
    assert third.metrics["recounted_days_share"] == third.metrics["built_from_nothing"] == 1
    assert third.metrics["num_pruned_triggers"] > 0
    assert third.metrics["num_pairs"] + third.metrics["num_pruned_pairs"] == len(mine.content(CO_ENGAGEMENT_TOTALS))

    small = mine.build(5, events, *other, "pairs.rebuild_below=1000")
    assert (small.notes, small.metrics["built_from_nothing"]) == ([], 1)
    scratch = shop("scratch", window=window)
    assert scratch.build(5, events, *other, force=True).notes == ["pairs are counted from nothing: --force asks for it"]
    for table in BUILT:
        pd.testing.assert_frame_equal(mine.content(table), scratch.content(table), rtol=1e-9, obj=table.name)

    back = mine.build(2, pool[pool.user_id != "u1"], *other)
    assert back.metrics["built_from_nothing"] == 1
    assert "days are touched, which costs more to compare" in back.notes[0]
    assert mine.content(CO_ENGAGEMENT_DAILY).event_date.max() == FIRST + timedelta(days=1)


def test_a_night_that_would_compare_too_much_starts_from_nothing() -> None:
    days = {FIRST + timedelta(days=number): {"num_events": 100} for number in range(10)}
    before = PairState(days=days, versions={}, num_daily_rows=3000)
    now = dict.fromkeys([*days, FIRST + timedelta(days=10)], 100)
    new, changed = {FIRST + timedelta(days=10)}, {FIRST + timedelta(days=9)}
    first = {FIRST}
    assert before.rows_of(new, set(), now) == 300
    assert before.rows_of(changed, set(), now) == 600, "as they were, and as they are"
    assert before.rows_of(new, first, now) == 600, "and those that the holdout has moved over"
    assert before.rows_of(changed, changed, now) == 600
    settings = PairSettings(window=SESSION, half_life_days=30, max_stale_share=0.1, max_compared_rows=300)
    assert too_much(settings, before, new, set(), now) is None
    assert "2 of 11 days are touched" in str(too_much(settings, before, new | changed, set(), now))
    for days_ in ((changed, set()), (new, first)):
        assert "some 600 rows of days would be compared, more than" in str(too_much(settings, before, *days_, now))


def test_what_decides_counts_is_part_of_the_rule() -> None:
    plain = PairSettings(window=SESSION, half_life_days=30)
    others = [{"window": TIME}, {"max_items_per_user_day": 7}, {"max_triggers_per_target": 9}, {"min_users_per_pair": 3}]
    rules = [counting_rule(plain.model_copy(update=over), b"key") for over in [{}, *others]] + [counting_rule(plain, b"other key")]
    assert len(set(rules)) == len(rules)
    assert counting_rule(plain.model_copy(update={"half_life_days": 9, "max_pairs_per_trigger": 9}), b"key") == rules[0]
    assert totaling_rule(plain, FIRST) != totaling_rule(plain.model_copy(update={"half_life_days": 31}), FIRST)
    assert totaling_rule(plain, FIRST) != totaling_rule(plain, FIRST + timedelta(days=1))


def test_what_cannot_be_counted_is_refused(spark: SparkSession) -> None:
    month = PairSettings(window=WindowSettings(kind="time", window_seconds=30 * 86_400), half_life_days=30)
    days = {FIRST + timedelta(days=n): DayState(num_events=1, fingerprint="") for n in range(30)}
    _check_history(month, days, LAST)
    with pytest.raises(SettingsError, match=r"window_seconds is 2592000, 30 days, but .* 2024-03-06 go back 29 days only, to 2024-03-02:"):
        _check_history(month, {day: state for day, state in days.items() if day > FIRST}, LAST)
    with pytest.raises(SourceError, match="no engagements up to 2024-03-06; wanted at least one"):
        _check_history(month, {}, LAST)
    far = world(seed=2, num_events=20).assign(session_id="s", user_id="u")
    old = far.iloc[:1].assign(engaged_at=pd.Timestamp("2023-12-01"), event_date=date(2023, 12, 1))
    visits = PairSettings(window=SESSION, half_life_days=30)
    frame = to_spark(spark, pd.concat([old, far]))
    with pytest.raises(SourceError, match=r"a session spans 9\d days, wanted at most 31: .*source.events.columns.session_id"):
        _longest_session(visits, frame, {far.event_date.max()})
