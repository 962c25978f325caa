"""From users to windows: which engagements of a user can form pairs, sent to the tasks that count them. No session, clock or Spark.

1. `pack_by_user` brings the engagements of a user to one task, as blocks with items as codes.
2. `make_windows` sees whole users. The triggers of one target engagement are always a contiguous range of the user's timeline, so a
   window is a range per target over a list of items: the kinds of windows differ in nothing else. Ranges go to cells.

Cells part the pairs of all days among tasks: items fall into classes by a hash, and the cell of a pair is that of the classes of its
items, so that neither a hot trigger nor a hot target makes one task slow, and everything about a pair meets in one cell. Only items
and ranges travel, never pairs: a cell gets the triggers of its class, and ranges over these.

Items are codes of one ascending list of ids, broadcast to all tasks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from conf.errors import SourceError
from features.pair_kernels import (
    EPOCH,
    PACKED_ROWS,
    Ints,
    Mask,
    chunks,
    compact_codes,
    first_of_runs,
    ints,
    keyed_hashes,
    number_values,
    packed_arrays,
    packed_by,
    ranges,
    row_order,
    run_lengths,
    run_starts,
    unpacked,
)

CUT_SCHEMA = "day int, num_capped_groups bigint, num_cut_items bigint"


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """Which engagements form windows. `window_micros` and `max_distance` are None where the kind has no such bound."""

    kind: str
    window_micros: int | None
    max_distance: int | None
    symmetric: bool
    max_items: int
    max_triggers: int
    hash_key: bytes
    days: Ints  # target days, ascending
    num_classes: int = 1


def classes_for(num_cells: int, *, symmetric: bool) -> int:
    """The fewest classes of items that make at least so many cells."""
    num = 1
    while (num * (num + 1) // 2 if symmetric else num * num) < num_cells:
        num += 1
    return num


def _cell(trigger_class: int, target_class: int, rule: WindowRule) -> int:
    """Number of the cell of two classes; of symmetric pairs, both orders meet in one."""
    if not rule.symmetric:
        return trigger_class * rule.num_classes + target_class
    low, high = sorted((trigger_class, target_class))
    return high * (high + 1) // 2 + low


def _item_classes(items: Ints, num_classes: int) -> Ints:
    """Class of each item: Fibonacci hashing (Knuth, TAOCP 3, 6.4), as codes of popular items may be neighbors."""
    return ((items * 0x9E3779B1 & 0xFFFFFFFF) >> 11) % num_classes


# --- Engagements of a user to one task -----------------------------------------------------------------------------------------


def pack_by_user(batches: Iterable[pa.RecordBatch], *, items: pa.Array, num_buckets: int) -> Iterator[pa.RecordBatch]:
    """Blocks of engagements by bucket of users.

    Args:
        batches: bucket, user_id, item_id, day, time, and session_id for session windows; ids may be coded.
        items: ids of all items, ascending.
        num_buckets: buckets, numbered from 0.

    Raises:
        SourceError: an item is not among the items.
    """
    for chunk in chunks(batches, min_rows=PACKED_ROWS):
        found, names = number_values(chunk["item_id"])
        codes = pc.fill_null(pc.index_in(names, value_set=items), -1).to_numpy()[found]
        if len(codes) and codes.min() < 0:  # names may hold more than the rows do
            unknown = names[int(found[codes.argmin()])].as_py()
            raise SourceError(
                f"item {unknown!r} is engaged with but not among the {len(items):,} known items: engagements have changed meanwhile"
            )
        column = chunk.column_names.index("item_id")
        yield from packed_by(chunk.set_column(column, "item", pa.array(codes)).drop_columns(["bucket"]), ints(chunk, "bucket"), num_buckets)


@dataclass(frozen=True, kw_only=True)
class _Timeline:
    """Engagements sorted by (group, time): a group is a user, or a session up to one target day. Codes index `users` and `items`."""

    users: pa.Array
    items: pa.Array
    user: Ints
    group: Ints
    scope: Ints
    scope_names: pa.Array
    item: Ints
    time: Ints
    day: Ints
    target_day: Ints

    def take(self, rows: Ints | Mask | slice, **changes: Any) -> "_Timeline":
        """The same columns at `rows`, with columns of `changes` instead."""
        columns = ("user", "group", "scope", "item", "time", "day", "target_day")
        taken = {name: getattr(self, name)[rows] for name in columns} | changes
        return _Timeline(users=self.users, items=self.items, scope_names=self.scope_names, **taken)


def _timelines(batches: Iterable[pa.RecordBatch], items: pa.Array, rule: WindowRule) -> Iterator[_Timeline]:
    """One timeline for all users of the task's bucket; none where there are no engagements."""
    if tables := list(unpacked(batches)):
        yield _timeline(pa.concat_tables(tables), items, rule)


def _timeline(events: pa.Table, items: pa.Array, rule: WindowRule) -> _Timeline:
    user, users = number_values(events["user_id"])
    item, time, day = (ints(events, name) for name in ("item", "time", "day"))
    by_session = rule.kind == "session"
    session, sessions = number_values(events["session_id"]) if by_session else (day, pa.array([], pa.string()))
    keys = (user, session, time, item) if by_session else (user, time, item)
    rows = row_order(*keys)
    rows = rows[first_of_runs(*(key[rows] for key in keys))]  # one engagement per instant, whatever its actions
    timeline = _Timeline(
        users=users,
        items=items,
        user=user[rows],
        group=user[rows],
        scope=session[rows],
        scope_names=sessions,
        item=item[rows],
        time=time[rows],
        day=day[rows],
        target_day=day[rows],
    )
    return _by_target_day(timeline, rule) if by_session else timeline


def _by_target_day(timeline: _Timeline, rule: WindowRule) -> _Timeline:
    """One group per session and day on which it has engagements, holding the session up to that day.

    A night may only see the session up to its own day, so neither the pairs nor the cap of a day may depend on later days.
    """
    starts = run_starts(timeline.user, timeline.scope, timeline.day)
    first = run_starts(timeline.user[starts], timeline.scope[starts])
    session_start = np.repeat(starts[first], run_lengths(first, len(starts)))
    stops = np.append(starts[1:], len(timeline.day))
    days = timeline.day[starts]
    wanted = np.isin(days, rule.days)
    lengths = (stops - session_start)[wanted]
    everything = len(first) == len(starts) and bool(wanted.all())  # no session has two days
    rows = slice(None) if everything else ranges(session_start[wanted], lengths)
    groups = np.arange(len(lengths), dtype=np.int64)
    return timeline.take(rows, group=np.repeat(groups, lengths), target_day=np.repeat(days[wanted], lengths))


def _cap(timeline: _Timeline, rule: WindowRule) -> _Timeline:
    """Leave the `max_items` distinct items with the smallest hash per user and day (or session); others take no part at all."""
    keep = np.ones(len(timeline.item), dtype=np.bool_)
    for rows, distinct in _big_parts(timeline, rule):
        if len(distinct) > rule.max_items:
            keep[rows] = np.isin(timeline.item[rows], _sampled_items(timeline, int(rows.start), distinct, rule))
    return timeline if keep.all() else timeline.take(keep)


def _big_parts(timeline: _Timeline, rule: WindowRule) -> Iterator[tuple[slice, Ints]]:
    """Rows of each user and day (or session) with more engagements than the cap has items, and their distinct items."""
    part = timeline.target_day if rule.kind == "session" else timeline.day  # days ascend within a group
    starts = run_starts(timeline.group, part)
    lengths = run_lengths(starts, len(part))
    for run in np.flatnonzero(lengths > rule.max_items).tolist():
        rows = slice(int(starts[run]), int(starts[run] + lengths[run]))
        yield rows, np.unique(timeline.item[rows])


def _sampled_items(timeline: _Timeline, first: int, distinct: Ints, rule: WindowRule) -> Ints:
    """Codes of the items of one user and day (or session) that take part; `first` is its first row."""
    if rule.kind == "session":
        scope = timeline.scope_names[int(timeline.scope[first])].as_py()
    else:
        scope = str(EPOCH + timedelta(days=int(timeline.day[first])))
    prefix = f"{timeline.users[int(timeline.user[first])].as_py()}\x1f{scope}\x1f"
    hashes = keyed_hashes((prefix + timeline.items[code].as_py() for code in distinct.tolist()), key=rule.hash_key)
    return distinct[np.argsort(hashes, kind="stable")[: rule.max_items]]


def _trigger_ranges(timeline: _Timeline, rule: WindowRule) -> tuple[Ints, Ints]:
    """For each engagement as a target, the rows [start, stop) of its triggers, itself included unless symmetric.

    Symmetric counting adds every mirror image later, so there a tie needs to be met in one direction only: stop is the row itself.
    """
    rows = np.arange(len(timeline.group), dtype=np.int64)
    positions = run_starts(timeline.group, timeline.time)
    ties = np.append(positions[1:], len(rows))
    stops = rows if rule.symmetric else np.repeat(ties, run_lengths(positions, len(rows)))
    groups = run_starts(timeline.group)
    starts = np.repeat(groups, run_lengths(groups, len(rows)))
    if rule.kind != "session":
        starts = np.maximum(starts, rows - rule.max_triggers)
    if rule.window_micros is not None and rule.kind != "session":
        starts = np.maximum(starts, _first_within(timeline.group, timeline.time, rule.window_micros))
    if rule.kind == "position":
        assert rule.max_distance is not None
        starts = np.maximum(starts, _first_near(timeline, positions, rule.max_distance))
    return starts, stops


def _first_within(group: Ints, time: Ints, span: int) -> Ints:
    """For each row, the first row of its group at most `span` microseconds earlier; rows are sorted by (group, time)."""
    num_rows = len(group)
    is_event = np.repeat(np.array([1, 0], dtype=np.int64), num_rows)
    order = np.lexsort((is_event, np.concatenate([time, time - span]), np.concatenate([group, group])))
    num_before = np.cumsum(is_event[order])  # a query sorts before the events of its own instant: these are inside the span
    first = np.empty(2 * num_rows, dtype=np.int64)
    first[order] = num_before
    return first[num_rows:]


def _first_near(timeline: _Timeline, positions: Ints, max_distance: int) -> Ints:
    """For each row at position q, the first row of the earliest position p with at most `max_distance` distinct items in (p, q]."""
    ends = np.append(positions[1:], len(timeline.group))
    group, items = timeline.group[positions].tolist(), timeline.item.tolist()
    first = np.empty(len(positions), dtype=np.int64)
    counts: dict[int, int] = {}
    left = 0
    for q, (start, end) in enumerate(zip(positions.tolist(), ends.tolist(), strict=True)):
        if q == 0 or group[q] != group[q - 1]:
            counts, left, group_start = {}, q, q
        for item in items[start:end]:
            counts[item] = counts.get(item, 0) + 1
        while len(counts) > max_distance:
            _forget(counts, items[positions[left] : ends[left]])
            left += 1
        first[q] = positions[max(left - 1, group_start)]
    return np.repeat(first, run_lengths(positions, len(timeline.group)))


def _forget(counts: dict[int, int], items: list[int]) -> None:
    for item in items:
        counts[item] -= 1
        if not counts[item]:
            del counts[item]


# --- Windows of users to cells -------------------------------------------------------------------------------------------------


def make_windows(batches: Iterable[pa.RecordBatch], *, items: pa.Array, rule: WindowRule) -> Iterator[pa.RecordBatch]:
    """Ranges of triggers per target, for each cell.

    Args:
        batches: blocks of `pack_by_user`, all of one bucket.
        items: as in `pack_by_user`.
        rule: which engagements form windows.

    Returns:
        Blocks of a cell each, with arrays for `features.pair_counts`: `items`, the triggers' codes; of each target its code `target`,
        the range of `items` that `first` and `length` name, its `day` and the position `user` in `hashes`.
    """
    for timeline in _timelines(batches, items, rule):
        capped = _cap(timeline, rule)
        starts, stops = _trigger_ranges(capped, rule)
        yield from _cell_blocks(capped, starts, stops, rule)


def _cell_blocks(timeline: _Timeline, starts: Ints, stops: Ints, rule: WindowRule) -> Iterator[pa.RecordBatch]:
    alone = 0 if rule.symmetric else 1  # a directed range holds the target itself
    wanted = (timeline.day == timeline.target_day) & np.isin(timeline.day, rule.days) & (stops - starts > alone)
    targets = np.flatnonzero(wanted)
    if not len(targets):
        return
    starts, stops = starts[targets], stops[targets]
    users, user = np.unique(timeline.user[targets], return_inverse=True)
    names = timeline.users.take(pa.array(users)).to_pylist()
    hashes = keyed_hashes(names, key=rule.hash_key)
    class_of = _item_classes(timeline.item, rule.num_classes).astype(np.uint16)
    by_class = np.argsort(class_of[targets], kind="stable")  # 16 bits: a radix sort
    starts, stops, targets, user = (values[by_class] for values in (starts, stops, targets, user))
    ends = np.searchsorted(class_of[targets], np.arange(rule.num_classes + 1))
    item, day = timeline.item[targets], timeline.day[targets]
    for trigger_class in range(rule.num_classes):
        of_class = class_of == trigger_class
        before = np.concatenate([[0], np.cumsum(of_class)])
        first = before[starts]
        length = before[stops] - first
        slots = timeline.item[of_class]
        for target_class in range(rule.num_classes):
            begin, end = ends[target_class], ends[target_class + 1]
            rows = begin + np.flatnonzero(length[begin:end])
            if len(rows):
                columns = {"target": item, "length": length, "user": user, "day": day}
                taken = {name: values[rows] for name, values in columns.items()}
                present, taken["user"] = compact_codes(taken["user"], len(hashes))
                near, taken["first"] = _covered(first[rows], taken["length"])
                yield packed_arrays(_cell(trigger_class, target_class, rule), {"items": slots[near], "hashes": hashes[present], **taken})


def _covered(first: Ints, length: Ints) -> tuple[Ints, Ints]:
    """The places in any of the ranges, at least one, whose firsts and ends ascend; and where each range begins among these places."""
    end = first + length
    runs = np.flatnonzero(np.concatenate([[True], first[1:] > end[:-1]]))  # of ranges without a gap between them
    lengths = np.append(end[runs[1:] - 1], end[-1]) - first[runs]
    gaps = first[runs] - (np.cumsum(lengths) - lengths)
    return ranges(first[runs], lengths), first - np.repeat(gaps, run_lengths(runs, len(first)))


# --- What the cap cuts ---------------------------------------------------------------------------------------------------------


def measure_cuts(batches: Iterable[pa.RecordBatch], *, items: pa.Array, rule: WindowRule) -> Iterator[pa.RecordBatch]:
    """What the cap cuts from the target days, as rows of CUT_SCHEMA to be added up by day.

    Args:
        batches: as of `make_windows`.
        items: as in `pack_by_user`.
        rule: which engagements form windows.
    """
    for timeline in _timelines(batches, items, rule):
        part = timeline.target_day if rule.kind == "session" else timeline.day
        sizes = [(int(part[rows.start]), len(distinct)) for rows, distinct in _big_parts(timeline, rule)]
        over = [(day, size - rule.max_items) for day, size in sizes if size > rule.max_items and day in rule.days]
        days, counts = (pa.array([row[place] for row in over], kind) for place, kind in ((0, pa.int32()), (1, pa.int64())))
        cut = pa.table([days, counts], names=["day", "items"]).group_by("day").aggregate([("items", "count"), ("items", "sum")])
        yield from cut.rename_columns(["day", "num_capped_groups", "num_cut_items"]).to_batches()
