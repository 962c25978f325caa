"""Adding up days: decay, the privacy minimum of distinct users, and the strongest pairs of a trigger. No session, clock or Spark."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features.pair_kernels import (
    LEAST_EXPONENT,
    OUTPUT_ROWS,
    PACKED_ROWS,
    Floats,
    Ints,
    Mask,
    chunks,
    encode,
    first_of_runs,
    ints,
    num_bits,
    packed,
    packed_by,
    ranges,
    row_order,
    run_lengths,
    run_starts,
    text_hashes,
    unpack,
    unpacked,
)

TOTAL_SCHEMA = "trigger_item_id string, target_item_id string, weight double, num_user_days bigint, fit_weight double"
PARTNER_SCHEMA = "item_id string, num_triggers bigint, num_user_days bigint"
_ENDS_SAY_ALL = 2  # at least two different users: the smallest hash of all is not the largest
TOTAL_ARROW = pa.schema(
    [
        ("trigger_item_id", pa.string()),
        ("target_item_id", pa.string()),
        ("weight", pa.float64()),
        ("num_user_days", pa.int64()),
        ("fit_weight", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TotalRule:
    """How days add up: decay from the landmark, the calibration slice and the privacy minimum."""

    landmark: int
    half_life_days: float
    holdout_from: int
    min_users: int

    def decay(self, day: Ints) -> Floats:
        """What days weigh, as `features.pairs.decay`."""
        weight: Floats = np.exp2(np.maximum((day - self.landmark) / self.half_life_days, LEAST_EXPONENT))
        return weight


def pack_by_trigger(batches: Iterable[pa.RecordBatch], *, num_buckets: int) -> Iterator[pa.RecordBatch]:
    """Rows as few large binary blocks, one per bucket of triggers and chunk: rows of PACKED_SCHEMA.

    An exchange then moves a thousand blocks and not tens of millions of rows, each of which Spark would serialize, compress and sort.
    """
    for chunk in chunks(batches, min_rows=PACKED_ROWS):
        trigger, triggers = encode(chunk["trigger_item_id"])
        yield from packed_by(chunk, (text_hashes(triggers) % num_buckets)[trigger], num_buckets)


def pack_by_pair(batches: Iterable[pa.RecordBatch], *, num_buckets: int) -> Iterator[pa.RecordBatch]:
    """As `pack_by_trigger`, but rows of co_engagement_daily by the hash of both items: those of a hot trigger go to all buckets. Ids become
    dictionaries.

    A list of user hashes becomes a row a hash, of which the first has the users: nearly all lists hold one, and numbers move faster.
    """
    for chunk in chunks(batches, min_rows=PACKED_ROWS):
        trigger, triggers = encode(chunk["trigger_item_id"])
        target, targets = encode(chunk["target_item_id"])
        mixed = text_hashes(triggers)[trigger] * 0x9E3779B1 + text_hashes(targets)[target]  # else (i, j) and (j, i) always met
        for name, code, names in (("trigger_item_id", trigger, triggers), ("target_item_id", target, targets)):
            coded = pa.DictionaryArray.from_arrays(pa.array(code, pa.int32()), names)
            chunk = chunk.set_column(chunk.column_names.index(name), name, coded)
        chunk, rows = _one_hash_a_row(chunk)
        yield from packed_by(chunk, ((mixed >> 7) % num_buckets)[rows], num_buckets)


def _one_hash_a_row(chunk: pa.Table) -> tuple[pa.Table, Ints]:
    """Rows of co_engagement_daily, each as often as it names a user; and the row that each was."""
    lists, users = chunk["user_hashes"].combine_chunks(), ints(chunk, "num_users")
    rows = np.repeat(np.arange(chunk.num_rows), pc.list_value_length(lists).to_numpy())
    users = np.where(first_of_runs(rows), users[rows], 0)
    chunk = chunk.drop_columns(["user_hashes", "num_users"])
    if len(rows) > chunk.num_rows:
        chunk = chunk.take(pa.array(rows))
    chunk = chunk.append_column("num_users", pa.array(users, pa.int32())).append_column("user_hash", lists.flatten())
    return chunk, rows


def total_pairs(batches: Iterable[pa.RecordBatch], *, rule: TotalRule, symmetric: bool = False) -> Iterator[pa.RecordBatch]:
    """Totals of whole pairs with enough users: rows of TOTAL_SCHEMA.

    Args:
        batches: blocks of `pack_by_pair`, all of one bucket, with all rows of co_engagement_daily of its pairs.
        rule: decay and privacy minimum.
        symmetric: each pair is there once, and comes out in both orders.
    """
    if not (blocks := list(unpacked(batches))):
        return
    totals = _totals(pa.concat_tables(blocks), rule)
    yield from totals.to_batches(max_chunksize=OUTPUT_ROWS)
    if symmetric:
        mirrored = totals.select([1, 0, *range(2, totals.num_columns)]).rename_columns(totals.column_names)
        yield from mirrored.to_batches(max_chunksize=OUTPUT_ROWS)


def strongest_pairs(batches: Iterable[pa.RecordBatch], *, max_pairs: int) -> Iterator[pa.RecordBatch]:
    """The `max_pairs` heaviest pairs of each trigger, ties by target id, and their share of the weight of all its pairs.

    They stay packed, in the bucket they came from, as they are read twice: the rows of all triggers have to be counted before one can
    be weighted by how rare it is.

    Args:
        batches: blocks of `pack_by_trigger` over rows of TOTAL_SCHEMA, all of one bucket; every row of a trigger is among them.
        max_pairs: pairs kept per trigger.

    Returns:
        Blocks with the columns of TOTAL_SCHEMA and `conditional`, sorted by trigger and target.
    """
    blocks = [(bucket.as_py(), unpack(block)) for batch in batches for bucket, block in zip(batch["bucket"], batch["block"], strict=True)]
    if not blocks:
        return
    bucket, strong = blocks[0][0], _strongest(pa.concat_tables(table for _, table in blocks), max_pairs)
    for start in range(0, strong.num_rows, PACKED_ROWS):
        yield packed(bucket, strong.slice(start, PACKED_ROWS))


def count_partners(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Parts to be summed by item, rows of PARTNER_SCHEMA: triggers paired with it, and user-days of its pairs as a trigger.

    Args:
        batches: blocks of `strongest_pairs`.
    """
    for pairs in unpacked(batches):
        target, targets = encode(pairs["target_item_id"])
        trigger, triggers = encode(pairs["trigger_item_id"])
        num_triggers, days = np.bincount(target, minlength=len(targets)), np.zeros(len(triggers), dtype=np.int64)
        np.add.at(days, trigger, ints(pairs, "num_user_days"))
        for ids, counts in ((targets, [num_triggers, 0 * num_triggers]), (triggers, [0 * days, days])):
            yield pa.RecordBatch.from_arrays([ids, *map(pa.array, counts)], names=["item_id", "num_triggers", "num_user_days"])


def _totals(days: pa.Table, rule: TotalRule) -> pa.Table:
    """Rows of days added up."""
    trigger, target = (encode(days[name]) for name in ("trigger_item_id", "target_item_id"))
    bits = num_bits(len(target[1]))
    pair, day, users = (trigger[0] << bits) | target[0], ints(days, "day"), ints(days, "num_users")
    order, starts = _frequent(pair, users, row_order(pair, day), rule.min_users)  # sums in one order, whatever that of the rows
    if not len(starts):
        return TOTAL_ARROW.empty_table()
    day, users = day[order], users[order]
    fit, decayed = day < rule.holdout_from, users * rule.decay(day)
    people = People(starts=starts, users=users, hashes=ints(days, "user_hash")[order])
    kept = np.flatnonzero(people.enough(np.ones_like(fit), rule.min_users))
    fit_weight = np.where(people.enough(fit, rule.min_users), sums(np.where(fit, decayed, 0.0), starts), 0.0)
    first = pair[order[starts[kept]]]
    columns = [
        trigger[1].take(pa.array(first >> bits)),
        target[1].take(pa.array(first & ((1 << bits) - 1))),
        pa.array(sums(decayed, starts)[kept]),
        pa.array(sums(users, starts)[kept]),
        pa.array(fit_weight[kept]),
    ]
    return pa.table(columns, schema=TOTAL_ARROW)


def _frequent(pair: Ints, users: Ints, order: Ints, min_users: int) -> tuple[Ints, Ints]:
    """Of ordered rows, those of pairs whose user-days could reach the minimum, and where each pair starts; most pairs are seen once."""
    starts = run_starts(pair[order])
    frequent = sums(users[order], starts) >= min_users
    lengths = run_lengths(starts, len(order))
    return order[np.repeat(frequent, lengths)], np.cumsum(lengths[frequent]) - lengths[frequent]


def sums(values: NDArray[Any], starts: Ints) -> NDArray[Any]:
    """Sum of each run of values that begins at one of the starts."""
    return np.add.reduceat(values, starts)


@dataclass(frozen=True, kw_only=True)
class People:
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
        open_ = ~enough & (sums(users, starts) >= min_users)
        if not open_.any():
            return enough
        pair = np.repeat(np.arange(len(starts), dtype=np.int64), run_lengths(starts, len(users)))
        rows = np.flatnonzero(open_[pair] & counted)
        rows = rows[np.lexsort((self.hashes[rows], pair[rows]))]
        distinct = pair[rows][run_starts(pair[rows], self.hashes[rows])]
        return enough | (np.bincount(distinct, minlength=len(starts)) >= min_users)

    def _different(self, counted: Mask) -> Mask:
        """Per pair, whether the counted rows name two users."""
        bounds = np.iinfo(np.int64)
        first, last = np.where(counted, self.hashes, bounds.max), np.where(counted, self.hashes, bounds.min)
        different: Mask = np.minimum.reduceat(first, self.starts) < np.maximum.reduceat(last, self.starts)
        return different


def _strongest(totals: pa.Table, max_pairs: int) -> pa.Table:
    totals = totals.unify_dictionaries().combine_chunks()
    trigger, _ = encode(totals["trigger_item_id"])
    target, _ = encode(totals["target_item_id"])
    order = np.lexsort((target, trigger))
    totals, trigger, target = totals.take(pa.array(order)), trigger[order], target[order]
    weight = totals["weight"].to_numpy()
    runs = run_starts(trigger)
    num_pairs = run_lengths(runs, len(trigger))
    total = np.repeat(sums(weight, runs), num_pairs)
    conditional = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    by_weight = np.lexsort((target, -weight, trigger))
    rank = np.empty(len(by_weight), dtype=np.int64)
    rank[by_weight] = ranges(np.zeros_like(num_pairs), num_pairs)
    return totals.append_column("conditional", pa.array(conditional)).take(pa.array(np.flatnonzero(rank < max_pairs)))
