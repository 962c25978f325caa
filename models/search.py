"""Nearest items by inner product: exactly, or by an inverted file (IVF) that is accepted only if it finds what the exact search finds.

An IVF index groups the items around `nlist` centers and looks only into the `nprobe` groups nearest to a query. Which of the two a catalog
gets is decided by counting operations, not by timing, so that equal inputs give equal lists: see `estimate_search`. The recall of an IVF
index is then measured against the exact search on a sample of triggers; while it is too low the effort `nprobe` doubles, and where even a
fourth of the groups is not enough the exact search is used after all. Its vectors are halved to 16 bits, which proposes the same items
in half of the memory and time; no score that is published comes from it.

Shapes: `N` items, `B` queries, `V` vector length.
"""

import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np

from conf.settings import RetrievalSettings
from models.data import Bools, Floats, Ints
from models.eligibility import Pool
from models.ranking import Longs

_WIDER = 4  # times as many items are asked for where filters and limits left too few
_MOST_RESULTS = 8_000_000  # of one search: 12 bytes each
_RATE = 40e9  # floating-point operations a second and core that a flat scan of 64 to 128 dimensions reached
_SCATTER = 2.0  # an IVF scan costs about twice as much per item: short lists, results merged
_TRAINING_PER_LIST = 64  # vectors per center that k-means looks at
_TRAINING_ROUNDS = 10
_FIRST_EFFORT = 8
_SEED = 17
_ITEMS_PER_PART = 65_536
_WORTHWHILE = 3.0  # times faster by the estimate: below, a failed attempt would cost more than it may gain


@dataclass(frozen=True, kw_only=True)
class SearchEstimate:
    """What searching all triggers would cost: seconds on all cores, and MB of the mapped index that all tasks share."""

    num_items: int
    exact_seconds: float
    ivf_seconds: float
    exact_mb: float
    ivf_mb: float
    chosen: str

    def __str__(self) -> str:
        return (
            f"{self.num_items:,} items: exact about {self.exact_seconds:,.0f} s and {self.exact_mb:,.0f} MB, "
            f"IVF about {self.ivf_seconds:,.0f} s and {self.ivf_mb:,.0f} MB; chosen: {self.chosen}"
        )


def num_lists(num_items: int) -> int:
    """Groups of an IVF index: 4 sqrt(N)."""
    return max(1, int(4 * num_items**0.5))


def estimate_search(num_items: int, num_triggers: int, dimension: int, *, num_cores: int, settings: RetrievalSettings) -> SearchEstimate:
    """Operations of both searches over a rate; the choice is the settings', or where they leave it open the worthwhile one.

    Args:
        num_items: N that may be found.
        num_triggers: queries.
        dimension: V.
        num_cores: that search and train.
        settings: `search` exact, ivf or auto.
    """
    rate, groups = _RATE * num_cores, num_lists(num_items)
    exact = 2.0 * num_triggers * num_items * dimension
    training = (
        2.0 * _TRAINING_ROUNDS * min(num_items, _TRAINING_PER_LIST * groups) * groups * dimension + 2.0 * num_items * groups * dimension
    )
    probed = num_items * min(1.0, 4 * _FIRST_EFFORT / groups)
    ivf = training + _SCATTER * 2.0 * num_triggers * (groups + probed) * dimension
    worthwhile = "ivf" if exact > _WORTHWHILE * ivf else "exact"
    return SearchEstimate(
        num_items=num_items,
        exact_seconds=exact / rate,
        ivf_seconds=ivf / rate,
        exact_mb=num_items * dimension * 4 / 1e6,
        ivf_mb=(num_items * 2 + groups * 4) * dimension / 1e6 + num_items * 8 / 1e6,
        chosen=worthwhile if settings.search == "auto" else settings.search,
    )


@dataclass(frozen=True, kw_only=True)
class SearchReport:
    """What an index became: `exact` (recall 1, effort 0), or `ivf` with its recall against exact search and its effort nprobe."""

    method: str
    recall: float
    effort: int

    def __str__(self) -> str:
        if self.method == "ivf":
            return f"IVF, {self.effort} groups a query, recall {self.recall:.4f}"
        return "exact" if self.recall == 1 else f"exact, as IVF reached recall {self.recall:.4f} only"


def write_index(folder: Path, stem: str, vectors: Floats, items: Ints, *, queries: Floats, settings: RetrievalSettings) -> SearchReport:
    """Write the index of some items and which items its rows are.

    Args:
        folder: of the night's index.
        stem: of the file names.
        vectors: (A, V) of all items, mapped or in memory; no second copy of all is made.
        items: (N,) indices of those that may be found.
        queries: (B, V) a sample of triggers, on which recall is measured; all-zero ones do not count.
        settings: `search`, `min_search_recall` and `list_length`, which is the K of the recall.
    """
    np.save(folder / f"{stem}-items.npy", items.astype(np.int32))
    if not (len(items) and vectors.shape[1]):
        return SearchReport(method="exact", recall=1.0, effort=0)
    asked = np.ascontiguousarray(queries[np.any(queries, axis=1)], dtype=np.float32)
    dimension = vectors.shape[1]
    estimate = estimate_search(len(items), len(items), dimension, num_cores=os.cpu_count() or 1, settings=settings)
    index, report = None, SearchReport(method="exact", recall=1.0, effort=0)
    if estimate.chosen == "ivf" and len(asked):
        index, report = _ivf(vectors, items, asked, settings)
    if index is None:
        index = faiss.IndexFlatIP(dimension)
        for part in _parts(vectors, items):
            index.add(part)
    faiss.write_index(index, str(folder / f"{stem}.faiss"))
    return report


def _parts(vectors: Floats, items: Ints) -> Iterator[Floats]:
    """The vectors of some items, so many at a time that a copy does not matter."""
    for start in range(0, len(items), _ITEMS_PER_PART):
        yield np.ascontiguousarray(vectors[items[start : start + _ITEMS_PER_PART]], dtype=np.float32)


def _ivf(vectors: Floats, items: Ints, queries: Floats, settings: RetrievalSettings) -> tuple[Any, SearchReport]:
    """Train, fill, and raise the effort until the recall is reached; the report says exact where it is not."""
    groups, dimension = num_lists(len(items)), vectors.shape[1]
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dimension), dimension, groups, half, product, False)
    index.cp.niter, index.cp.seed, index.cp.min_points_per_centroid = _TRAINING_ROUNDS, _SEED, 1
    sample = np.random.default_rng(_SEED).permutation(len(items))[: _TRAINING_PER_LIST * groups]
    index.train(np.ascontiguousarray(vectors[items[np.sort(sample)]], dtype=np.float32))
    _fill(index, vectors, items)
    k = min(settings.list_length, len(items))
    wanted = _exact(vectors, items, queries, k)
    effort, recall = _FIRST_EFFORT, 0.0
    while recall < settings.min_search_recall and effort <= max(1, groups // 4):
        index.nprobe = effort
        found = index.search(queries, k)[1]
        recall = float(np.mean([len(np.intersect1d(mine, best)) / k for mine, best in zip(found, wanted, strict=True)]))
        effort *= 2
    if recall < settings.min_search_recall:
        return None, SearchReport(method="exact", recall=recall, effort=0)
    return index, SearchReport(method="ivf", recall=recall, effort=index.nprobe)


def _fill(index: Any, vectors: Floats, items: Ints) -> None:
    """Add all vectors to groups that have exactly the room: ever doubled ones would take up to twice the memory."""
    groups = np.concatenate([index.quantizer.search(part, 1)[1].ravel() for part in _parts(vectors, items)])
    lists = faiss.downcast_InvertedLists(index.invlists)
    for group, size in enumerate(np.bincount(groups, minlength=index.nlist).tolist()):
        lists.resize(group, size)
        lists.resize(group, 0)  # which keeps the room
    for start, part in enumerate(_parts(vectors, items)):
        mine = np.ascontiguousarray(groups[start * _ITEMS_PER_PART :][: len(part)])
        index.add_core(len(part), faiss.swig_ptr(part), None, faiss.swig_ptr(mine))


def _exact(vectors: Floats, items: Ints, queries: Floats, k: int) -> Longs:
    """(B, k) places among the items of the nearest ones."""
    scores, places, start = [], [], 0
    for part in _parts(vectors, items):
        score, place = faiss.knn(queries, part, min(k, len(part)), metric=faiss.METRIC_INNER_PRODUCT)
        scores.append(score)
        places.append(place + start)
        start += len(part)
    best = np.argsort(-np.hstack(scores), axis=1, kind="stable")[:, :k]
    return np.asarray(np.take_along_axis(np.hstack(places), best, axis=1), dtype=np.int64)


Chosen = Callable[[Longs, Ints, int], tuple[Bools, Bools]]
"""Places of b queries, their (b, w) items best first, k -> (b, w) what the list would hold, (b,) whether it has k."""


@dataclass(frozen=True, kw_only=True)
class ItemIndex:
    """An opened FAISS index and the items its rows are."""

    index: Any
    items: Ints

    @classmethod
    def open(cls, folder: Path, stem: str) -> Self:
        """Mapped, not read: processes that open it share its pages."""
        path = folder / f"{stem}.faiss"
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC) if path.exists() else None  # plain IO_FLAG_MMAP would copy
        return cls(index=index, items=np.asarray(np.load(folder / f"{stem}-items.npy", mmap_mode="r")))

    def search(self, queries: Floats, k: int) -> Ints:
        """(B, V) -> (B, at most k) items, -1 behind the end; all-zero queries find nothing."""
        k = min(k, len(self.items))
        if self.index is None or k <= 0:
            return np.empty((len(queries), 0), dtype=np.int32)
        wide = np.ascontiguousarray(queries)
        _, rows = self._everywhere(wide, k) if k == len(self.items) else self.index.search(wide, k)
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short):  # the groups that an IVF search looked into hold fewer
            rows[short] = self._everywhere(wide[short], k)[1]
        asked = np.any(queries, axis=1, keepdims=True)
        return np.where(asked, self.items[rows], np.int32(-1))

    def _everywhere(self, queries: Floats, k: int) -> Any:
        """A search that looks into every group."""
        if isinstance(self.index, faiss.IndexIVF):
            effort: Any = faiss.SearchParametersIVF()
            effort.nprobe = self.index.nlist
            return self.index.search(queries, k, params=effort)
        return self.index.search(queries, k)

    def search_until(
        self,
        queries: Floats,
        k: int,
        chosen: Chosen,
        *,
        first: Ints,
        vectors: Floats,
        pool: Callable[[int], Pool | None],
        limit: tuple[Ints, int] | None,
    ) -> Ints:
        """(B, V) -> (B, w) chosen items, -1 for none: at least k, or all that there are.

        After a usual search comes a wider one for the queries that found too few. What then is short has little to choose from: where a
        filter names it, the few are ranked alone, those of queries with the same few together; where a limit alone leaves few of each
        of few kinds, the best of each kind; else the search widens on.

        Args:
            queries: (B, V).
            k: chosen items wanted.
            chosen: which of a ranking's items the list would hold.
            first: (B, k + 1) of `search`.
            vectors: (A, V) of all items, mapped: those of a pool are read from it.
            pool: place of a query -> what it is left with.
            limit: (A,) kind of each item and how many of a kind may be chosen, where nothing else decides.
        """
        found = _Found(lists=[np.zeros(0, np.int32)] * len(queries), k=k, chosen=chosen)
        asked = np.flatnonzero(np.any(queries, axis=1))
        short = self._widened(queries, found.take(asked, first[asked]), found, widths=(_WIDER * k,))
        by_pool: dict[Hashable, tuple[Pool, list[int]]] = {}
        rest = []
        for place in short.tolist():
            mine = pool(place)
            if mine is None or mine.size > len(self.items) // _WIDER:
                rest.append(place)
            else:
                by_pool.setdefault(mine.name, (mine, []))[1].append(place)
        for mine, places in by_pool.values():
            self._within(queries, np.array(places), found, vectors, mine)
        left = np.array(rest, np.int64)
        if limit is not None and len(left):
            left = self._by_kind(queries, left, found, vectors, limit)
        self._widened(queries, left, found, widths=self._widths(_WIDER**2 * k, len(self.items)))
        return _padded(found.lists)

    def _by_kind(self, queries: Floats, places: Longs, found: "_Found", vectors: Floats, limit: tuple[Ints, int]) -> Longs:
        """The best of each kind, if there are few kinds; returns the queries that are left to do."""
        kind, at_most = limit[0][self.items], limit[1]
        kinds, sizes = np.unique(kind, return_counts=True)
        widths = np.minimum(sizes, np.where(kinds < 0, found.k, at_most) + 1)  # one more: the trigger
        if widths.sum() > _WIDER**2 * found.k:
            return places
        best, scores = [], []
        for one, width in zip(kinds.tolist(), widths.tolist(), strict=True):
            mine, tops, values = self.items[kind == one], [], []
            for start in range(0, len(mine), _ITEMS_PER_PART):
                part = mine[start : start + _ITEMS_PER_PART]
                score, rows = _nearest_rows(queries[places], np.ascontiguousarray(vectors[part], dtype=np.float32), min(width, len(part)))
                tops.append(part[rows])
                values.append(score)
            best.append(np.hstack(tops))
            scores.append(np.hstack(values))
        order = np.argsort(-np.hstack(scores), axis=1, kind="stable")
        found.take(places, np.take_along_axis(np.hstack(best), order, axis=1))
        return places[:0]

    @staticmethod
    def _widths(start: int, end: int) -> Iterator[int]:
        while start < end:
            yield start
            start *= _WIDER
        yield end

    def _widened(self, queries: Floats, short: Longs, found: "_Found", *, widths: Iterable[int]) -> Longs:
        """Ever wider searches for queries whose lists are short; returns those that still are."""
        for width in widths:
            if not len(short):
                break
            parts = np.array_split(short, -(-len(short) * width // _MOST_RESULTS) or 1)
            short = np.concatenate([found.take(part, self.search(queries[part], width)) for part in parts])
        return short

    def _within(self, queries: Floats, places: Longs, found: "_Found", vectors: Floats, pool: Pool) -> None:
        """Exact search among a pool's items."""
        items = np.intersect1d(pool.items(), self.items, assume_unique=True)
        some = np.ascontiguousarray(vectors[items], dtype=np.float32)
        for width in self._widths(_WIDER * found.k, len(items)):
            parts = np.array_split(places, -(-len(places) * width // _MOST_RESULTS) or 1)
            places = np.concatenate([found.take(part, items[_nearest_rows(queries[part], some, width)[1]]) for part in parts])


def _nearest_rows(queries: Floats, vectors: Floats, k: int) -> tuple[Floats, Longs]:
    """(B, k) scores and rows of the nearest vectors, best first."""
    if not len(queries) or not k:
        return np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    score, row = faiss.knn(np.ascontiguousarray(queries), vectors, k, metric=faiss.METRIC_INNER_PRODUCT)
    return score, np.asarray(row, np.int64)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What B queries have chosen so far: of a wider ranking, which begins with the narrower one, always the whole."""

    lists: list[Ints]
    k: int
    chosen: Chosen

    def take(self, places: Longs, ranked: Ints) -> Longs:
        """Choose from (b, w) ranked items of the queries at (b,) places; returns the places that are short of k."""
        held, enough = self.chosen(places, ranked, self.k)
        for place, items, mine in zip(places.tolist(), ranked, held, strict=True):
            self.lists[place] = items[mine]
        return places[~enough]


def _padded(rows: Sequence[Ints]) -> Ints:
    out = np.full((len(rows), max(map(len, rows), default=0)), -1, np.int32)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out
