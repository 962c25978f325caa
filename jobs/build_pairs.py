"""Stage 2: `engagements` become `co_engagement_daily`, `co_engagement_totals`, `co_engagement_pairs` and `item_popularity`.

A pair belongs to the day of its later engagement. Days up to the run date are counted; weights decay from a landmark day, so that the
weight at the run date is one factor at read time.

A night builds on the last good one: it counts the days again that a change in `engagements` can reach, and adds the pairs up again that
these days touch (`features.changed_pairs`). Its tables equal those of a night that starts from nothing. That is what it does where there is
nothing to build on, or where so much has changed that it does not pay, and says so; and below `pairs.rebuild_below` engagements, where
that is faster. Tables hold as of one run date: a night further back takes later days out, the next one counts them again.

All of this happens once for all actions together, and once for each of `pairs.signals` in tables of its own (`co_engagement_pairs__click`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from conf.errors import SettingsError, SourceError
from conf.settings import PairSettings
from conf.tables import ENGAGEMENTS, EXPOSURE_PAIRS, IMPRESSIONS, TABLES, table_named
from features import exposures, increments, pairs
from features.event_files import EventFiles
from features.increments import DayState
from features.pair_kernels import check_num_items
from features.swing import UserItems
from jobs.lake import in_memory, only_row
from jobs.pair_state import PairState, Signal, counting_rule, find_state, totaling_rule
from jobs.sources import user_hash_key
from jobs.stage import FileChanges, StageRun, stage_main

STAGE = "build_pairs"
_DAY_SECONDS = 86_400


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What this night has to count. `before` is None where everything is counted from nothing; `moved` are days that the holdout has moved
    over.
    """

    days: dict[date, DayState]
    stale: set[date]
    moved: set[date]
    before: PairState | None
    reach_days: int
    landmark: date
    holdout_from: date

    @property
    def num_events(self) -> dict[date, int]:
        """Engagements of each day."""
        return {day: state.num_events for day, state in self.days.items()}

    @cached_property
    def recounted(self) -> dict[date, int]:
        """Stale days that have engagements, and how many."""
        return {day: self.days[day].num_events for day in sorted(self.stale & self.days.keys())}


def build_pairs(run: StageRun) -> None:
    """Count all actions, then each signal, and gate."""
    engagements = run.read(ENGAGEMENTS).where(f"event_date <= '{run.run_date}'")
    signals = Signal.all_of(run.settings.pairs)
    metrics: dict[str, float] = {}
    for signal in signals:
        _check_actions(signal, engagements, run)
        metrics |= {f"{signal.prefix}{name}": value for name, value in _build(run, signal, signal.take(engagements)).items()}
    _forget_signals(run, signals)
    run.gate(metrics | _count_exposures(run, engagements))


def _build(run: StageRun, signal: Signal, engagements: DataFrame) -> dict[str, float]:
    """Count the days that changed, bring totals up to date, score pairs; what there is to say of it in numbers."""
    settings = signal.settings
    plan = make_plan(run, signal, engagements)
    decay: dict[str, Any] = {"landmark": plan.landmark, "half_life_days": settings.half_life_days, "holdout_from": plan.holdout_from}
    as_of: dict[str, Any] = {"landmark": plan.landmark, "holdout_from": plan.holdout_from, "run_date": run.run_date}
    user_items_of = engagements.transform(pairs.sum_user_items(run_date=run.run_date, **decay))
    with in_memory(user_items_of) as engaged, run.timed(f"{signal.prefix}popularity"):
        run.replace(signal.popularity, engaged.transform(pairs.count_popularity(**as_of)))
        key = user_hash_key(settings)[0]
        user_items = pairs.collect_user_items(engaged, hash_key=key, max_users=settings.swing_max_users)
    check_num_items(run.read_output(signal.popularity).count())
    with run.timed(f"{signal.prefix}counts"):
        count = _count_all if plan.before is None else _count_stale
        changes = count(run, signal, plan, items=user_items.item_ids, decay=decay)
    with run.timed(f"{signal.prefix}scores"):
        _score(run, signal, user_items, as_of)
    run.replace(signal.days, _day_rows(run, signal, plan, items=user_items.item_ids))
    return _metrics(run, signal) | changes | _pruned(run, signal)


def _score(run: StageRun, signal: Signal, user_items: UserItems, as_of: Mapping[str, Any]) -> None:
    """Write co_engagement_pairs."""
    totals = run.night.lake.files(signal.totals, run.outputs[signal.totals.name])
    rule: dict[str, Any] = {"max_pairs_per_trigger": signal.settings.max_pairs_per_trigger, **as_of}

    def write(folders: dict[str, str]) -> FileChanges:
        popularity = run.read_output(signal.popularity)
        return FileChanges(pairs.write_scores(run.night.spark, totals, popularity, user_items, folder=folders["pairs"], **rule))

    run.replace_by_files({"pairs": signal.pairs}, write)


def _count_exposures(run: StageRun, engagements: DataFrame) -> dict[str, float]:
    """Write exposure_pairs; how many pairs were shown, and how often what was shown was taken. Nothing without source.impressions."""
    source, settings = run.settings.source.impressions, run.settings.pairs
    if source is None:
        run.replace(EXPOSURE_PAIRS, run.night.spark.createDataFrame([], EXPOSURE_PAIRS.ddl))
        return {}
    rule: dict[str, Any] = {"half_life_days": settings.half_life_days, "min_users": settings.min_users_per_pair}
    counted = exposures.count_exposures(run.read(IMPRESSIONS), engagements, source=source, run_date=run.run_date, **rule)
    with run.timed("exposures"):
        run.replace(EXPOSURE_PAIRS, counted)
    sums = [F.coalesce(F.sum(name), F.lit(0)).alias(name) for name in ("num_shown", "num_ignored")]
    row = only_row(run.read_output(EXPOSURE_PAIRS).agg(F.count(F.lit(1)).alias("num_exposure_pairs"), *sums))
    taken = 1 - row["num_ignored"] / max(1, row["num_shown"])
    return {"num_exposure_pairs": row["num_exposure_pairs"], "taken_exposures_share": taken if row["num_shown"] else 0.0}


def _check_actions(signal: Signal, engagements: DataFrame, run: StageRun) -> None:
    """Note an action that no event has.

    Raises:
        SourceError: no event has any of the signal's.
    """
    if signal.actions is None:
        return
    found = sorted(row["action"] for row in engagements.select("action").distinct().collect())
    absent = sorted(set(signal.actions) - set(found))
    if len(absent) == len(set(signal.actions)) and found:
        raise SourceError(
            f"{signal.where} counts actions {absent}, which no engagement up to {run.run_date} has; wanted some of {found}: correct "
            f"{signal.where}.actions, source.events.columns.action or source.events.action_weights"
        )
    if absent:
        run.note(f"{signal.label}: no engagement up to {run.run_date} has action {', '.join(absent)}; there are {', '.join(found)}")


def _forget_signals(run: StageRun, signals: Sequence[Signal]) -> None:
    """Empty the tables of signals that the last good night counted and the settings no longer name: nobody would keep them up to date."""
    record = run.night.ledger.last_success(stage=run.stage)
    counted = {table.name for signal in signals for table in (*signal.state, signal.pairs, signal.popularity)}
    of_signals = (record.output_versions.keys() - TABLES.keys()) if record else set[str]()
    for table in map(table_named, sorted(of_signals - counted)):
        run.night.lake.replace(table, run.night.spark.createDataFrame([], table.ddl))
        run.note(f"{table.name} is emptied: its signal is no longer among pairs.signals")


def make_plan(run: StageRun, signal: Signal, engagements: DataFrame) -> Plan:
    """Compare the engagements with what the last good night counted.

    Raises:
        SourceError: there are no engagements, or a session spans longer than any could.
        SettingsError: the window is longer than the history.
    """
    settings = signal.settings
    days = {
        row["event_date"]: DayState(num_events=row["num_events"], fingerprint=row["fingerprint"])
        for row in engagements.transform(increments.fingerprint_days).collect()
    }
    _check_history(settings, days, run.run_date, where=signal.where)
    landmark = _landmark(run.run_date, settings.half_life_days)
    pairs.check_landmark(landmark, settings.half_life_days, run.run_date)
    num_events = {day: state.num_events for day, state in days.items()}
    worth_it = sum(num_events.values()) >= settings.rebuild_below
    before = _state_to_build_on(run, signal, landmark) if worth_it else None
    changed = increments.changed_days(before.states if before else {}, days)
    longest = max(_longest_session(settings, engagements, changed), before.common("reach_days") if before else 0)
    reach = increments.window_reach(settings.window, longest_session_days=longest)
    known = days.keys() | (before.days.keys() if before else set())
    stale = increments.stale_days(changed, known, reach_days=reach)
    holdout_from = pairs.holdout_start(num_events, holdout_share=settings.holdout_share, run_date=run.run_date)
    moved = increments.moved_days(before.common("holdout_from"), holdout_from) if before else set()
    if before and (reason := too_much(settings, before, stale, moved, num_events)):
        run.note(f"{signal.label} are counted from nothing: {reason}")
        before, stale = None, set(days)
    return Plan(
        days=days,
        stale=stale,
        moved=moved,
        before=before,
        reach_days=longest,
        landmark=landmark,
        holdout_from=holdout_from,
    )


def too_much(settings: PairSettings, before: PairState, stale: set[date], moved: set[date], num_events: Mapping[date, int]) -> str | None:
    """Why it does not pay to build on the last good night, or does not fit the driver; None: it does."""
    known = len(num_events.keys() | before.days.keys())
    if len(stale) > settings.max_stale_share * known:
        return f"{len(stale)} of {known} days are touched, which costs more to compare"
    if (compared := before.rows_of(stale, moved, num_events)) > settings.max_compared_rows:
        return f"some {compared:,} rows of days would be compared, more than pairs.max_compared_rows, {settings.max_compared_rows:,}"
    return None


def _state_to_build_on(run: StageRun, signal: Signal, landmark: date) -> PairState | None:
    found = find_state(run, signal)
    reason = found.reason
    if found.state is not None:
        counted = found.state.common("counted_by") == _counting_rule(signal)
        if counted and found.state.common("totaled_by") == totaling_rule(signal.settings, landmark):
            return found.state
        caps = "max_items_per_user_day, max_triggers_per_target, min_users_per_pair"
        names = f"window, {caps}, hash key" + (", actions" if signal.actions else "")
        reason = f"the code, or a setting that decides counts ({names}), has changed"
        if counted:
            reason = f"{signal.where}.half_life_days or the landmark has changed"
    run.note(f"{signal.label} are counted from nothing: {reason}")
    return None


def _counting_rule(signal: Signal) -> str:
    return counting_rule(signal.settings, user_hash_key(signal.settings)[0], signal.actions)


def _check_history(settings: PairSettings, days: Mapping[date, DayState], run_date: date, *, where: str = "pairs") -> None:
    if not days:
        raise SourceError(f"no engagements up to {run_date}; wanted at least one, in the table engagements: run ingest for this date")
    kept, seconds = (max(days) - min(days)).days + 1, settings.window.window_seconds
    if seconds is not None and seconds > kept * _DAY_SECONDS:
        raise SettingsError(
            f"{where}.window.window_seconds is {seconds}, {seconds / _DAY_SECONDS:.3g} days, but engagements up to {run_date} go back "
            f"{kept} days only, to {min(days)}: no pair could be that far apart; shorten the window or bring more history"
        )


def _longest_session(settings: PairSettings, engagements: DataFrame, changed: set[date]) -> int:
    if settings.window.kind != "session" or not changed:
        return 0
    longest = int(only_row(increments.longest_session(engagements, changed))["days"])
    if longest > settings.max_session_days:
        raise SourceError(
            f"a session spans {longest} days, wanted at most {settings.max_session_days}: its id seems to be used again for later visits; "
            "check source.events.columns.session_id, or raise pairs.max_session_days"
        )
    return longest


def _counting(settings: PairSettings) -> pairs.Counting:
    return pairs.Counting(
        window=settings.window,
        max_items_per_user_day=settings.max_items_per_user_day,
        max_triggers_per_target=settings.max_triggers_per_target,
        min_users=settings.min_users_per_pair,
        hash_key=user_hash_key(settings)[0],
    )


def _count_all(run: StageRun, signal: Signal, plan: Plan, *, items: pa.Array, decay: Mapping[str, Any]) -> dict[str, float]:
    """Write co_engagement_daily and co_engagement_totals from nothing."""

    def write(folders: dict[str, str]) -> FileChanges:
        rule: dict[str, Any] = {"days": plan.recounted, "items": items, "folders": folders, **decay}
        return FileChanges(pairs.write_pairs(run.night.spark, _files(run, signal), _counting(signal.settings), **rule).collect())

    run.replace_by_files({"daily": signal.daily, "totals": signal.totals}, write)
    return {"recounted_days_share": 1.0, "built_from_nothing": 1.0, "touched_pairs_share": 1.0}


def _files(run: StageRun, signal: Signal) -> EventFiles:
    return EventFiles(sizes=run.night.lake.file_sizes(ENGAGEMENTS, run.version(ENGAGEMENTS)), actions=signal.actions)


def _count_stale(run: StageRun, signal: Signal, plan: Plan, *, items: pa.Array, decay: Mapping[str, Any]) -> dict[str, float]:
    """Write the days that changed, and the totals of the pairs that they touch; how much that is."""
    assert plan.before is not None
    lake, versions, num_touched = run.night.lake, plan.before.versions, list[int]()
    tables = {"daily": signal.daily, "totals": signal.totals}
    rule: dict[str, Any] = {
        "days": plan.recounted,
        "stale": plan.stale,
        "moved": plan.moved,
        "reach_days": _reach(signal, plan),
        "known": plan.num_events,
        "items": items,
        "before": {kind: lake.files(table, versions[table.name]) for kind, table in tables.items()},
        **decay,
    }

    def write(folders: dict[str, str]) -> FileChanges:
        changes = pairs.update_pairs(run.night.spark, _files(run, signal), _counting(signal.settings), folders=folders, **rule)
        num_touched.append(changes.num_touched)
        return FileChanges(changes.files, changes.removed, versions)

    run.replace_by_files(tables, write)
    touched_share = num_touched[0] / max(1, run.read_output(signal.totals).count())
    run.night.display.say(
        f"  {signal.label}: counted {len(plan.recounted)} of {len(plan.days)} days again, touched {touched_share:.1%} of pairs"
    )
    shares = {"recounted_days_share": len(plan.recounted) / len(plan.days), "built_from_nothing": 0.0}
    return shares | {"touched_pairs_share": touched_share}


def _reach(signal: Signal, plan: Plan) -> int | None:
    return increments.window_reach(signal.settings.window, longest_session_days=plan.reach_days)


def _day_rows(run: StageRun, signal: Signal, plan: Plan, *, items: pa.Array) -> DataFrame:
    """Rows of co_engagement_days: of the days counted tonight what is cut from them, of the others what was."""
    settings = signal.settings
    cuts: dict[date, tuple[int, int]] = {}
    if plan.before:
        cuts = {day: (row["num_capped_groups"], row["num_cut_items"]) for day, row in plan.before.days.items()}
    if plan.recounted:
        which: dict[str, Any] = {"days": plan.recounted, "known": plan.num_events, "items": items}
        which["reach_days"] = _reach(signal, plan) if plan.before else None
        rows = pairs.measure_days(run.night.spark, _files(run, signal), _counting(settings), **which)
        measured = {row["event_date"]: tuple(row)[1:] for row in rows.collect()}
        cuts |= {day: measured.get(day, (0, 0)) for day in plan.recounted}
    common = (
        plan.reach_days,
        _counting_rule(signal),
        totaling_rule(settings, plan.landmark),
        plan.landmark,
        plan.holdout_from,
        run.run_date,
    )
    states = [(day, state.num_events, state.fingerprint, *cuts[day], *common) for day, state in sorted(plan.days.items())]
    return run.night.spark.createDataFrame(states, signal.days.ddl)


def _landmark(run_date: date, half_life_days: float) -> date:
    """The day weights decay from: fixed for spans of 100 half-lives, so it seldom moves and no exponent nears a double's limits."""
    span = max(1, round(100 * half_life_days))
    return date.fromordinal(max(1, run_date.toordinal() // span * span))


def _pruned(run: StageRun, signal: Signal) -> dict[str, float]:
    """What the caps cut: items of user-days or sessions before counting, pairs of a trigger behind the strongest ones after it."""
    cut = only_row(run.read_output(signal.days).agg(*(F.sum(name).alias(name) for name in ("num_capped_groups", "num_cut_items"))))
    over = F.col("count") - F.lit(signal.settings.max_pairs_per_trigger)
    triggers = run.read_output(signal.totals).groupBy("trigger_item_id").count().where(over > 0)
    pruned = triggers.agg(F.count(F.lit(1)).alias("num_pruned_triggers"), F.coalesce(F.sum(over), F.lit(0)).alias("num_pruned_pairs"))
    return cut | only_row(pruned)


def _metrics(run: StageRun, signal: Signal) -> dict[str, float]:
    written = run.read_output(signal.pairs)
    weight = F.col("weight")
    row = only_row(
        written.agg(
            F.count("*").alias("num_pairs"),
            F.count_distinct("trigger_item_id").alias("num_items_with_pairs"),
            F.count_if(F.col("trigger_item_id").isNull() | F.col("target_item_id").isNull()).alias("num_null_keys"),
            F.count_if(F.col("trigger_item_id") == F.col("target_item_id")).alias("num_self_pairs"),
            F.coalesce(F.min("weight"), F.lit(0.0)).alias("min_weight"),
            F.count_if(F.isnan(weight) | weight.isin(float("inf"), float("-inf"))).alias("num_nonfinite"),
        )
    )
    duplicates = row["num_pairs"] - written.select(*signal.pairs.key).distinct().count()
    return row | {"num_daily_rows": run.read_output(signal.daily).count(), "num_duplicate_keys": duplicates}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stage alone."""
    stage_main(STAGE, build_pairs, description="engagements to co-engagement pairs", argv=argv)


if __name__ == "__main__":
    main()
