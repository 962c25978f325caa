"""Retrieval: every head's neighbor list and the merged one, for a block of trigger items at a time.

`build_index` lays everything a night's lists are made from into one folder of memory-mappable files; `Retriever` opens it in any number of
processes, which then share one copy in memory. Candidates of a trigger:

    counted pairs (the heaviest)  +  items that its users know too (models.user_level)  +  nearest targets of every head (FAISS)
    +  nearest in content  +  the most popular items

never the trigger itself, never an ineligible item, nor one that a filter or limit of the list refuses (models.eligibility): a search goes
on until the list is full. A head's list is the best of its own candidates by its score, and is never filled with anything else. The
engagement list is ordered by p(j given i): there the scorer (models.scorer) puts together what the head has generalized and what the counts
have memorized. It chooses among all candidates, as the merged list (models.merge) does: what only content proposes may be likely, too
(docs/decisions/0015-candidates-by-content.md). FAISS only proposes: scores are computed here, one way for all candidates, so that equal
vectors have equal scores and ties fall by item index. Counts and weights are decayed as of the run date.

Shapes: `N` items (row = item_index, ascending by item_id), `B` triggers, `M` candidates of all of them in one flat list (models.ranking),
`R` neighbors of a head's lists, `V` vector length, `C` content dimensions, `L` category levels.
"""

import json
import shutil
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from conf.errors import TableError, TrainingError
from conf.settings import RetrievalSettings
from models.data import LOG_AGE, Bools, Floats, Ints, Sparse
from models.eligibility import CATEGORY, FilterColumn, FilterColumns, Pool, Rules
from models.factorization import log_popularity
from models.kept import KeptCandidates
from models.list_rows import list_rows
from models.merge import DEFAULT_SCOPE, CandidateSet, FillOrder, Policies, Policy, merge_candidates
from models.ranking import Longs, best_per_segment, ends, segments
from models.scorer import Scorer, candidate_features, log_softmax
from models.search import ItemIndex, SearchReport, write_index
from models.user_level import UserLevel

ENGAGEMENT, RELEVANCE, MERGED = "engagement", "relevance", "merged"
COUNTS, USERS, CONTENT, POPULARITY = "counts", "users", "content", "popularity"
_NUM_SAMPLED = 256  # triggers on which the recall of a search is measured
_SOURCE_BITS = 16  # of a packed candidate key: counts, users, content, popularity, category and up to MOST_HEADS heads
_META = "meta.json"


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Counted pairs of B triggers; trigger b owns `indptr[b]:indptr[b + 1]`.

    Attributes:
        indptr: (B + 1,) offsets.
        target: (P,) item indices, each at most once per trigger.
        weight: (P,) decayed co-engagement as of the run date.
        num_user_days: (P,) undecayed count.
    """

    indptr: Longs
    target: Ints
    weight: Floats
    num_user_days: Longs

    def part(self, start: int, stop: int) -> Self:
        """The pairs of triggers start to stop."""
        low, high = self.indptr[start], self.indptr[stop]
        return type(self)(
            indptr=self.indptr[start : stop + 1] - low,
            target=self.target[low:high],
            weight=self.weight[low:high],
            num_user_days=self.num_user_days[low:high],
        )


# --- building ---


def build_index(
    folder: Path,
    *,
    item_ids: Sequence[str] | pa.Array,
    head_vectors: Mapping[str, tuple[Floats, Floats]],
    content: Floats,
    popularity_p: Floats,
    eligible: Bools,
    new: Bools,
    category_codes: Ints,
    trends: Floats,
    user_level: UserLevel,
    category_names: Sequence[str],
    tags: FilterColumn,
    filters: FilterColumns,
    scorer_file: Path | None,
    settings: RetrievalSettings,
) -> dict[str, SearchReport]:
    """Write everything lists are made from; returns how each head, and content, is searched.

    A `Retriever` of an index that was there keeps what it has mapped: the folder is made beside it, and takes its place when it is whole.

    Args:
        folder: created, or replaced.
        item_ids: (N,) in index order.
        head_vectors: per head (N, V) trigger and (N, V) target vectors; engagement and relevance among them.
        content: (N, C) unit rows, zeros for an item without content.
        popularity_p: (N,) decayed user-days or any multiple of them, 0 for an item never engaged with; floored as in training.
        eligible: (N,) may be a neighbor.
        new: (N,) hardly anybody has engaged with it yet.
        category_codes: (N, L) a code per level that stands for the whole path down to it, -1 for none.
        trends: (N, S) of `models.data.item_trends` as of the run date.
        user_level: as of the run date.
        category_names: a name per code.
        tags: of the N items, for reasons.
        filters: of the N items.
        scorer_file: written by `Scorer.save`; without one the fixed mixture.
        settings: how to search.

    Raises:
        TrainingError: a head is missing, shapes disagree, or a vector is not finite.
    """
    per_item = {"content": content, "popularity_p": popularity_p, "eligible": eligible, "new": new, "category_codes": category_codes}
    _check(len(item_ids), head_vectors, **per_item, trends=trends)
    place, folder = folder, _beside(folder)
    informed = (content != 0).any(axis=1) | (popularity_p > 0)
    sample = np.sort(np.random.default_rng(0).permutation(len(eligible))[:_NUM_SAMPLED])
    reports = {}
    for number, (name, (trigger, target)) in enumerate(head_vectors.items()):
        items = _write_head(folder, f"head-{number}", trigger, target, eligible, informed, engagement=name == ENGAGEMENT)
        reports[name] = write_index(folder, f"head-{number}", target, items, queries=trigger[sample], settings=settings)
    _save(folder, "content", content)
    items = np.flatnonzero(eligible & (content != 0).any(axis=1)).astype(np.int32)
    reports[CONTENT] = write_index(folder, "content", content, items, queries=content[sample], settings=settings)
    _save_per_item(folder, popularity_p, eligible, category_codes)
    _save(folder, "new", new)
    _save(folder, "trends", trends)
    user_level.save(folder)
    filters.save(folder)
    ids = pa.array(item_ids, pa.string()) if not isinstance(item_ids, pa.Array) else item_ids.cast(pa.string())
    _save_texts(folder, "item_ids", ids)
    _save_texts(folder, "category_names", pa.array(category_names, pa.string()))
    _save(folder, "tags", tags.codes)
    _save_texts(folder, "tag_names", pa.array(tags.values, pa.string()))
    if scorer_file is not None:
        Scorer.load(scorer_file).save(folder / "scorer.json")
    meta = {"heads": list(head_vectors), "has_scorer": scorer_file is not None}
    (folder / _META).write_text(json.dumps(meta))
    _take_place(folder, place)
    return reports


def _beside(place: Path) -> Path:
    """An empty folder, whatever a killed night has left there."""
    folder = place.with_name(f"{place.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _take_place(folder: Path, place: Path) -> None:
    """Files that somebody has mapped stay until nobody has."""
    before = place.with_name(f"{place.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if place.exists():
        place.rename(before)
    folder.rename(place)
    shutil.rmtree(before, ignore_errors=True)


def _save_per_item(folder: Path, popularity_p: Floats, eligible: Bools, category_codes: Ints) -> None:
    """Popularity, eligibility, categories, and the orders in which short lists are filled."""
    log_p = log_popularity(popularity_p.astype(np.float32))
    coarsest = category_codes[:, 0] if category_codes.shape[1] else np.full(len(log_p), -1, dtype=np.int32)
    order = FillOrder.build(log_p, eligible, coarsest)
    arrays = {
        "log_popularity": log_p,
        "categories": category_codes,
        "popular": order.popular,
        "fill_items": order.by_category,
        "fill_categories": order.category,
        "eligible": eligible,
    }
    for file, array in arrays.items():
        _save(folder, file, array)


def _check(num_items: int, head_vectors: Mapping[str, tuple[Floats, Floats]], **arrays: npt.NDArray[Any]) -> None:
    if missing := {ENGAGEMENT, RELEVANCE} - set(head_vectors):
        raise TrainingError(f"vectors of heads {sorted(missing)} are missing, have {sorted(head_vectors)}; add them under model.heads")
    for name, (trigger, target) in head_vectors.items():
        arrays |= {f"trigger vectors of head {name}": trigger, f"target vectors of head {name}": target}
    for name, array in arrays.items():
        if len(array) != num_items:
            raise TrainingError(f"{name} holds {len(array)} rows, wanted one for each of the {num_items} items; train on these items again")
        if not np.isfinite(array).all():
            raise TrainingError(f"{name} holds numbers that are not finite; lower training.learning_rate or check the content vectors")


def _write_head(folder: Path, stem: str, trigger: Floats, target: Floats, eligible: Bools, informed: Bools, *, engagement: bool) -> Ints:
    """Vectors, and per item whether it is blank: a head without popularity says nothing about an item it knows nothing of.

    Returns:
        The items to be found.
    """
    biased = np.array([engagement or target[:, -1].any()])
    blank_trigger, blank_target = (~biased & ~(informed & np.any(side[:, :-1], axis=1)) for side in (trigger, target))
    parts = {"trigger": trigger, "target": target, "blank": blank_trigger, "biased": biased}
    for part, array in parts.items():
        _save(folder, f"{stem}-{part}", array)
    return np.flatnonzero(eligible & ~blank_target).astype(np.int32)


def _save(folder: Path, stem: str, array: npt.NDArray[Any]) -> None:
    wide = array.astype(np.float32) if array.dtype == np.float64 else array
    np.save(folder / f"{stem}.npy", np.ascontiguousarray(wide))


def _save_texts(folder: Path, stem: str, texts: pa.Array) -> None:
    batch = pa.record_batch([texts], names=[stem])
    with pa.OSFile(str(folder / f"{stem}.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


# --- reading ---


def _load(folder: Path, stem: str) -> npt.NDArray[Any]:
    """A view of the file's pages: processes that open it share them."""
    path = folder / f"{stem}.npy"
    if not path.exists():
        raise TableError(f"found no {path}, which lists are made from: the index is of another release; run the night again")
    return np.asarray(np.load(path, mmap_mode="r"))


def _load_texts(folder: Path, stem: str) -> pa.StringArray:
    with pa.memory_map(str(folder / f"{stem}.arrow")) as source:
        return pa.ipc.open_file(source).get_batch(0).column(0)


def _nearest(flat: ItemIndex, vectors: Floats, queries: Floats, trigger: Ints, k: int, rules: Rules, names: Sequence[str]) -> Ints:
    """(B, w) nearest items, -1 for none: at least k that each of the named lists may hold, as far as there are so many."""
    first = flat.search(queries, k + 1)  # one more: the trigger may be its own nearest
    parts = []
    for name in rules.apart(names, by_limit=True):
        if not rules.restrict([name]):
            parts.append(first)
            continue

        def pool(place: int, name: str = name) -> Pool | None:
            return rules.pool(name, int(trigger[place]))

        limit = None if name in rules.filters else rules.limits.get(name)
        chosen = partial(_held, rules, name, trigger)
        parts.append(flat.search_until(queries, k, chosen, first=first, vectors=vectors, pool=pool, limit=limit))
    return np.hstack(parts)


def _held(rules: Rules, name: str, trigger: Ints, places: Longs, ranked: Ints, k: int) -> tuple[Bools, Bools]:
    """Of (b, w) ranked items of the triggers at (b,) places those that a list of k would hold, and whether it is full."""
    mine = trigger[places]
    row, column = np.nonzero((ranked >= 0) & (ranked != mine[:, None]))
    kept = np.flatnonzero(rules.offered(name, mine[row], row, ranked[row, column]))
    length = np.bincount(row[kept], minlength=len(places))
    kept = kept[np.arange(len(kept)) - ends(length)[row[kept]] < k]
    held = np.zeros(ranked.shape, np.bool_)
    held[row[kept], column[kept]] = True
    return held, length >= k


@dataclass(frozen=True, kw_only=True)
class _Head:
    """One head's part of the index; `biased`: popularity is in its scores, and counted pairs are among its candidates."""

    name: str
    trigger: Floats
    target: Floats
    blank: Bools
    biased: bool
    flat: ItemIndex

    @classmethod
    def open(cls, folder: Path, stem: str, name: str) -> Self:
        """Mapped, not read."""
        arrays = {part: _load(folder, f"{stem}-{part}") for part in ("trigger", "target", "blank")}
        return cls(name=name, **arrays, biased=bool(_load(folder, f"{stem}-biased")[0]), flat=ItemIndex.open(folder, stem))


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """Lists of one head for B triggers; trigger b owns `offsets[b]:offsets[b + 1]`, best first.

    Attributes:
        offsets: (B + 1,).
        neighbor: (R,) item indices.
        score: (R,) the head's score; in the merged list the policy's.
        sources: (R,) bit mask, bit n for `NeighborLists.source_names[n]`.
        num_user_days: (R,) of counted co-engagement, 0 where none is above the privacy minimum.
        num_users: (R,) distinct users who engaged with both at any time, 0 below the privacy minimum and where the list is only filled up.
        relevance: (R,) score of the relevance head, in [-1, 1].
        filled: (R,) offered only to fill up the merged list.
        shared_depth: (R,) category levels that trigger and neighbor share, from the coarsest.
    """

    offsets: Longs
    neighbor: Ints
    score: npt.NDArray[np.float64]
    sources: Ints
    num_user_days: Longs
    num_users: Ints
    relevance: npt.NDArray[np.float64]
    filled: Bools
    shared_depth: npt.NDArray[np.int8]


@dataclass(frozen=True, kw_only=True)
class NeighborLists:
    """Lists of B triggers: one `Neighbors` per head and one of the merged lists; `kept`: what the latter were made from, if asked for."""

    trigger: Ints
    source_names: tuple[str, ...]
    heads: Mapping[str, Neighbors]
    kept: Sequence[KeptCandidates] = ()


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """M candidates of a block's triggers, ascending by item within a trigger, and all that is known about them."""

    trigger: Ints  # (B,)
    offsets: Longs  # (B + 1,)
    segment: Longs  # (M,)
    item: Ints  # (M,)
    sources: Ints  # (M,)
    num_user_days: Longs  # (M,)
    num_users: Ints  # (M,)
    scores: Mapping[str, Floats]  # (M,) per head
    log_p: Floats  # (M,) the scorer's log p(j given i) over the trigger's candidates

    def only(self, kept: Bools) -> "_Pool":
        """Some of the (M,) candidates."""
        parts = {name: getattr(self, name)[kept] for name in ("segment", "item", "sources", "num_user_days", "num_users", "log_p")}
        scores = {head: score[kept] for head, score in self.scores.items()}
        offsets = ends(np.bincount(parts["segment"], minlength=len(self.trigger)))
        return replace(self, offsets=offsets, scores=scores, **parts)

    def narrow(self, position: Longs, offsets: Longs, score: Floats, filled: Bools, categories: Ints) -> Neighbors:
        """Lists made of the candidates at `position`."""
        item = self.item[position]
        return Neighbors(
            offsets=offsets,
            neighbor=item,
            score=score.astype(np.float64),
            sources=self.sources[position],
            num_user_days=self.num_user_days[position],
            num_users=self.num_users[position],
            relevance=_reported(self.scores[RELEVANCE][position]),
            filled=filled,
            shared_depth=_shared_depth(categories, self.trigger[segments(offsets)], item),
        )


def _reported(cosine: Floats) -> npt.NDArray[np.float64]:
    """Rounding may leave a cosine just outside [-1, 1]; readers were promised that it does not."""
    return np.clip(cosine, -1, 1).astype(np.float64)


def _shared_depth(categories: Ints, left: Ints, right: Ints) -> npt.NDArray[np.int8]:
    """(R,) number of levels in common: codes stand for whole paths, so equal codes at a level mean equal codes above it."""
    mine = categories[left]
    return np.asarray(((mine == categories[right]) & (mine >= 0)).sum(axis=1), dtype=np.int8)


@dataclass(frozen=True, kw_only=True)
class Retriever:
    """An opened index."""

    item_ids: pa.StringArray
    category_names: pa.StringArray
    tags: FilterColumn
    heads: Mapping[str, _Head]
    content: Floats
    content_flat: ItemIndex
    log_popularity: Floats
    trends: Floats
    user_level: UserLevel
    categories: Ints
    eligible: Bools
    new: Bools
    filters: FilterColumns
    fill_order: FillOrder
    scorer: Scorer

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map what `build_index` wrote; from here on FAISS uses one thread in this process, as each Spark task has one core.

        Raises:
            TableError: the index or the scorer there is of other code.
        """
        faiss.omp_set_num_threads(1)
        meta = json.loads((folder / _META).read_text())
        return cls(
            item_ids=_load_texts(folder, "item_ids"),
            category_names=_load_texts(folder, "category_names"),
            tags=FilterColumn(codes=_load(folder, "tags"), values=_load_texts(folder, "tag_names").to_pylist()),
            heads={name: _Head.open(folder, f"head-{number}", name) for number, name in enumerate(meta["heads"])},
            content=_load(folder, "content"),
            content_flat=ItemIndex.open(folder, "content"),
            log_popularity=_load(folder, "log_popularity"),
            trends=_load(folder, "trends"),
            user_level=UserLevel.open(folder),
            categories=_load(folder, "categories"),
            eligible=_load(folder, "eligible"),
            new=_load(folder, "new"),
            filters=FilterColumns.open(folder),
            fill_order=FillOrder(
                popular=_load(folder, "popular"), by_category=_load(folder, "fill_items"), category=_load(folder, "fill_categories")
            ),
            scorer=Scorer.load(folder / "scorer.json") if meta["has_scorer"] else Scorer.mixture(),
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """What the bits of `Neighbors.sources` mean, lowest first."""
        return (COUNTS, USERS, *self.heads, CONTENT, POPULARITY, CATEGORY)

    def to_arrow(self, lists: NeighborLists) -> pa.RecordBatch:
        """Lists as rows, with reasons: see models.list_rows."""
        names, codes = self.category_names, self.categories
        return list_rows(lists, item_ids=self.item_ids, category_names=names, categories=codes, tags=self.tags)

    def policies_for(self, policies: Mapping[str, Policy], trigger: Ints) -> Policies:
        """The policy of each of (B,) triggers among rows of merge_policy by scope."""
        scopes = [scope for scope in policies if scope != DEFAULT_SCOPE]
        chosen = self.filters.at(trigger).scope_of(scopes).tolist()
        return Policies.for_triggers(policies, [scopes[number] if number >= 0 else None for number in chosen])

    def rules(self, settings: RetrievalSettings) -> Rules:
        """Filters and limits of every list."""
        return Rules.of(settings, self.filters, (*self.heads, MERGED), categories=self.categories)

    def retrieve(
        self, trigger: Ints, counted: Counted, policies: Policies, *, settings: RetrievalSettings, keep: bool = False
    ) -> NeighborLists:
        """Lists of B triggers, computed `settings.block_size` at a time.

        Args:
            trigger: (B,) item indices; may be ineligible.
            counted: all their counted pairs: the row sums count, not only the heaviest.
            policies: of each trigger.
            settings: list length and candidates per source.
            keep: return what `remerge` needs, too.
        """
        size, rules = settings.block_size, self.rules(settings)
        parts = [
            self._block(trigger[a : a + size], counted.part(a, min(a + size, len(trigger))), policies.part(a, a + size), settings, rules)
            for a in range(0, max(len(trigger), 1), size)
        ]
        heads = {name: _concatenate([lists[name] for lists, _ in parts]) for name in (*self.heads, MERGED)}
        kept = tuple(candidates for _, candidates in parts) if keep else ()
        return NeighborLists(trigger=trigger, source_names=self.source_names, heads=heads, kept=kept)

    def remerge(self, kept: KeptCandidates, policies: Policies, *, settings: RetrievalSettings) -> NeighborLists:
        """The merged lists that `retrieve` makes under these policies, from what it kept."""
        counted = Counted(
            indptr=kept.counted_offsets,
            target=kept.target,
            weight=np.zeros(len(kept.target), dtype=np.float32),
            num_user_days=kept.num_user_days,
        )
        segment = segments(kept.offsets)
        _, num_user_days = self._counts_of(segment * len(self.eligible) + kept.item, counted)
        pool = _Pool(
            trigger=kept.trigger,
            offsets=kept.offsets,
            segment=segment,
            item=kept.item,
            sources=kept.sources,
            num_user_days=num_user_days,
            num_users=kept.num_users,
            scores={RELEVANCE: kept.relevance},
            log_p=kept.log_p,
        )
        lists = self._merged_lists(pool, self._candidate_set(pool), counted, policies, settings.list_length, self.rules(settings))
        return NeighborLists(trigger=kept.trigger, source_names=self.source_names, heads={MERGED: lists})

    def merge_under(self, trigger: Ints, counted: Counted, policies: Sequence[Policy], *, settings: RetrievalSettings) -> list[Neighbors]:
        """Merged lists of B triggers under each of several policies: candidates are found and scored once for all of them.

        Args:
            trigger: (B,) item indices.
            counted: all their counted pairs.
            policies: each for all triggers.
            settings: list length and candidates per source.
        """
        size, rules = settings.block_size, self.rules(settings)
        parts: list[list[Neighbors]] = []
        for start in range(0, max(len(trigger), 1), size):
            block, pairs = trigger[start : start + size], counted.part(start, min(start + size, len(trigger)))
            pool = self._mergeable(self._scored(block, pairs, settings, rules), rules)
            candidates = self._candidate_set(pool)
            rows = [Policies.same(policy, len(block)) for policy in policies]
            parts.append([self._merged_lists(pool, candidates, pairs, row, settings.list_length, rules) for row in rows])
        return [_concatenate(part) for part in zip(*parts, strict=True)]

    def _block(
        self, trigger: Ints, counted: Counted, policies: Policies, settings: RetrievalSettings, rules: Rules
    ) -> tuple[dict[str, Neighbors], KeptCandidates]:
        pool = self._scored(trigger, counted, settings, rules)
        lists = {name: self._head_lists(head, pool, settings.list_length, rules) for name, head in self.heads.items()}
        mergeable = self._mergeable(pool, rules)
        candidates = self._candidate_set(mergeable)
        merged = self._merged_lists(mergeable, candidates, counted, policies, settings.list_length, rules)
        kept = KeptCandidates(
            trigger=trigger,
            offsets=mergeable.offsets,
            item=mergeable.item,
            sources=mergeable.sources,
            log_p=candidates.log_p,
            relevance=candidates.relevance,
            num_users=mergeable.num_users,
            counted_offsets=counted.indptr,
            target=counted.target,
            num_user_days=counted.num_user_days,
        )
        return lists | {MERGED: merged}, kept

    def _bit(self, name: str) -> int:
        return self.source_names.index(name)

    # --- candidates ---

    def _candidates(self, trigger: Ints, counted: Counted, users: Sparse, settings: RetrievalSettings, rules: Rules) -> tuple[Longs, Ints]:
        """(M,) ascending keys row * N + item, and who proposed each."""
        packed = [self._packed(source, items, trigger) for source, items in self._proposals(trigger, settings, rules)]
        known = (users.indices, users.data, users.indptr.astype(np.int64))
        pairs = (counted.target, counted.weight, counted.indptr)
        counting = rules.apart([name for name, head in self.heads.items() if head.biased] + [MERGED])
        packed += [self._heaviest(COUNTS, trigger, *pairs, settings.num_candidates_counts, rules, name) for name in counting]
        using = rules.apart([ENGAGEMENT, MERGED])
        packed += [self._heaviest(USERS, trigger, *known, settings.num_candidates_users, rules, name) for name in using]
        found = np.sort(np.concatenate(packed))
        keys, source = found >> _SOURCE_BITS, (found & (1 << _SOURCE_BITS) - 1).astype(np.int32)
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        return keys[first], np.bitwise_or.reduceat(source, first) if len(first) else source

    def _proposals(self, trigger: Ints, settings: RetrievalSettings, rules: Rules) -> list[tuple[str, Ints]]:
        """Per source its (B, w) items, -1 where there are fewer."""
        near = settings.num_candidates_near
        found = []
        for name, head in self.heads.items():
            queries = np.where(head.blank[trigger][:, None], np.float32(0), head.trigger[trigger])  # which find nothing
            found.append((name, _nearest(head.flat, head.target, queries, trigger, near, rules, (name, MERGED))))
        if settings.num_candidates_content:
            near = settings.num_candidates_content
            found.append((CONTENT, _nearest(self.content_flat, self.content, self.content[trigger], trigger, near, rules, (MERGED,))))
        popular = self.fill_order.popular[: settings.num_candidates_popular]
        return [*found, (POPULARITY, np.broadcast_to(popular, (len(trigger), len(popular))))]

    def _heaviest(
        self, source: str, trigger: Ints, target: Ints, weight: Floats, indptr: Longs, width: int, rules: Rules, name: str
    ) -> Longs:
        """Keys of each trigger's `width` heaviest targets that list `name` may hold; indptr[b]:indptr[b + 1] are those of trigger[b]."""
        rows = segments(indptr)
        allowed = self.eligible[target] & (target != trigger[rows]) & rules.allowed(name, trigger[rows], target)
        best, _ = best_per_segment(np.where(allowed, weight, -np.inf).astype(np.float32), indptr, width)
        return self._pack(source, rows[best], target[best])

    def _packed(self, source: str, items: Ints, trigger: Ints) -> Longs:
        """Keys of (B, w) proposed items without gaps and without the trigger."""
        row, column = np.nonzero((items >= 0) & (items != trigger[:, None]))
        return self._pack(source, row, items[row, column])

    def _pack(self, source: str, row: Longs, item: Ints) -> Longs:
        return (row * len(self.eligible) + item) << _SOURCE_BITS | 1 << self._bit(source)

    def _scored(self, trigger: Ints, counted: Counted, settings: RetrievalSettings, rules: Rules) -> _Pool:
        """Candidates with their counts and every score; a counted pair says so even if another source proposed it."""
        users, num_users = self.user_level.rows_and_users(trigger)
        known = segments(users.indptr.astype(np.int64)) * len(self.eligible) + users.indices
        keys, sources = self._candidates(trigger, counted, users, settings, rules)
        segment, item = np.divmod(keys, len(self.eligible))
        offsets = ends(np.bincount(segment, minlength=len(trigger)))
        weight, num_user_days = self._counts_of(keys, counted)
        scores = {name: _dots(head.trigger[trigger], head.target, item, offsets) for name, head in self.heads.items()}
        row = segment.astype(np.int32)
        return _Pool(
            trigger=trigger,
            offsets=offsets,
            segment=segment,
            item=item.astype(np.int32),
            sources=sources | (num_user_days > 0).astype(np.int32) << self._bit(COUNTS),
            num_user_days=num_user_days,
            num_users=_looked_up(keys, known, num_users),
            scores=scores,
            log_p=self._log_p(
                row,
                trigger[row],
                item,
                scores[ENGAGEMENT],
                counts=(weight, _row_sums(counted.weight, counted.indptr)[row]),
                users=(_looked_up(keys, known, users.data), _row_sums(users.data, users.indptr)[row]),
            ),
        )

    def _counts_of(self, keys: Longs, counted: Counted) -> tuple[Floats, Longs]:
        """(M,) decayed weight and user-days of ascending keys, 0 where nothing is counted."""
        known = segments(counted.indptr) * len(self.eligible) + counted.target
        order = np.argsort(known, kind="stable")  # near-linear on the usual input, which ascends already
        return _looked_up(keys, known[order], counted.weight[order]), _looked_up(keys, known[order], counted.num_user_days[order])

    # --- lists ---

    def _head_lists(self, head: _Head, pool: _Pool, k: int, rules: Rules) -> Neighbors:
        """The best of all candidates by p(j given i) for engagement; of what this head's search found for others, and of counted pairs if
        popularity is in its scores.
        """
        mask = 1 << self._bit(head.name) | (1 << self._bit(COUNTS) if head.biased else 0)
        own = (pool.sources & mask).astype(np.bool_) | (head.name == ENGAGEMENT)
        if rules.restrict([head.name]):
            own &= rules.allowed(head.name, pool.trigger[pool.segment], pool.item)
        order_by = np.exp(pool.log_p) if head.name == ENGAGEMENT else pool.scores[head.name]
        score = np.where(own, order_by, -np.inf).astype(np.float32)
        position, offsets = best_per_segment(score, pool.offsets, rules.depth(head.name, k, pool.offsets))
        kept, offsets = rules.cut(head.name, offsets, pool.item[position], k)
        position = position[kept]
        return pool.narrow(position, offsets, score[position], np.zeros(len(position), dtype=np.bool_), self.categories)

    def _mergeable(self, pool: _Pool, rules: Rules) -> _Pool:
        """The candidates that the merged list may hold, p over these alone."""
        if not rules.restrict([MERGED]):
            return pool
        some = pool.only(rules.allowed(MERGED, pool.trigger[pool.segment], pool.item))
        return replace(some, log_p=log_softmax(some.log_p, some.segment.astype(np.int32))) if len(some.item) else some

    def _candidate_set(self, pool: _Pool) -> CandidateSet:
        return CandidateSet(
            offsets=pool.offsets,
            log_p=pool.log_p,
            relevance=pool.scores[RELEVANCE],
            log_popularity=self.log_popularity[pool.item],
            found_by_relevance=(pool.sources >> self._bit(RELEVANCE) & 1).astype(np.bool_),
            counted=pool.num_user_days > 0,
            new=self.new[pool.item],
        )

    def _merged_lists(self, pool: _Pool, candidates: CandidateSet, counted: Counted, policies: Policies, k: int, rules: Rules) -> Neighbors:
        merged = merge_candidates(candidates, policies, k=rules.depth(MERGED, k, pool.offsets))
        merged = merged.only(*rules.cut(MERGED, merged.offsets, pool.item[merged.position], k))
        lists = pool.narrow(merged.position, merged.offsets, merged.score, merged.filled, self.categories)
        return self._filled_up(lists, pool.trigger, counted, k, rules)

    def _log_p(
        self, row: Ints, trigger: Ints, item: Longs, head_score: Floats, *, counts: tuple[Floats, Floats], users: tuple[Floats, Floats]
    ) -> Floats:
        """(M,) from the features that the scorer was fitted on; counts and users: (M,) values and sums over all of the trigger's."""
        if not len(item):
            return np.zeros(0, dtype=np.float32)
        features = candidate_features(
            head_log_p=log_softmax(head_score, row),
            count=counts[0],
            count_row_sum=counts[1],
            user_level=users[0],
            user_level_row_sum=users[1],
            popularity_p=np.exp(self.log_popularity)[item],
            trends=self.trends[item],
            trigger_log_age=self.trends[trigger, LOG_AGE],
        )
        return self.scorer.log_probability(features, row)

    def _filled_up(self, lists: Neighbors, trigger: Ints, counted: Counted, k: int, rules: Rules) -> Neighbors:
        """Short lists with items of the category, then popular ones, appended; score 0, as nothing proposed them."""
        short = np.flatnonzero(np.diff(lists.offsets) < min(k, len(self.fill_order.popular)))
        empty = np.zeros(0, dtype=np.int32)
        items, sources = [empty] * len(trigger), [empty] * len(trigger)
        coarsest = self.categories[:, 0] if self.categories.shape[1] else None
        orders: dict[Hashable, FillOrder] = {}
        for row in short.tolist():
            listed, item = lists.neighbor[lists.offsets[row] : lists.offsets[row + 1]], int(trigger[row])
            category = -1 if coarsest is None else int(coarsest[item])
            admit = partial(rules.admit, MERGED, item) if rules.restrict([MERGED]) else None
            order = self._fill_order_of(item, k, rules, orders)
            items[row], num_category = order.fill(listed, trigger=item, coarsest=category, k=k, admit=admit)
            where = np.arange(len(items[row])) < num_category
            sources[row] = np.where(where, 1 << self._bit(CATEGORY), 1 << self._bit(POPULARITY)).astype(np.int32)
        extra = self._extra(trigger, counted, items, sources) if len(short) else None
        return lists if extra is None or not len(extra.neighbor) else _interleave(lists, extra)

    def _fill_order_of(self, trigger: int, k: int, rules: Rules, known: dict[Hashable, FillOrder]) -> FillOrder:
        """What may fill a trigger's merged list up, as far as its filters or its limit say so at once."""
        pool = rules.pool(MERGED, trigger)
        name = pool.name if pool else None
        if name not in known:
            whole = self.fill_order
            if pool is not None:
                known[name] = whole.narrowed(pool.items())
            elif MERGED in rules.limits and MERGED not in rules.filters:  # of k listed items and the trigger none comes a second time
                known[name] = whole.narrowed(rules.first_of_kind(MERGED, whole.popular, whole.category_of(whole.popular), 2 * k + 1))
            else:
                known[name] = whole
        return known[name]

    def _extra(self, trigger: Ints, counted: Counted, items: list[Ints], sources: list[Ints]) -> Neighbors:
        """(B,) items to append to each list, described like any neighbor."""
        offsets, item = ends(np.array([len(row) for row in items])), np.concatenate(items)
        segment, keys = segments(offsets), segments(offsets) * len(self.eligible) + item
        head = self.heads[RELEVANCE]
        return Neighbors(
            offsets=offsets,
            neighbor=item,
            score=np.zeros(len(item)),
            sources=np.concatenate(sources),
            num_user_days=self._counts_of(keys, counted)[1],
            num_users=np.zeros(len(item), dtype=np.int32),
            relevance=_reported(_dots(head.trigger[trigger], head.target, item, offsets)),
            filled=np.ones(len(item), dtype=np.bool_),
            shared_depth=_shared_depth(self.categories, trigger[segment], item),
        )


def _looked_up(keys: Longs, known: Longs, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(M,) values of keys, 0 where a key is not among the (P,) ascending known ones."""
    if not len(known):
        return np.zeros(len(keys), dtype=values.dtype)
    at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.where(known[at] == keys, values[at], values.dtype.type(0))


def _row_sums(values: Floats, indptr: npt.NDArray[np.integer]) -> Floats:
    """(B,) sums of each row's values."""
    row = segments(np.asarray(indptr, dtype=np.int64))
    return np.bincount(row, weights=values, minlength=len(indptr) - 1).astype(np.float32)


def _dots(queries: Floats, vectors: Floats, item: npt.NDArray[np.integer], offsets: Longs) -> Floats:
    """(B, V), (N, V), (M,) -> (M,) inner products of each trigger with its candidates.

    One trigger at a time through a reused buffer that stays in cache: one gather of all M rows would be memory-bound at several times
    the cost. einsum and not BLAS, whose last bits depend on a row's place: equal vectors must tie.
    """
    out = np.empty(len(item), dtype=np.float32)
    rows = np.empty((int(np.diff(offsets).max(initial=0)), vectors.shape[1]), dtype=np.float32)
    bounds = offsets.tolist()
    for query, start, stop in zip(queries, bounds[:-1], bounds[1:], strict=True):
        some = np.take(vectors, item[start:stop], axis=0, out=rows[: stop - start], mode="clip")  # clip: "raise" would copy once more
        np.einsum("ij,j->i", some, query, out=out[start:stop])
    return out


_PARTS = ("neighbor", "score", "sources", "num_user_days", "num_users", "relevance", "filled", "shared_depth")


def _concatenate(parts: Sequence[Neighbors]) -> Neighbors:
    """Lists of one block of triggers after the other."""
    offsets = ends(np.concatenate([np.diff(part.offsets) for part in parts]))
    return Neighbors(offsets=offsets, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _PARTS})


def _interleave(lists: Neighbors, extra: Neighbors) -> Neighbors:
    """Each trigger's extra neighbors behind its list."""
    order = np.argsort(np.concatenate([segments(lists.offsets), segments(extra.offsets)]), kind="stable")
    columns = {name: np.concatenate([getattr(lists, name), getattr(extra, name)])[order] for name in _PARTS}
    return Neighbors(offsets=lists.offsets + extra.offsets, **columns)
