"""`relevance_examples`: pairs of items and how relevant each is to the other, in [0,1], as known at the run date.

Which pairs: labelled ones, the nearest in content, the strongest co-engaged. Which grade, by order of trust: a person's (the latest), a
language model's, another source's, taxonomy and tags, and last the cosine of the content vectors (the teacher).

Taxonomy grade of items i and j. Every prefix of a category path and every tag weighs idf = ln(N / df), so that what all items share says
nothing. Categories: idf of the shared prefixes over the larger of the two paths' idf. Tags: cosine of weight * idf. The grade is the mean
of those two that are defined for both items; none is where a side has no categories (tags) or only such as every item has.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.errors import TableError
from conf.settings import FeatureSettings
from conf.tables import RELEVANCE_EXAMPLES
from features.content import unit_rows, withhold

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]

_PAIR_SCHEMA = "i int, j int"
_GRADED_NAMES = ("item_id", "other_item_id", "target", "source", "mined_by")
_GRADED_SCHEMA = ", ".join(f"{c.name} {c.type}" for c in RELEVANCE_EXAMPLES.columns if c.name in _GRADED_NAMES)
_ITEMS_PER_TASK = 8192
_TIE_DECIMALS = 5  # float32 products differ in the 6th digit with the order of summation
_SLACK = 8  # distinct vectors fetched beyond need, so that ties at the end are cut by rule and not by FAISS
_MINED_BY = ("label", "content", "co_engaged")  # what the pair is said to be here for, first one wins


@dataclass(frozen=True, kw_only=True)
class Taxonomy:
    """Categories and tags of N items in numbers.

    `paths` (N, L) holds the id of each category prefix, -1 beyond the path's end; `path_idf` the idf of an id, 0 for -1 (its last entry).
    `tags` (N, T) is sparse with unit rows, all zeros where an item has no telling tag.
    """

    paths: Ints
    path_idf: Floats
    tags: Any


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """What grading and mining know of N items, by item_index. `vectors` (N, D) has unit rows or zeros; `offered` marks catalog items."""

    item_ids: NDArray[np.object_]
    vectors: NDArray[np.float32]
    offered: NDArray[np.bool_]
    taxonomy: Taxonomy


@dataclass(frozen=True, kw_only=True)
class ContentGroups:
    """Items with equal vectors, G groups in order of their first item: a shop's texts repeat, and the search is over distinct ones.

    `vectors` (G, D); the members of group g are `members[starts[g]:starts[g + 1]]`, ascending.
    """

    vectors: NDArray[np.float32]
    members: Ints
    starts: Ints


def mine_examples(features: DataFrame, pairs: DataFrame, labels: DataFrame, *, settings: FeatureSettings, run_date: date) -> DataFrame:
    """Find pairs, grade them.

    A pair that no source can grade (an item without any content) is left out: unknown is not irrelevant. Labels of items or days beyond
    the run date are ignored.

    Args:
        features: item_features.
        pairs: co_engagement_pairs.
        labels: pair_relevance.
        settings: numbers of examples, judge_fields.
        run_date: the night.

    Returns:
        The columns of relevance_examples, one row per directed pair.
    """
    catalog = _read_catalog(withhold(features, settings.judge_fields))
    labels = labels.where(F.lit("pair_relevance" not in settings.judge_fields))
    context = features.sparkSession.sparkContext
    shared, groups = context.broadcast(catalog), context.broadcast(group_content(catalog))
    index = features.select("item_id", F.col("item_index").alias("i"))
    candidates = (
        _labelled(labels, index, run_date)
        .unionByName(_near(index, groups, settings.num_content_examples, len(catalog.item_ids)), allowMissingColumns=True)
        .unionByName(_co_engaged(pairs, index, settings.num_co_engaged_examples), allowMissingColumns=True)
    )
    graded = candidates.transform(_one_row_a_pair).mapInArrow(partial(_grade_batches, shared=shared), _GRADED_SCHEMA)
    return graded.withColumn("as_of", F.lit(run_date)).select(*RELEVANCE_EXAMPLES.column_names)


def make_taxonomy(
    categories: Sequence[Sequence[str] | None], tags: Sequence[Sequence[str] | None], weights: Sequence[Sequence[float] | None]
) -> Taxonomy:
    """Numbers of N items' category paths, tags and tag weights; null lists and null entries count as absent."""
    prefixes = [_prefixes(path) for path in categories]
    ids, idf = _idf(prefixes)
    paths = np.full((len(prefixes), max(map(len, prefixes), default=0)), -1, dtype=np.int64)
    for row, path in enumerate(prefixes):
        paths[row, : len(path)] = [ids[prefix] for prefix in path]
    return Taxonomy(paths=paths, path_idf=np.append(idf, 0.0), tags=_tag_rows(tags, weights))


def taxonomy_grades(taxonomy: Taxonomy, i: Ints, j: Ints) -> Floats:
    """Grades (P,) of P pairs in [0,1], NaN where neither categories nor tags tell."""
    left, right = taxonomy.paths[i], taxonomy.paths[j]  # (P, L)
    idf, other_idf = taxonomy.path_idf[left], taxonomy.path_idf[right]
    shared = (idf * (left == right)).sum(axis=1)
    own, other = idf.sum(axis=1), other_idf.sum(axis=1)
    by_path = _ratio(shared, np.maximum(own, other), defined=(own > 0) & (other > 0))
    tags, other_tags = taxonomy.tags[i], taxonomy.tags[j]  # (P, T)
    cosine = np.asarray(tags.multiply(other_tags).sum(axis=1)).ravel()
    by_tags = np.where((np.diff(tags.indptr) > 0) & (np.diff(other_tags.indptr) > 0), cosine, np.nan)
    both = np.stack([by_path, by_tags])
    known = ~np.isnan(both)
    return np.clip(_ratio(np.where(known, both, 0.0).sum(axis=0), known.sum(axis=0), defined=known.any(axis=0)), 0.0, 1.0)


def teacher_grades(vectors: NDArray[np.float32], i: Ints, j: Ints) -> Floats:
    """max(0, cosine) (P,) of P pairs, NaN where a vector is zero."""
    filled = np.asarray(vectors.any(axis=1))
    cosine = np.einsum("pd,pd->p", vectors[i], vectors[j], dtype=np.float64)
    return np.where(filled[i] & filled[j], np.clip(cosine, 0.0, 1.0), np.nan)


def group_content(catalog: Catalog) -> ContentGroups:
    """The catalog's items with content, grouped by equal vectors."""
    usable = np.flatnonzero(catalog.offered & catalog.vectors.any(axis=1))
    vectors = np.ascontiguousarray(catalog.vectors[usable])
    rows = vectors.view(np.dtype((np.void, vectors.dtype.itemsize * vectors.shape[1]))).ravel()
    _, first, group = np.unique(rows, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))  # groups in order of their first item
    group = rank[np.asarray(group)]
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=len(first)))]).astype(np.int64)
    return ContentGroups(vectors=vectors[np.sort(first)], members=usable[np.argsort(group, kind="stable")], starts=starts)


def nearest_in_content(groups: ContentGroups, queries: Ints, k: int) -> tuple[Ints, Ints]:
    """The k nearest items of every member of the queried groups, as pairs (i, j), by exact inner product (FAISS, one thread).

    Ties: among groups the one with the smaller first item, inside a group the members that follow i in a circle, so that many equal items
    do not all point at the same few.
    """
    import faiss

    faiss.omp_set_num_threads(1)  # one per Spark task: more was a third slower
    if len(queries) == 0 or k == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    fetched = min(k + 1 + _SLACK, len(groups.vectors))
    scores, found = faiss.knn(groups.vectors[queries], groups.vectors, fetched, metric=faiss.METRIC_INNER_PRODUCT)
    order = np.lexsort((found, -np.round(scores, _TIE_DECIMALS)), axis=1)
    found = np.take_along_axis(found, order, axis=1)
    chosen = [
        (item, _chosen(groups, near, query=query, item=item, k=k))
        for query, near in zip(queries, found, strict=True)
        for item in _members(groups, query)
    ]
    left = np.repeat([item for item, _ in chosen], [len(others) for _, others in chosen])
    return left, np.concatenate([others for _, others in chosen])


def _members(groups: ContentGroups, group: int) -> Ints:
    return groups.members[groups.starts[group] : groups.starts[group + 1]]


def _chosen(groups: ContentGroups, near: Ints, *, query: int, item: int, k: int) -> Ints:
    """The first k members of the near groups but the item itself; each group is read in a circle from a place that depends on the item."""
    parts, need = [], k
    for group in near:
        members = _members(groups, group)
        own = group == query
        begin = int(np.searchsorted(members, item)) + 1 if own else item % len(members)
        taken = min(need, len(members) - own)
        parts.append(members[(begin + np.arange(taken)) % len(members)])
        need -= taken
        if need == 0:
            break
    return np.concatenate(parts)


def _read_catalog(features: DataFrame) -> Catalog:
    """Collect what grading needs, by item_index.

    Raises:
        TableError: item_index does not count from 0 without gaps.
    """
    columns = ("item_id", "item_index", "content_vector", "in_catalog", "categories", "tags", "tag_weights")
    rows = features.select(*columns).orderBy("item_index").toArrow().combine_chunks()
    num_items = rows.num_rows
    if not np.array_equal(rows["item_index"].to_numpy(), np.arange(num_items)):
        raise TableError(f"item_features has {num_items} rows whose item_index is not 0..{num_items - 1}; run build_features again")
    values = rows["content_vector"].combine_chunks().flatten().to_numpy()
    return Catalog(
        item_ids=rows["item_id"].to_numpy(),
        vectors=values.astype(np.float32).reshape(num_items, -1 if num_items else 1),
        offered=rows["in_catalog"].to_numpy(),
        taxonomy=make_taxonomy(rows["categories"].to_pylist(), rows["tags"].to_pylist(), rows["tag_weights"].to_pylist()),
    )


def _labelled(labels: DataFrame, index: DataFrame, run_date: date) -> DataFrame:
    """Columns i, j, mined, grade, source: per directed pair the latest label of its most trusted source."""
    source = F.lower("source")
    trust = F.when(source == "human", 0).when(source == "llm", 1).otherwise(2)
    known = labels.where(F.col("rated_at") < F.lit(run_date + timedelta(days=1)).cast("timestamp"))
    # of equally old labels of equal trust the one with the smallest name, then the higher grade
    order = [trust, F.col("rated_at").desc(), source, F.col("grade").desc()]
    best = Window.partitionBy("item_id", "other_item_id").orderBy(*order)
    first = known.withColumn("_rank", F.row_number().over(best)).where(F.col("_rank") == 1)
    numbered = _numbered(first.withColumnsRenamed({"item_id": "left", "other_item_id": "right"}), index)
    return numbered.where(F.col("i") != F.col("j")).select("i", "j", _mined("label"), "grade", source.alias("source"))


def _near(index: DataFrame, groups: Any, num_examples: int, num_items: int) -> DataFrame:
    """Columns i, j, mined: nearest items in content."""
    tasks = max(1, -(-num_items // _ITEMS_PER_TASK))  # explicit, as adaptive execution would put these few bytes in one task
    search = partial(_search_batches, groups=groups, num_examples=num_examples)
    return index.select("i").repartition(tasks, "i").mapInArrow(search, _PAIR_SCHEMA).select("i", "j", _mined("content"))


def _co_engaged(pairs: DataFrame, index: DataFrame, num_examples: int) -> DataFrame:
    """Columns i, j, mined: strongest co-engaged items per trigger."""
    strongest = Window.partitionBy("left").orderBy(F.col("weight").desc(), "right")
    directed = pairs.select(F.col("trigger_item_id").alias("left"), F.col("target_item_id").alias("right"), "weight")
    kept = directed.withColumn("_rank", F.row_number().over(strongest)).where(F.col("_rank") <= num_examples)
    return _numbered(kept, index).select("i", "j", _mined("co_engaged"))


def _mined(by: str) -> Column:
    return F.lit(_MINED_BY.index(by)).alias("mined")


def _numbered(pairs: DataFrame, index: DataFrame) -> DataFrame:
    """Pairs by ids `left`, `right` with their item indexes i, j; pairs of unknown items drop out."""
    left = index.select(F.col("item_id").alias("left"), "i")
    right = index.select(F.col("item_id").alias("right"), F.col("i").alias("j"))
    return pairs.join(left, on="left", how="inner").join(right, on="right", how="inner")


def _one_row_a_pair(candidates: DataFrame) -> DataFrame:
    """Only the labelled row of a pair carries grade and source, so that max finds them."""
    return candidates.groupBy("i", "j").agg(F.min("mined").alias("mined"), F.max("grade").alias("grade"), F.max("source").alias("source"))


def _search_batches(batches: Iterable[pa.RecordBatch], groups: Any, num_examples: int) -> Iterator[pa.RecordBatch]:
    """Each batch of items searches for the groups whose first member it holds."""
    content: ContentGroups = groups.value
    firsts = content.members[content.starts[:-1]]  # ascending
    for batch in batches:
        queries = np.flatnonzero(np.isin(firsts, batch["i"].to_numpy()))
        left, right = nearest_in_content(content, queries, num_examples)
        yield pa.RecordBatch.from_arrays([pa.array(left.astype(np.int32)), pa.array(right.astype(np.int32))], names=["i", "j"])


def _grade_batches(batches: Iterable[pa.RecordBatch], shared: Any) -> Iterator[pa.RecordBatch]:
    catalog: Catalog = shared.value
    for batch in batches:
        i, j = (batch[name].to_numpy().astype(np.int64) for name in ("i", "j"))
        label = batch["grade"].to_numpy(zero_copy_only=False)  # null is NaN here
        by_taxonomy, by_teacher = taxonomy_grades(catalog.taxonomy, i, j), teacher_grades(catalog.vectors, i, j)
        cases = [~np.isnan(label), ~np.isnan(by_taxonomy), ~np.isnan(by_teacher)]
        source = np.select(cases, [np.asarray(batch["source"].to_pylist(), dtype=object), "taxonomy", "teacher"], default="")
        keep = np.logical_or.reduce(cases)
        mined = np.array(_MINED_BY, dtype=object)[batch["mined"].to_numpy()]
        columns = [catalog.item_ids[i], catalog.item_ids[j], np.select(cases, [label, by_taxonomy, by_teacher]), source, mined]
        yield pa.RecordBatch.from_arrays([pa.array(column[keep]) for column in columns], names=list(_GRADED_NAMES))


def _prefixes(path: Sequence[str | None] | None) -> list[tuple[str, ...]]:
    levels = [level.lower() for level in path or [] if level is not None]
    return [tuple(levels[: depth + 1]) for depth in range(len(levels))]


def _idf(documents: Sequence[Iterable[Hashable]]) -> tuple[dict[Any, int], Floats]:
    """Position by term, in order of first use, and ln(N / df) over the N documents that are not empty."""
    frequency: Counter[Any] = Counter(term for document in documents for term in document)
    num_documents = sum(map(bool, documents))
    counts = np.fromiter(frequency.values(), dtype=np.float64, count=len(frequency))
    return {term: position for position, term in enumerate(frequency)}, np.log(num_documents / counts)


def _tag_rows(tags: Sequence[Sequence[str] | None], weights: Sequence[Sequence[float] | None]) -> Any:
    """Unit rows of weight * idf (N, T), sparse; a tag that every tagged item has is left out."""
    from scipy import sparse

    documents = [_tag_weights(*row) for row in zip(tags, weights, strict=True)]
    ids, idf = _idf(documents)
    cells = [(row, ids[tag], weight * idf[ids[tag]]) for row, document in enumerate(documents) for tag, weight in document.items()]
    rows, columns, values = zip(*cells, strict=True) if cells else ((), (), ())
    matrix = sparse.csr_matrix((np.array(values, dtype=np.float64), (rows, columns)), shape=(len(documents), len(ids)))
    matrix.eliminate_zeros()
    return unit_rows(matrix)


def _tag_weights(tags: Sequence[str] | None, weights: Sequence[float] | None) -> dict[str, float]:
    """Lower-cased tags with weight > 0; without weights all weigh 1."""
    given = weights if weights is not None and tags is not None and len(weights) == len(tags) else [1.0] * len(tags or [])
    return {tag.lower(): weight for tag, weight in zip(tags or [], given, strict=True) if tag and weight and weight > 0}


def _ratio(numerator: Floats, denominator: Floats, *, defined: NDArray[np.bool_]) -> Floats:
    """Quotient where defined, NaN elsewhere."""
    quotient: Floats = np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=defined)
    return quotient
