"""The numpy side of pair counting: what Spark tasks run on Arrow batches. No session, no clock, no Spark import.

Counting happens in two steps, because all events of a user meet in the first and all pairs of a day in the second:

1. `make_windows` sees whole users and writes, per user (or session) and target day, the slice of the timeline that can form pairs on
   that day. The triggers of one target engagement are always a contiguous range of that slice, so a window is a list of items plus
   one range per target: the kinds of windows differ in nothing else.
2. `count_windows` sees all windows of a day, expands the ranges into pairs and counts users by one sort of packed 64-bit keys.

Days are days since 1970-01-01, times microseconds since then, both UTC.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from hashlib import blake2b
from math import isqrt
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from conf.errors import SettingsError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

EPOCH = date(1970, 1, 1)
MAX_ITEMS = 2**31 - 1
"""Different values that a task can number: dictionaries and lists of Arrow hold 32-bit positions, a pair of codes 62 bits."""
LEAST_EXPONENT = -1000.0
"""Half-lives beyond which an engagement fades no further: a weight of 0 would be that of a pair which nobody has engaged with."""
_MAX_KEY_BYTES = 64
_CHUNK_ROWS = 500_000
_BLOCK_PAIRS = 4_000_000
_PASS_PAIRS = 16_000_000  # pairs held at once: some 0.5 GB with the arrays derived from them
OUTPUT_ROWS = 50_000
_ENDS_SAY_ALL = 2  # at least two different users: the smallest hash of all is not the largest
PACKED_ROWS = 1_000_000
"""Rows that a task holds before it packs or writes them: some 80 MB."""

WINDOW_SCHEMA = "task int, day int, split int, num_splits int, block binary"
PACKED_SCHEMA = "bucket int, block binary"
TOTAL_SCHEMA = "trigger_item_id string, target_item_id string, weight double, num_user_days bigint, fit_weight double"
STRONG_SCHEMA = f"{TOTAL_SCHEMA}, conditional double"
PARTNER_SCHEMA = "item_id string, num_triggers bigint, num_user_days bigint"
_CODED = pa.dictionary(pa.int32(), pa.string())
DAY_ARROW = pa.schema(
    [
        ("event_date", pa.date32()),
        ("trigger_item_id", _CODED),
        ("target_item_id", _CODED),
        ("num_users", pa.int64()),
        ("user_hashes", pa.list_(pa.int64())),
    ]
)
_PART_ARROW = pa.schema(
    [
        ("trigger_item_id", _CODED),
        ("target_item_id", _CODED),
        ("day", pa.int32()),
        ("num_users", pa.int32()),
        ("user_hash", pa.int64()),
    ]
)
_TOTAL_ARROW = pa.schema(
    [
        ("trigger_item_id", pa.string()),
        ("target_item_id", pa.string()),
        ("weight", pa.float64()),
        ("num_user_days", pa.int64()),
        ("fit_weight", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Deal:
    """Which tasks count which target days: day d goes to `num_splits[d]` tasks from `task[d]` on, by the hashes of a pair's items."""

    days: Ints  # ascending
    task: Ints
    num_splits: Ints


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """Which engagements form windows. `window_micros` and `max_distance` are None where the kind has no such bound."""

    kind: str
    window_micros: int | None
    max_distance: int | None
    symmetric: bool
    max_items: int
    hash_key: bytes
    deal: Deal


@dataclass(frozen=True, kw_only=True)
class TotalRule:
    """How days add up: decay from the landmark, the calibration slice and the privacy minimum."""

    landmark: int
    half_life_days: float
    holdout_from: int
    min_users: int


@dataclass(frozen=True, kw_only=True)
class _Timeline:
    """Engagements sorted by (group, time): a group is a user, or a session up to one target day. Codes index `users` and `names`."""

    users: list[str]
    names: pa.Array
    user: Ints
    group: Ints
    scope: Ints
    scope_names: list[str]
    item: Ints
    time: Ints
    day: Ints
    target_day: Ints

    def take(self, rows: Ints | Mask, **changes: Any) -> "_Timeline":
        """The same columns at `rows`, with columns of `changes` instead."""
        columns = ("user", "group", "scope", "item", "time", "day", "target_day")
        taken = {name: getattr(self, name)[rows] for name in columns} | changes
        return _Timeline(users=self.users, names=self.names, scope_names=self.scope_names, **taken)


def day_number(day: date) -> int:
    """Days since 1970-01-01."""
    return (day - EPOCH).days


def keyed_hash(text: str, *, key: bytes) -> int:
    """64-bit keyed BLAKE2b of a text, as a signed integer. A key above 64 bytes, BLAKE2b's limit, is hashed first."""
    key = key if len(key) <= _MAX_KEY_BYTES else blake2b(key).digest()
    return int.from_bytes(blake2b(text.encode(), digest_size=8, key=key).digest(), "big", signed=True)


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """The ranges [start, start + length) one after the other: `[5, 0], [2, 3]` gives `[5, 6, 0, 1, 2]`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    rows: Ints = np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
    return rows


def _run_starts(*columns: Ints) -> Ints:
    """Row at which each run of equal rows begins."""
    if not len(columns[0]):
        return np.zeros(0, dtype=np.int64)
    new = np.zeros(len(columns[0]), dtype=np.bool_)
    new[0] = True
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)


def _run_lengths(starts: Ints, num_rows: int) -> Ints:
    return np.diff(np.append(starts, num_rows))


def check_num_items(num_items: int) -> None:
    """Raise SettingsError where a pair of items no longer fits into a 63-bit number of two codes."""
    if num_items > MAX_ITEMS:
        raise SettingsError(
            f"found {num_items:,} different items, wanted at most {MAX_ITEMS:,}: a pair of them no longer fits into a 64-bit index; "
            "check source.events.columns.item_id, which seems to hold something finer than items"
        )


def encode(values: pa.Array | pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """Codes and the distinct values, both ascending in bytes as Spark sorts strings.

    Raises:
        SettingsError: there are more values than codes.
    """
    if isinstance(values, pa.ChunkedArray):
        values = (values.unify_dictionaries() if pa.types.is_dictionary(values.type) else values).combine_chunks()
    array = values
    encoded = array if pa.types.is_dictionary(array.type) else array.dictionary_encode()
    check_num_items(len(encoded.dictionary))
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[encoded.indices.to_numpy(zero_copy_only=False)], encoded.dictionary.take(pa.array(order))


def _ints(table: pa.Table, name: str) -> Ints:
    values: Ints = table.column(name).to_numpy().astype(np.int64, copy=False)
    return values


def _whole_runs(batches: Iterable[pa.RecordBatch], columns: list[str], *, min_rows: int) -> Iterator[pa.Table]:
    """Tables of at least `min_rows` rows that never part rows with equal `columns`; the input is sorted by these."""
    held: list[pa.Table] = []
    num_rows, wanted = 0, min_rows
    for batch in batches:
        held.append(pa.Table.from_batches([batch]))
        num_rows += batch.num_rows
        if num_rows < wanted:
            continue
        table = pa.concat_tables(held)
        cut = _last_run_start(table, columns)
        if cut:
            yield table.slice(0, cut)
        held = [table.slice(cut)]
        num_rows = held[0].num_rows
        wanted = max(min_rows, 2 * num_rows)  # one giant run: concatenate it a few times, not once a batch
    if num_rows:
        yield pa.concat_tables(held)


def _last_run_start(table: pa.Table, columns: list[str]) -> int:
    same = None
    for name in columns:
        equal = pc.equal(table[name], table[name][-1])
        same = equal if same is None else pc.and_(same, equal)
    return int(pc.index(same, pa.scalar(True)).as_py())


# --- Step 1: from users to windows ---------------------------------------------------------------------------------------------


def make_windows(batches: Iterable[pa.RecordBatch], *, rule: WindowRule) -> Iterator[pa.RecordBatch]:
    """Windows of whole users.

    Args:
        batches: user_id, session_id, item_id, day, time; sorted by user_id, session_id (session windows only), time, item_id.
        rule: which engagements form windows.

    Returns:
        Batches of WINDOW_SCHEMA: a block holds the windows of one (day, split) and chunk of users, since Spark would take tens of times
        longer to move lists of strings row by row. A block is one row of lists, which `_flatten` reads.
    """
    for chunk in _whole_runs(batches, ["user_id"], min_rows=_CHUNK_ROWS):
        timeline = _cap(_timeline(chunk, rule), rule)
        starts, stops = _trigger_ranges(timeline, rule)
        yield from _window_batches(timeline, starts, stops, rule)


def _timeline(chunk: pa.Table, rule: WindowRule) -> _Timeline:
    user, users = encode(chunk["user_id"])
    item, names = encode(chunk["item_id"])
    time, day = _ints(chunk, "time"), _ints(chunk, "day")
    by_session = rule.kind == "session"
    session, sessions = encode(chunk["session_id"]) if by_session else (day, pa.array([], pa.string()))
    rows = _run_starts(user, session if by_session else user, time, item)  # one engagement per instant, whatever its actions
    timeline = _Timeline(
        users=users.to_pylist(),
        names=names,
        user=user[rows],
        group=user[rows],
        scope=session[rows],
        scope_names=sessions.to_pylist(),
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
    starts = _run_starts(timeline.user, timeline.scope, timeline.day)
    first = _run_starts(timeline.user[starts], timeline.scope[starts])
    session_start = np.repeat(starts[first], _run_lengths(first, len(starts)))
    stops = np.append(starts[1:], len(timeline.day))
    days = timeline.day[starts]
    wanted = np.isin(days, rule.deal.days)
    lengths = (stops - session_start)[wanted]
    rows = ranges(session_start[wanted], lengths)
    groups = np.arange(len(lengths), dtype=np.int64)
    return timeline.take(rows, group=np.repeat(groups, lengths), target_day=np.repeat(days[wanted], lengths))


def _cap(timeline: _Timeline, rule: WindowRule) -> _Timeline:
    """Leave the `max_items` distinct items with the smallest hash per user and day (or session); others take no part at all."""
    part = timeline.target_day if rule.kind == "session" else timeline.day
    order = np.lexsort((timeline.item, part, timeline.group))
    runs, num_items = _run_sizes(order, (timeline.group[order], part[order]), timeline.item)
    keep = np.ones(len(order), dtype=np.bool_)
    for run in np.flatnonzero(num_items > rule.max_items):
        stop = runs[run + 1] if run + 1 < len(runs) else len(order)
        rows = order[runs[run] : stop]
        keep[rows] = np.isin(timeline.item[rows], _sampled_items(timeline, rows, rule))
    return timeline if keep.all() else timeline.take(keep)


def _sampled_items(timeline: _Timeline, rows: Ints, rule: WindowRule) -> Ints:
    """Codes of the items of one user and day (or session) that take part."""
    first = rows[0]
    scope = timeline.scope_names[timeline.scope[first]] if rule.kind == "session" else str(EPOCH + timedelta(days=int(timeline.day[first])))
    prefix = f"{timeline.users[timeline.user[first]]}\x1f{scope}\x1f"
    codes = np.unique(timeline.item[rows])
    hashes = [keyed_hash(prefix + timeline.names[int(code)].as_py(), key=rule.hash_key) for code in codes]
    return codes[np.argsort(np.array(hashes, dtype=np.int64), kind="stable")[: rule.max_items]]


def _trigger_ranges(timeline: _Timeline, rule: WindowRule) -> tuple[Ints, Ints]:
    """For each engagement as a target, the rows [start, stop) of its triggers, itself included unless symmetric.

    Symmetric counting adds every mirror image later, so there a tie needs to be met in one direction only: stop is the row itself.
    """
    rows = np.arange(len(timeline.group), dtype=np.int64)
    positions = _run_starts(timeline.group, timeline.time)
    ties = np.append(positions[1:], len(rows))
    stops = rows if rule.symmetric else np.repeat(ties, _run_lengths(positions, len(rows)))
    groups = _run_starts(timeline.group)
    starts = np.repeat(groups, _run_lengths(groups, len(rows)))
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
    return np.repeat(first, _run_lengths(positions, len(timeline.group)))


def _forget(counts: dict[int, int], items: list[int]) -> None:
    for item in items:
        counts[item] -= 1
        if not counts[item]:
            del counts[item]


def _window_batches(timeline: _Timeline, starts: Ints, stops: Ints, rule: WindowRule) -> Iterator[pa.RecordBatch]:
    """One row per (group, target day) that holds at least two engagements."""
    days = timeline.day
    targets = np.flatnonzero((days == timeline.target_day) & np.isin(days, rule.deal.days))
    runs = _run_starts(timeline.group[targets], days[targets])
    num_targets = _run_lengths(runs, len(targets))
    begin = starts[targets[runs]]
    end = targets[runs] + num_targets
    wanted = end - begin > 1
    if not wanted.any():
        return
    kept = targets[np.repeat(wanted, num_targets)]
    runs, num_targets, begin, end = runs[wanted], num_targets[wanted], begin[wanted], end[wanted]
    offset = np.repeat(begin, num_targets)
    hashes = np.array([keyed_hash(user, key=rule.hash_key) for user in timeline.users], dtype=np.int64)
    windows = _Windows(
        names=timeline.names,
        item=timeline.item,
        hashes=hashes[timeline.user[targets[runs]]],
        begin=begin,
        num_items=end - begin,
        first_target=np.cumsum(num_targets) - num_targets,
        num_targets=num_targets,
        starts=starts[kept] - offset,
        stops=stops[kept] - offset,
    )
    dealt = _dealt(days[targets[runs]], rule.deal)
    order = np.lexsort((dealt["split"], dealt["day"]))
    cells = equal_runs(dealt["day"][order], dealt["split"][order])
    places = order[[start for start, _ in cells]]
    columns = [pa.array(dealt[name][places], pa.int32()) for name in ("task", "day", "split", "num_splits")]
    blocks = pa.array([windows.block(dealt["row"][order[start : start + num]]) for start, num in cells], pa.binary())
    yield pa.RecordBatch.from_arrays([*columns, blocks], names=["task", "day", "split", "num_splits", "block"])


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Windows of a chunk of users. Window w holds item[begin[w] : begin[w] + num_items[w]], codes of `names`; of these the last
    num_targets[w] are targets, target t with the triggers from starts[t] up to stops[t], counted from begin[w].
    """

    names: pa.Array
    item: Ints
    hashes: Ints
    begin: Ints
    num_items: Ints
    first_target: Ints
    num_targets: Ints
    starts: Ints
    stops: Ints

    def block(self, rows: Ints) -> bytes:
        """Some of the windows, packed."""
        targets = ranges(self.first_target[rows], self.num_targets[rows])
        used, items = np.unique(self.item[ranges(self.begin[rows], self.num_items[rows])], return_inverse=True)
        counts = {"num_items": self.num_items[rows], "num_targets": self.num_targets[rows]}
        ints = {"items": items, **counts, "starts": self.starts[targets], "stops": self.stops[targets]}
        columns = {name: pa.array(values, pa.int32()) for name, values in ints.items()}
        columns |= {"user_hashes": pa.array(self.hashes[rows]), "names": self.names.take(pa.array(used))}
        lists = [_lists(values, np.array([len(values)])) for values in columns.values()]
        return _pack(pa.table(lists, names=list(columns)))


def _dealt(days: Ints, deal: Deal) -> dict[str, Ints]:
    """One row per window and split of its day."""
    place = np.searchsorted(deal.days, days)
    num_splits = deal.num_splits[place]
    row = np.repeat(np.arange(len(days), dtype=np.int64), num_splits)
    split = ranges(np.zeros_like(num_splits), num_splits)
    return {"row": row, "day": days[row], "split": split, "num_splits": num_splits[row], "task": deal.task[place][row] + split}


def deal_days(work: Mapping[int, int], num_tasks: int) -> Deal:
    """Target days to tasks: contiguous ranges of about equal work, so that files can be skipped by day; a day heavier than that is split.

    Args:
        work: target day to a number in proportion to its work, e.g. its engagements.
        num_tasks: tasks, numbered from 0.
    """
    days = np.array(sorted(work), dtype=np.int64)
    load = np.array([max(1, work[day]) for day in days.tolist()], dtype=np.float64)
    share = load / load.sum() * num_tasks
    num_splits = np.exp2(np.floor(np.log2(np.clip(share, 1, num_tasks)))).astype(np.int64)  # powers of two make square grids of splits
    middle = np.cumsum(share) - share / 2
    task = np.clip(np.rint(middle - num_splits / 2), 0, num_tasks - num_splits).astype(np.int64)
    return Deal(days=days, task=task, num_splits=num_splits)


CUT_SCHEMA = "day int, num_capped_groups bigint, num_cut_items bigint"


def measure_cuts(batches: Iterable[pa.RecordBatch], *, rule: WindowRule) -> Iterator[pa.RecordBatch]:
    """What the cap cuts from the target days, as rows of CUT_SCHEMA to be added up by day.

    Args:
        batches: as of `make_windows`.
        rule: which engagements form windows.
    """
    for chunk in _whole_runs(batches, ["user_id"], min_rows=_CHUNK_ROWS):
        timeline = _timeline(chunk, rule)
        part = timeline.target_day if rule.kind == "session" else timeline.day
        order = np.lexsort((timeline.item, part, timeline.group))
        columns = (timeline.group[order], part[order])
        runs, num_items = _run_sizes(order, columns, timeline.item)
        day = part[order][runs]
        over = np.maximum(num_items - rule.max_items, 0)
        wanted = np.isin(day, rule.deal.days)
        columns_ = [pa.array(day[wanted], pa.int32()), pa.array((over > 0)[wanted].astype(np.int64)), pa.array(over[wanted])]
        added = pa.table(columns_, names=["day", "groups", "items"]).group_by("day").aggregate([("groups", "sum"), ("items", "sum")])
        yield from added.rename_columns(["day", "num_capped_groups", "num_cut_items"]).to_batches()


def _run_sizes(order: Ints, columns: tuple[Ints, ...], item: Ints) -> tuple[Ints, Ints]:
    """Start of each run of equal rows of the ordered columns, and its number of distinct items."""
    runs = _run_starts(*columns)
    distinct = _run_starts(*columns, item[order])
    return runs, np.diff(np.searchsorted(distinct, np.append(runs, len(order))))


def _lists(values: pa.Array, lengths: Ints) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


# --- Step 2: from windows to counted pairs of a day ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _DayWindows:
    """All windows of a day, flat. `items` are codes of `names` per slot; target t has triggers first[t] .. first[t] + length[t]."""

    day: int
    names: pa.Array
    hashes: Ints
    items: Ints
    target: Ints
    user: Ints
    first: Ints
    length: Ints


def count_windows(
    batches: Iterable[pa.RecordBatch], *, symmetric: bool, min_users: int, pass_pairs: int = _PASS_PAIRS
) -> Iterator[pa.RecordBatch]:
    """Pairs and their users, one (day, split) after the other.

    A split is a cell of a grid over the hashes of both items of a pair, so that neither a hot trigger nor a hot target makes one task
    slow. Only the pairs of the cell are expanded. Its passes are thinner cells: at most about `pass_pairs` pairs are held at once.

    Args:
        batches: WINDOW_SCHEMA, sorted by (day, split).
        symmetric: add the mirror image of each pair.
        min_users: user hashes kept per pair.
        pass_pairs: pairs expanded at once; a bigger day is counted in several passes over its windows.

    Returns:
        Rows of co_engagement_daily with coded ids (DAY_ARROW), sorted within a pass.
    """
    for table in _whole_runs(batches, ["day", "split"], min_rows=1):
        days, splits = _ints(table, "day"), _ints(table, "split")
        for start, length in equal_runs(days, splits):
            windows = _flatten(int(days[start]), table["block"].slice(start, length))
            num_splits = table["num_splits"][start].as_py()
            for cell in _cells(windows, split=int(splits[start]), num_splits=num_splits, pass_pairs=pass_pairs):
                mirror = symmetric and cell is None
                pair, user = _expand(windows, cell, symmetric=symmetric)
                yield from _daily_batches(windows, pair, user, mirror=mirror, min_users=min_users)


Cell = tuple[Mask, Mask]
"""Which items are a pair's trigger, and which its target, in one part of a day."""


def _cells(windows: "_DayWindows", *, split: int, num_splits: int, pass_pairs: int) -> Iterator[Cell | None]:
    """The cells of one split; None for all pairs of the day."""
    if num_splits == 1 and int(windows.length.sum()) <= pass_pairs:
        yield None
        return
    hashes = item_hashes(windows.names)
    across = max(n for n in range(1, isqrt(num_splits) + 1) if num_splits % n == 0)
    down = num_splits // across
    triggers, targets = hashes % down == split % down, hashes // down
    num_pairs = int(_within(windows, slots=triggers, targets=targets % across == split // down)[-1].sum())
    num_passes = max(1, -(-num_pairs // pass_pairs))
    for number in range(num_passes):
        yield triggers, targets % (across * num_passes) == split // down + across * number


def equal_runs(*columns: Ints) -> list[tuple[int, int]]:
    """First row and length of each run of equal rows."""
    starts = _run_starts(*columns)
    return list(zip(starts.tolist(), _run_lengths(starts, len(columns[0])).tolist(), strict=True))


def decoded(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Rows of DAY_ARROW with plain ids, as Spark reads them."""
    for batch in batches:
        columns = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _flatten(day: int, packed: pa.ChunkedArray) -> _DayWindows:
    blocks = [unpack(block) for block in packed]

    def joined(name: str) -> Ints:
        return np.concatenate([block[name].combine_chunks().flatten().to_numpy() for block in blocks]).astype(np.int64)

    names = [block["names"].combine_chunks().flatten() for block in blocks]
    coded, known = encode(pa.concat_arrays(names))
    base, sizes = np.cumsum([0] + [len(part) for part in names[:-1]]), [len(block["items"][0]) for block in blocks]
    codes = coded[joined("items") + np.repeat(base, sizes)]
    hashes, user = np.unique(joined("user_hashes"), return_inverse=True)
    num_slots, num_targets = joined("num_items"), joined("num_targets")
    end, first = np.cumsum(num_slots), joined("starts")
    return _DayWindows(
        day=day,
        names=known,
        hashes=hashes,
        items=codes,
        target=codes[ranges(end - num_targets, num_targets)],
        user=np.repeat(user.astype(np.int64), num_targets),
        first=np.repeat(end - num_slots, num_targets) + first,
        length=joined("stops") - first,
    )


def item_hashes(names: pa.Array) -> Ints:
    """A 32-bit hash of each item, equal in every task and for every dictionary."""
    return np.array([zlib.crc32(name.encode()) for name in names.to_pylist()], dtype=np.int64)


def _expand(windows: _DayWindows, cell: Cell | None, *, symmetric: bool) -> tuple[Ints, Ints]:
    """Distinct (pair, user), sorted; a pair is trigger code << item bits | target code.

    Without a cell, symmetric pairs come once, the smaller code first; the pairs of a cell come in the order of the cell, mirror images
    included.
    """
    bits = _bits(len(windows.names))
    pairs, users = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for trigger, target, user in _co_engagements(windows, cell, symmetric=symmetric):
        wanted = trigger != target
        if symmetric and cell is None:
            trigger, target = np.minimum(trigger, target), np.maximum(trigger, target)
        pairs.append((trigger[wanted] << bits) | target[wanted])
        users.append(user[wanted])
    return _distinct(np.concatenate(pairs), np.concatenate(users), pair_bits=2 * bits, user_bits=_bits(len(windows.hashes)))


def _co_engagements(windows: _DayWindows, cell: Cell | None, *, symmetric: bool) -> Iterator[tuple[Ints, Ints, Ints]]:
    """(trigger, target, user) with repeats, a block after the other; of a cell that is symmetric, its pairs met in either order."""
    if cell is None:
        yield from _blocks(windows.items, windows.target, windows.user, windows.first, windows.length)
        return
    first, second = cell
    yield from _blocks(*_within(windows, slots=first, targets=second))
    if symmetric:
        for target, trigger, user in _blocks(*_within(windows, slots=second, targets=first)):
            yield trigger, target, user


def _within(windows: _DayWindows, *, slots: Mask, targets: Mask) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Items, targets, users, first and length, with only the items of `slots` as triggers and only those of `targets` as targets."""
    kept, rows = slots[windows.items], np.flatnonzero(targets[windows.target])
    before = np.concatenate([[0], np.cumsum(kept)])
    first = before[windows.first[rows]]
    length = before[windows.first[rows] + windows.length[rows]] - first
    return windows.items[kept], windows.target[rows], windows.user[rows], first, length


def _blocks(items: Ints, target: Ints, user: Ints, first: Ints, length: Ints) -> Iterator[tuple[Ints, Ints, Ints]]:
    for start, count in equal_runs(np.cumsum(length) // _BLOCK_PAIRS):
        rows = slice(start, start + count)
        lengths = length[rows]
        yield items[ranges(first[rows], lengths)], np.repeat(target[rows], lengths), np.repeat(user[rows], lengths)


def _bits(size: int) -> int:
    """Bits that hold every code below the size."""
    return max(1, (size - 1).bit_length())


def _distinct(pair: Ints, user: Ints, *, pair_bits: int, user_bits: int) -> tuple[Ints, Ints]:
    """Distinct rows ascending: one sort of a packed key where it fits into 63 bits, else a slower sort of both columns."""
    if pair_bits + user_bits < 64:
        key = np.sort((pair << user_bits) | user)
        key = key[_run_starts(key)]
        return key >> user_bits, key & ((1 << user_bits) - 1)
    order = np.lexsort((user, pair))
    pair, user = pair[order], user[order]
    rows = _run_starts(pair, user)
    return pair[rows], user[rows]


def _daily_batches(windows: _DayWindows, pair: Ints, user: Ints, *, mirror: bool, min_users: int) -> Iterator[pa.RecordBatch]:
    """Count runs of equal pairs. Users are coded in the order of their hashes, so the smallest hashes come first."""
    bits = _bits(len(windows.names))
    low = (1 << bits) - 1
    starts = _run_starts(pair)
    counts, pairs = _run_lengths(starts, len(pair)), pair[starts]
    if mirror:
        mirrored = ((pairs & low) << bits) | (pairs >> bits)
        order = np.argsort(np.concatenate([pairs, mirrored]))
        pairs = np.concatenate([pairs, mirrored])[order]
        starts, counts = np.tile(starts, 2)[order], np.tile(counts, 2)[order]
    for begin in range(0, len(pairs), OUTPUT_ROWS):
        rows = slice(begin, begin + OUTPUT_ROWS)
        kept = np.minimum(counts[rows], min_users)
        columns = [
            pa.array(np.full(len(kept), windows.day, dtype=np.int32)).cast(pa.date32()),
            pa.DictionaryArray.from_arrays(pa.array(pairs[rows] >> bits, pa.int32()), windows.names),
            pa.DictionaryArray.from_arrays(pa.array(pairs[rows] & low, pa.int32()), windows.names),
            pa.array(counts[rows]),
            _lists(pa.array(windows.hashes[user[ranges(starts[rows], kept)]]), kept),
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=DAY_ARROW)


# --- Adding up days ------------------------------------------------------------------------------------------------------------


def pack_by_trigger(batches: Iterable[pa.RecordBatch], *, num_buckets: int) -> Iterator[pa.RecordBatch]:
    """Rows as few large binary blocks, one per bucket of triggers and chunk: rows of PACKED_SCHEMA.

    An exchange then moves a thousand blocks and not tens of millions of rows, each of which Spark would serialize, compress and sort.
    """
    for chunk in _chunks(batches, min_rows=PACKED_ROWS):
        trigger, triggers = encode(chunk["trigger_item_id"])
        yield from _packed_by(chunk, (item_hashes(triggers) % num_buckets)[trigger], num_buckets)


def pack_by_pair(batches: Iterable[pa.RecordBatch], *, num_buckets: int) -> Iterator[pa.RecordBatch]:
    """As `pack_by_trigger`, but by the hash of both items: the rows of a hot trigger go to all buckets. Ids become dictionaries.

    A list of user hashes becomes a row a hash, of which the first has the users: nearly all lists hold one, and numbers move faster.
    """
    for chunk in _chunks(batches, min_rows=PACKED_ROWS):
        trigger, triggers = encode(chunk["trigger_item_id"])
        target, targets = encode(chunk["target_item_id"])
        mixed = item_hashes(triggers)[trigger] * 0x9E3779B1 + item_hashes(targets)[target]  # else (i, j) and (j, i) always met
        for name, code, names in (("trigger_item_id", trigger, triggers), ("target_item_id", target, targets)):
            coded = pa.DictionaryArray.from_arrays(pa.array(code, pa.int32()), names)
            chunk = chunk.set_column(chunk.column_names.index(name), name, coded)
        bucket = (mixed >> 7) % num_buckets
        if "user_hashes" in chunk.column_names:
            chunk, rows = _one_hash_a_row(chunk)
            bucket = bucket[rows]
        yield from _packed_by(chunk, bucket, num_buckets)


def _one_hash_a_row(chunk: pa.Table) -> tuple[pa.Table, Ints]:
    """Rows of co_engagement_daily, each as often as it names a user; and the row that each was."""
    lists, users = _Hashes.of(chunk["user_hashes"]), _ints(chunk, "num_users")
    rows = np.repeat(np.arange(chunk.num_rows), lists.length)
    users = np.where(_first_of_runs(rows), users[rows], 0)
    chunk = chunk.drop_columns(["user_hashes", "num_users"])
    if len(rows) > chunk.num_rows:
        chunk = chunk.take(pa.array(rows))
    chunk = chunk.append_column("num_users", pa.array(users, pa.int32())).append_column("user_hash", pa.array(lists.values))
    return chunk, rows


def _first_of_runs(values: Ints) -> Mask:
    first = np.ones(len(values), dtype=np.bool_)
    first[1:] = values[1:] != values[:-1]
    return first


def _packed_by(chunk: pa.Table, bucket: Ints, num_buckets: int) -> Iterator[pa.RecordBatch]:
    order = np.argsort(bucket.astype(np.uint16) if num_buckets < 2**16 else bucket, kind="stable")  # 16 bits: a radix sort
    ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    grouped = chunk.take(pa.array(order)).combine_chunks()
    for number in np.flatnonzero(np.diff(ends)).tolist():
        part = grouped.slice(ends[number], ends[number + 1] - ends[number])
        for place, column in enumerate(part.columns):
            if pa.types.is_dictionary(column.type):
                part = part.set_column(place, part.column_names[place], _compact(column.combine_chunks()))
        yield _packed(number, part)


def _compact(coded: pa.DictionaryArray) -> pa.DictionaryArray:
    """The same values with a dictionary that holds no others."""
    codes = coded.indices.to_numpy()
    used = np.zeros(len(coded.dictionary), dtype=np.bool_)
    used[codes] = True
    place = np.cumsum(used, dtype=np.int32) - 1
    return pa.DictionaryArray.from_arrays(pa.array(place[codes], pa.int32()), coded.dictionary.take(pa.array(np.flatnonzero(used))))


def _chunks(batches: Iterable[pa.RecordBatch], *, min_rows: int) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    num_rows = 0
    for batch in batches:
        held.append(batch)
        num_rows += batch.num_rows
        if num_rows >= min_rows:
            yield pa.Table.from_batches(held)
            held, num_rows = [], 0
    if num_rows:
        yield pa.Table.from_batches(held)


def _packed(bucket: int, rows: pa.Table) -> pa.RecordBatch:
    block = pa.array([_pack(rows)], pa.binary())
    return pa.RecordBatch.from_arrays([pa.array([bucket], pa.int32()), block], names=["bucket", "block"])


def _pack(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:  # the exchange compresses
        writer.write_table(rows)
    return bytes(sink.getvalue())


def unpack(block: pa.BinaryScalar) -> pa.Table:
    """The rows of one block."""
    return pa.ipc.open_stream(block.as_buffer()).read_all()


def total_pairs(batches: Iterable[pa.RecordBatch], *, rule: TotalRule) -> Iterator[pa.RecordBatch]:
    """Totals of whole pairs with enough users: rows of TOTAL_SCHEMA.

    Args:
        batches: blocks of `pack_by_pair`, all of one bucket, with everything of its pairs: rows of co_engagement_daily (`day`, and
            optionally `counts`: false where the row is part of the total already, and only its fit_weight lacks it), and rows of
            TOTAL_SCHEMA, the totals of a former night.
        rule: decay and privacy minimum.
    """
    blocks = [unpack(block) for batch in batches for block in batch["block"]]
    days = [block for block in blocks if "day" in block.column_names] or [_PART_ARROW.empty_table()]
    earlier = [block for block in blocks if "day" not in block.column_names] or [_TOTAL_ARROW.empty_table()]
    if blocks:
        yield from _totals(pa.concat_tables(days), pa.concat_tables(earlier), rule).to_batches(max_chunksize=OUTPUT_ROWS)


def strongest_pairs(batches: Iterable[pa.RecordBatch], *, max_pairs: int) -> Iterator[pa.RecordBatch]:
    """The `max_pairs` heaviest pairs of each trigger, ties by target id, and their share of the weight of all its pairs.

    They stay packed, in the bucket they came from, as they are read twice: the rows of all triggers have to be counted before one can
    be weighted by how rare it is.

    Args:
        batches: blocks of `pack_by_trigger` over rows of TOTAL_SCHEMA, all of one bucket; every row of a trigger is among them.
        max_pairs: pairs kept per trigger.

    Returns:
        Blocks with the columns of STRONG_SCHEMA, sorted by trigger and target.
    """
    blocks = [(bucket.as_py(), unpack(block)) for batch in batches for bucket, block in zip(batch["bucket"], batch["block"], strict=True)]
    if not blocks:
        return
    bucket, strong = blocks[0][0], _strongest(pa.concat_tables(table for _, table in blocks), max_pairs)
    for start in range(0, strong.num_rows, PACKED_ROWS):
        yield _packed(bucket, strong.slice(start, PACKED_ROWS))


def count_partners(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Parts to be summed by item, rows of PARTNER_SCHEMA: triggers paired with it, and user-days of its pairs as a trigger.

    Args:
        batches: blocks of `strongest_pairs`.
    """
    for batch in batches:
        for block in batch["block"]:
            pairs = unpack(block)
            target, targets = encode(pairs["target_item_id"])
            trigger, triggers = encode(pairs["trigger_item_id"])
            num_triggers, days = np.bincount(target), np.zeros(len(triggers), dtype=np.int64)
            np.add.at(days, trigger, _ints(pairs, "num_user_days"))
            for ids, counts in ((targets, [num_triggers, 0 * num_triggers]), (triggers, [0 * days, days])):
                yield pa.RecordBatch.from_arrays([ids, *map(pa.array, counts)], names=["item_id", "num_triggers", "num_user_days"])


def _totals(days: pa.Table, earlier: pa.Table, rule: TotalRule) -> pa.Table:
    """Earlier totals and rows of days, added up. An earlier total has reached the minimum, and so has its sum with more days."""
    names = ("trigger_item_id", "target_item_id")
    trigger, target = (encode(pa.chunked_array(days[name].chunks + earlier[name].cast(_CODED).chunks, _CODED)) for name in names)
    bits = _bits(len(target[1]))
    pair, num_days = (trigger[0] << bits) | target[0], days.num_rows
    day, all_users = _ints(days, "day"), np.concatenate([_ints(days, "num_users"), _ints(earlier, "num_user_days")])
    before = np.full(earlier.num_rows, (int(day.min()) if num_days else 0) - 1)
    order = _order(pair, np.concatenate([day, before]))  # sums in one order, whatever that of the rows
    order, starts = _frequent(pair, all_users, order, rule.min_users)
    old, users = order >= num_days, all_users[order]
    at = np.minimum(order, max(0, num_days - 1))  # of earlier totals: any row, masked below
    day = day[at] if num_days else before[order]
    counts = ~old & (days["counts"].to_numpy()[at] if num_days and "counts" in days.column_names else True)
    fit = ~old & (day < rule.holdout_from)
    decayed = users * np.exp2(np.maximum((day - rule.landmark) / rule.half_life_days, LEAST_EXPONENT))

    def added(of_days: NDArray[Any], counted: Mask, of_totals: str) -> NDArray[Any]:
        values = np.where(counted, of_days, 0)
        if earlier.num_rows:
            values = np.where(old, earlier[of_totals].to_numpy()[np.maximum(order - num_days, 0)], values)
        return _sums(values, starts)

    people = _People(starts=starts, users=users, hashes=_ints(days, "user_hash")[at] if num_days else before[order])
    fit_weight = added(decayed, fit, "fit_weight")
    old_fit = old & (earlier["fit_weight"].to_numpy()[np.maximum(order - num_days, 0)] > 0) if earlier.num_rows else old
    enough = np.logical_or.reduceat(old, starts) | people.enough(counts, rule.min_users)
    fit_enough = np.logical_or.reduceat(old_fit, starts) | people.enough(fit, rule.min_users)
    kept = np.flatnonzero(enough)
    first = pair[order[starts[kept]]]
    columns = [
        trigger[1].take(pa.array(first >> bits)),
        target[1].take(pa.array(first & ((1 << bits) - 1))),
        pa.array(added(decayed, counts, "weight")[kept]),
        pa.array(added(users, counts, "num_user_days")[kept]),
        pa.array(np.where(fit_enough, fit_weight, 0.0)[kept]),
    ]
    return pa.table(columns, schema=_TOTAL_ARROW)


def _frequent(pair: Ints, users: Ints, order: Ints, min_users: int) -> tuple[Ints, Ints]:
    """Of ordered rows, those of pairs whose user-days could reach the minimum, and where each pair starts; most pairs are seen once."""
    starts = _run_starts(pair[order])
    frequent = _sums(users[order], starts) >= min_users
    lengths = _run_lengths(starts, len(order))
    return order[np.repeat(frequent, lengths)], np.cumsum(lengths[frequent]) - lengths[frequent]


def _order(pair: Ints, day: Ints) -> Ints:
    """Rows by pair, then day, then place. Sorting numbers that hold the row is twice as fast as sorting rows by numbers."""
    first, row_bits = int(day.min()), _bits(len(pair))
    day_bits = _bits(int(day.max()) - first + 1)
    if int(pair.max()).bit_length() + day_bits + row_bits < 64:
        keys = (((pair << day_bits) | (day - first)) << row_bits) | np.arange(len(pair))
        keys.sort()
        return keys & ((1 << row_bits) - 1)
    return np.lexsort((day, pair))


def _sums(values: NDArray[Any], starts: Ints) -> NDArray[Any]:
    return np.add.reduceat(values, starts)


@dataclass(frozen=True, kw_only=True)
class _Hashes:
    """A list column, flat: row r holds values[start[r] : start[r] + length[r]]."""

    values: Ints
    start: Ints
    length: Ints

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "_Hashes":
        lists = column.combine_chunks()
        length = pc.list_value_length(lists).to_numpy().astype(np.int64)
        return cls(values=lists.flatten().to_numpy(), start=np.cumsum(length) - length, length=length)


@dataclass(frozen=True, kw_only=True)
class _People:
    """Who stands behind runs of rows: P pairs that start at `starts`; a row has `users`, and `hashes` name one user each."""

    starts: Ints
    users: Ints
    hashes: Ints

    def enough(self, counted: Mask, min_users: int) -> Mask:
        """Per pair, whether at least `min_users` distinct users engaged it on the counted rows.

        A day with that many users decides at once. On every other day all users are named, so that the union of the days is the set
        of users; beyond two users it is only built for pairs whose user-days could reach the minimum.
        """
        starts, users = self.starts, np.where(counted, self.users, 0)
        enough = np.maximum.reduceat(users, starts) >= min_users
        if min_users <= _ENDS_SAY_ALL:
            return enough | self._different(counted)
        open_ = ~enough & (_sums(users, starts) >= min_users)
        if not open_.any():
            return enough
        pair = np.repeat(np.arange(len(starts), dtype=np.int64), _run_lengths(starts, len(users)))
        rows = np.flatnonzero(open_[pair] & counted)
        rows = rows[np.lexsort((self.hashes[rows], pair[rows]))]
        distinct = pair[rows][_run_starts(pair[rows], self.hashes[rows])]
        return enough | (np.bincount(distinct, minlength=len(starts)) >= min_users)

    def _different(self, counted: Mask) -> Mask:
        """Per pair, whether the counted rows name two users."""
        bounds = np.iinfo(np.int64)
        first, last = np.where(counted, self.hashes, bounds.max), np.where(counted, self.hashes, bounds.min)
        different: Mask = np.minimum.reduceat(first, self.starts) < np.maximum.reduceat(last, self.starts)
        return different


def _strongest(totals: pa.Table, max_pairs: int) -> pa.Table:
    trigger, _ = encode(totals["trigger_item_id"])
    target, _ = encode(totals["target_item_id"])
    order = np.lexsort((target, trigger))
    totals, trigger, target = totals.take(pa.array(order)), trigger[order], target[order]
    weight = totals["weight"].to_numpy()
    runs = _run_starts(trigger)
    num_pairs = _run_lengths(runs, len(trigger))
    total = np.repeat(_sums(weight, runs), num_pairs)
    conditional = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    by_weight = np.lexsort((target, -weight, trigger))
    rank = np.empty(len(by_weight), dtype=np.int64)
    rank[by_weight] = ranges(np.zeros_like(num_pairs), num_pairs)
    return totals.append_column("conditional", pa.array(conditional)).take(pa.array(np.flatnonzero(rank < max_pairs)))
