"""Scores of counted pairs, by columns: what the tasks do that write co_engagement_pairs. No session, clock or Spark import.

`strongest_pairs` has cut what is scored, and `count_partners` says of each item how many triggers it is paired with; what of an item a
score needs is a handful of numbers, which every task holds.

Shapes: N items, P pairs.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Self

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from features.pair_files import IDS, PairFile, opened, uris_of
from features.pair_kernels import Floats, Ints, ints, positions, unpacked
from features.swing import UserItems, swing_scores

BM25_K1 = 1.2
"""How soon more co-engagement of a pair stops to add: the middle of the usual range (Robertson & Zaragoza 2009, section 3.5)."""

BM25_B = 0.75
"""How much triggers with many co-engagements are discounted, 0 (not) to 1 (in proportion); source as BM25_K1."""


@dataclass(frozen=True, kw_only=True)
class ItemTotals:
    """What scores need of each item.

    Attributes:
        ids: (N,) in any order.
        weight: (N,) decayed user-days.
        user_days: (N,).
        num_triggers: (N,) triggers that the item is paired with.
        pair_days: (N,) user-days of its pairs as a trigger.
    """

    ids: pa.Array
    weight: Floats
    user_days: Floats
    num_triggers: Floats
    pair_days: Floats

    @classmethod
    def of(cls, popularity: pa.Table, partners: pa.Table) -> Self:
        """From item_popularity, and sums by item of `features.pair_totals.count_partners`."""
        ids = popularity["item_id"].combine_chunks()
        place = positions(partners["item_id"], ids)
        num_triggers, pair_days = (np.zeros(len(ids)) for _ in range(2))
        num_triggers[place], pair_days[place] = ints(partners, "num_triggers"), ints(partners, "num_user_days")
        user_days = ints(popularity, "num_user_days").astype(np.float64)
        return cls(ids=ids, weight=popularity["weight"].to_numpy(), user_days=user_days, num_triggers=num_triggers, pair_days=pair_days)

    def places(self, coded: pa.ChunkedArray) -> Ints:
        """(P,) of ids.

        Raises:
            ValueError: an id is not known.
        """
        places = positions(coded, self.ids)
        if places.min(initial=0) < 0:
            raise ValueError(f"item {coded[int(places.argmin())].as_py()!r} has pairs, but is not in item_popularity: a defect, report it")
        return places


def read_totals(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Rows of co_engagement_totals with coded ids.

    Args:
        batches: with a column `uri`, of its files.
    """
    for uri in uris_of(batches):
        with opened(uri) as file:
            for number in range(file.num_row_groups):
                yield from file.read_row_group(number, use_threads=False).to_batches()


def write_scored(
    batches: Iterable[pa.RecordBatch], *, items: ItemTotals, user_items: UserItems, folder: str, dates: Mapping[str, date]
) -> Iterator[pa.RecordBatch]:
    """Score pairs and write them to one file of co_engagement_pairs: a row of FILE_SCHEMA, none without pairs.

    Args:
        batches: blocks of `features.pair_totals.strongest_pairs`.
        items: of all pairs of the table.
        user_items: who ever engaged what.
        folder: path or URI of the table.
        dates: its columns that are the same in every row.
    """
    new = PairFile(kind="pairs", folder=folder)
    for pairs in unpacked(batches):
        pairs = pairs.unify_dictionaries().combine_chunks()
        columns = {name: pairs[name] for name in pairs.column_names} | {
            name: pa.array(found) for name, found in _scores(pairs, items).items()
        }
        with threadpool_limits(1):  # one per Spark task; the matrices of a trigger are too small for more
            columns["swing"] = pa.array(swing_scores(user_items, pairs["trigger_item_id"], pairs["target_item_id"]))
        columns |= {name: pa.repeat(pa.scalar(day, pa.date32()), pairs.num_rows) for name, day in dates.items()}
        new.write(pa.table(columns))
    yield from new.close()


def _scores(pairs: pa.Table, items: ItemTotals) -> dict[str, Floats]:
    """(P,) each; definitions in conf/tables.py. Weights of pairs and items share the landmark, so that its factor cancels."""
    trigger, target = (items.places(pairs[name]) for name in IDS)
    days, weight = ints(pairs, "num_user_days").astype(np.float64), pairs["weight"].to_numpy()
    i, j = items.user_days[trigger], items.user_days[target]
    either = np.maximum(items.weight[trigger] + items.weight[target] - weight, weight)
    return {
        "cosine": days / np.sqrt(i * j),
        "jaccard": days / np.maximum(i + j - days, days),
        "lift": days * items.user_days.sum() / (i * j),
        "decayed_jaccard": np.divide(weight, either, out=np.zeros_like(weight), where=either > 0),
        "bm25": _bm25(days, items, trigger, target),
    }


def _bm25(count: Floats, items: ItemTotals, trigger: Ints, target: Ints) -> Floats:
    """Triggers as documents, targets as terms (Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond").

    The IDF is Lucene's: 1 is added inside the logarithm, as an item paired with over half of the triggers would get a negative one.
    """
    documents = items.pair_days > 0
    num = items.num_triggers[target]
    idf = np.log(1.0 + (documents.sum() - num + 0.5) / (num + 0.5))
    length = items.pair_days[trigger] / items.pair_days[documents].mean()
    scores: Floats = idf * count * (BM25_K1 + 1) / (count + BM25_K1 * (1 - BM25_B + BM25_B * length))
    return scores
