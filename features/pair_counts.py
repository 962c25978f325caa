"""From windows to counted pairs: what the task of a cell does. No session, no clock, no Spark import.

Everything about a pair meets in one cell, on all days: one sort of packed 64-bit keys (pair, day, user) counts the users of each day and
finds the pairs with enough users overall. Rows of days and totals come from the same pass over the sorted keys.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.pair_kernels import (
    CODED,
    KEY_BITS,
    OUTPUT_ROWS,
    Ints,
    compact_codes,
    equal_runs,
    first_of_runs,
    num_bits,
    ranges,
    row_order,
    run_lengths,
    unpack_arrays,
)
from features.pair_totals import TOTAL_ARROW, People, TotalRule, sums

DAY_ARROW = pa.schema(
    [
        ("event_date", pa.date32()),
        ("trigger_item_id", CODED),
        ("target_item_id", CODED),
        ("num_users", pa.int64()),
        ("user_hashes", pa.list_(pa.int64())),
    ]
)
CODED_TOTAL_ARROW = pa.schema([field.with_type(CODED) if field.type == pa.string() else field for field in TOTAL_ARROW])
_BLOCK_PAIRS = 4_000_000
_PASS_PAIRS = 24_000_000  # pairs held at once: some 0.7 GB with the arrays derived from them


@dataclass(frozen=True, kw_only=True)
class CountRule:
    """How cells are counted: min_users user hashes are kept per pair and day, unless no rows of days are wanted; `totals` says how days
    add up, None that they do not.
    """

    symmetric: bool
    min_users: int
    totals: TotalRule | None = None
    daily: bool = True
    pass_pairs: int = _PASS_PAIRS


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What one pass has counted: rows of co_engagement_daily by day (DAY_ARROW), and of its pairs the totals (CODED_TOTAL_ARROW); what is
    not wanted is empty.
    """

    daily: pa.Table
    totals: pa.Table


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """Windows of one cell: target t has the triggers items[first[t] : first[t] + length[t]]; codes of `names` and `hashes`."""

    names: pa.Array
    hashes: Ints
    first_day: int
    num_days: int
    items: Ints
    target: Ints
    first: Ints
    length: Ints
    day: Ints
    user: Ints


def count_cells(batches: Iterable[pa.RecordBatch], *, items: pa.Array, rule: CountRule) -> Iterator[Counted]:
    """Count cell after cell.

    Args:
        batches: blocks of `features.windows.make_windows` of some cells, all blocks of each.
        items: ids of all items, ascending.
        rule: how cells are counted.
    """
    blocks: dict[int, list[pa.BinaryScalar]] = {}
    for batch in batches:
        for number, block in zip(batch["bucket"].to_pylist(), batch["block"], strict=True):
            blocks.setdefault(number, []).append(block)
    for number in sorted(blocks):
        cell = _joined(blocks.pop(number), items)
        num_passes = max(1, -(-int(cell.length.sum()) // rule.pass_pairs))
        for part in range(num_passes):
            yield _count(cell, rule, part=part, num_parts=num_passes)


def _joined(blocks: list[pa.BinaryScalar], items: pa.Array) -> _Cell:
    """All blocks of a cell, with codes as dense as the cell allows: the fewer bits a key has, the better."""
    parts = [unpack_arrays(block) for block in blocks]

    def joined(name: str, sizes: str = "") -> Ints:
        bases = np.cumsum([0, *(len(part[sizes]) for part in parts[:-1])]) if sizes else np.zeros(len(parts), dtype=np.int64)
        return np.concatenate([part[name].astype(np.int64) + base for part, base in zip(parts, bases.tolist(), strict=True)])

    slots, target, day = joined("items"), joined("target"), joined("day")
    used, codes = compact_codes(np.concatenate([slots, target]), len(items))
    hashes, user = np.unique(np.concatenate([part["hashes"] for part in parts]), return_inverse=True)
    return _Cell(
        names=items.take(pa.array(used)),
        hashes=hashes,
        first_day=int(day.min()),
        num_days=int(day.max() - day.min()) + 1,
        items=codes[: len(slots)],
        target=codes[len(slots) :],
        first=joined("first", "items"),
        length=joined("length"),
        day=day - day.min(),
        user=user.reshape(-1)[joined("user", "hashes")],
    )


@dataclass(frozen=True, kw_only=True)
class _Keys:
    """Distinct (pair, day, user), ascending: the pair is trigger << item bits | target, the person day << user bits | user."""

    pair: Ints
    person: Ints


def _count(cell: _Cell, rule: CountRule, *, part: int, num_parts: int) -> Counted:
    item_bits, user_bits = num_bits(len(cell.names)), num_bits(len(cell.hashes))
    keys = _distinct(cell, rule.symmetric, part=part, num_parts=num_parts)
    day = keys.person >> user_bits
    user = keys.person & ((1 << user_bits) - 1)
    new_pair = first_of_runs(keys.pair)
    daily = DAY_ARROW.empty_table()
    if rule.daily:
        starts = np.flatnonzero(new_pair | first_of_runs(day))
        daily = _days(cell, rule, keys.pair[starts], day[starts], (starts, run_lengths(starts, len(day))), user)
    if rule.totals is None:
        return Counted(daily=daily, totals=CODED_TOTAL_ARROW.empty_table())
    totals = _totals(keys.pair, day + cell.first_day, user, np.flatnonzero(new_pair), rule.totals)
    pair, *sums_ = totals
    trigger, target = pair >> item_bits, pair & ((1 << item_bits) - 1)
    if rule.symmetric:
        trigger, target = np.concatenate([trigger, target]), np.concatenate([target, trigger])
        sums_ = [np.tile(values, 2) for values in sums_]
    columns = [_coded(trigger, cell.names), _coded(target, cell.names), *map(pa.array, sums_)]
    return Counted(daily=daily, totals=pa.table(columns, schema=CODED_TOTAL_ARROW))


def _distinct(cell: _Cell, symmetric: bool, *, part: int, num_parts: int) -> _Keys:
    """What the windows hold of one part of the cell's pairs. Symmetric pairs come once, the smaller code first."""
    item_bits, person_bits = num_bits(len(cell.names)), num_bits(len(cell.hashes)) + num_bits(cell.num_days)
    person = (cell.day << num_bits(len(cell.hashes))) | cell.user
    pairs, people = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    fits = 2 * item_bits + person_bits <= KEY_BITS
    for start, count in equal_runs(np.cumsum(cell.length) // _BLOCK_PAIRS):
        rows = slice(start, start + count)
        length = cell.length[rows]
        trigger, target = cell.items[ranges(cell.first[rows], length)], np.repeat(cell.target[rows], length)
        pair = (np.minimum(trigger, target) << item_bits) | np.maximum(trigger, target) if symmetric else (trigger << item_bits) | target
        wanted = trigger != target
        if num_parts > 1:
            wanted &= (pair * 0x9E3779B1 >> 17) % num_parts == part
        who = np.repeat(person[rows], length)
        if fits:
            pairs.append(((pair << person_bits) | who)[wanted])
        else:
            pairs.append(pair[wanted])
            people.append(who[wanted])
    pair = np.concatenate(pairs)
    del pairs
    if fits:
        pair.sort()
        pair = pair[first_of_runs(pair)]
        return _Keys(pair=pair >> person_bits, person=pair & ((1 << person_bits) - 1))
    who = np.concatenate(people)
    order = row_order(pair, who)
    pair, who = pair[order], who[order]
    rows_ = first_of_runs(pair, who)
    return _Keys(pair=pair[rows_], person=who[rows_])


def _days(cell: _Cell, rule: CountRule, pair: Ints, day: Ints, runs: tuple[Ints, Ints], user: Ints) -> pa.Table:
    """Rows of co_engagement_daily, by day. Users are coded in the order of their hashes, so the smallest hashes come first."""
    starts, counts = runs
    bits = num_bits(len(cell.names))
    trigger, target = (pair >> bits).astype(np.int32), (pair & ((1 << bits) - 1)).astype(np.int32)
    order = np.argsort(day.astype(np.uint16) if cell.num_days < 2**16 else day, kind="stable")  # 16 bits: a radix sort
    starts, counts, day = starts[order], counts[order], day[order]
    kept = np.minimum(counts, rule.min_users)
    hashes = cell.hashes[user[starts if kept.max(initial=1) == 1 else ranges(starts, kept)]]
    ends = np.concatenate([[0], np.cumsum(kept)])
    columns = [
        pa.array((day + cell.first_day).astype(np.int32)).cast(pa.date32()),
        _coded(trigger[order], cell.names),
        _coded(target[order], cell.names),
        pa.array(counts),
        pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(hashes)),
    ]
    return pa.table(columns, schema=DAY_ARROW)


def _coded(codes: NDArray[np.signedinteger], names: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), names)


def _totals(pair: Ints, day: Ints, user: Ints, starts: Ints, rule: TotalRule) -> tuple[Ints, ...]:
    """Pairs with enough users, and their weight, user-days and fit_weight. Rows are sorted; each is one user on one day."""
    lengths = run_lengths(starts, len(pair))
    frequent = lengths >= rule.min_users  # most pairs are seen once
    rows = np.repeat(frequent, lengths)
    pair, day, user, lengths = pair[rows], day[rows], user[rows], lengths[frequent]
    starts = np.cumsum(lengths) - lengths
    if not len(starts):
        return tuple(np.zeros(0, dtype=kind) for kind in (np.int64, np.float64, np.int64, np.float64))
    people = People(starts=starts, users=np.ones_like(user), hashes=user)
    early = day < rule.holdout_from
    kept = people.enough(np.ones_like(early), rule.min_users)
    fits = people.enough(early, rule.min_users)
    decayed = rule.decay(day)
    fit_weight = np.where(fits, sums(np.where(early, decayed, 0.0), starts), 0.0)
    return pair[starts][kept], sums(decayed, starts)[kept], lengths[kept], fit_weight[kept]


def decoded_days(counted: Iterable[Counted]) -> Iterator[pa.RecordBatch]:
    """Rows of co_engagement_daily with plain ids, as Spark reads them."""
    for part in counted:
        for batch in part.daily.to_batches(max_chunksize=OUTPUT_ROWS):
            columns = [column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns]
            yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
