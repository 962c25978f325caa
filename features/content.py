"""The content vector: what an item is about, as numbers. It is fitted on what is known at the run date and has no memory of other nights.

A catalog that brings embeddings is taken at its word; next comes a sentence encoder, if the settings name one (features.sentences).
Otherwise an item is two blocks of TF-IDF terms (words and pairs of words of title, text; labels: category prefixes, tags, attributes), each
of unit length and then weighted, reduced by a truncated SVD (latent semantic analysis, Deerwester et al. 1990) with the randomized solver
of Halko et al. 2011. The same catalog gives equal bits.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from conf.settings import FeatureSettings
from conf.tables import ITEM_ANNOTATIONS
from features.sentences import SentenceEncoder

Terms = dict[str, float]
Floats = NDArray[np.float32]

_SCHEMA = "item_id string, content_vector array<float>"
_CONTENT = ("title", "text", "categories", "tags", "tag_weights", "attributes")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")  # scripts without spaces: a character is a term
_NOISE = 1e-5  # length below which the reduced vector of a unit row is rounding error (float32), not content
_SEED = 0
_LEVELS = re.compile(r"categories\[(\d+):\]")
_LENGTH = "length"  # key in the metadata of the column content_vector


@dataclass(frozen=True, kw_only=True)
class ContentModel:
    """A fitted reduction of V terms to D numbers.

    `vocabulary` maps a kind and term to its position; `idf` is (V,); `components` is (V, D'), D' <= D, zeros fill up.
    """

    vocabulary: dict[str, int]
    idf: Floats
    components: Floats
    num_dimensions: int
    word_weight: float
    label_weight: float


def withhold(frame: DataFrame, judge_fields: Sequence[str]) -> DataFrame:
    """The frame without what a judge reads, so that nothing downstream can: columns nulled (tag weights go with tags), paths cut.

    Args:
        frame: any of the columns of item_annotations.
        judge_fields: column names, or `categories[2:]` for the category levels behind the second.
    """
    fields, num_levels = _read_by_judges(frame, judge_fields)
    types = {column.name: column.type for column in ITEM_ANNOTATIONS.columns}
    nulled = {name: F.lit(None).cast(types[name]) for name in fields}
    if num_levels is not None:
        nulled["categories"] = F.slice("categories", 1, num_levels)
    return frame.withColumns(nulled)


def permute(annotations: DataFrame, judge_fields: Sequence[str]) -> DataFrame:
    """The annotations with what a judge reads dealt out anew among the rows: a model that is not shown it must not notice.

    Args:
        annotations: rows of item_annotations.
        judge_fields: as in `withhold`.
    """
    fields, cut = _read_by_judges(annotations, judge_fields)
    given = [*fields, *(["categories"] if cut is not None else [])]
    donors = annotations.select(*(F.col(name).alias(f"_{name}") for name in given), _place("item_id", seed=_SEED + 1))
    rows = annotations.withColumn("_place", _place("item_id", seed=_SEED)).join(donors, on="_place", how="inner")
    changed = {name: F.col(f"_{name}") for name in fields}
    if cut is not None:
        tail = F.slice("_categories", cut + 1, 1_000)
        whole = F.size("categories") >= cut  # a shorter path has no such levels to change
        changed["categories"] = F.when(whole, F.concat(F.slice("categories", 1, cut), tail)).otherwise(F.col("categories"))
    return rows.withColumns(changed).select(*annotations.columns)


def _read_by_judges(frame: DataFrame, judge_fields: Sequence[str]) -> tuple[list[str], int | None]:
    """Columns of the frame that judges read whole, and how many category levels they leave to others (None: all, or none)."""
    whole = sorted({*judge_fields, *(["tag_weights"] if "tags" in judge_fields else [])} & set(frame.columns))
    left = [int(found.group(1)) for field in judge_fields if (found := _LEVELS.fullmatch(field))]
    partly = left and "categories" in frame.columns and "categories" not in whole
    return whole, min(left) if partly else None


def _place(name: str, *, seed: int) -> Column:
    """Position of a row in an order by hash."""
    order = Window.orderBy(F.xxhash64(name, "event_timestamp", "created_timestamp", F.lit(seed)), name, "event_timestamp")
    return F.row_number().over(order).alias("_place")


def content_vectors(annotations: DataFrame, *, settings: FeatureSettings) -> DataFrame:
    """A unit vector per item; all zeros for an item without content.

    Own embeddings of the most common length are used when the catalog brings any. Otherwise the sentence encoder, if one is named, else
    terms: `content_dimensions` numbers each.

    Args:
        annotations: one row per item with the columns of item_annotations; read several times, so cache it.
        settings: dimensions, vocabulary, weights, judge_fields.

    Returns:
        item_id, content_vector array<float> of one length for all rows; `vector_length` tells it.
    """
    allowed = withhold(annotations, settings.judge_fields)
    length = _embedding_length(allowed)
    if length is not None:
        return allowed.select("item_id", _unit("embedding", length).alias("content_vector")).transform(_with_length(length))
    columns = allowed.select("item_id", *_CONTENT)
    if settings.sentence_model is not None:
        encoder = SentenceEncoder(settings.sentence_model)
        encoder.check()
        return columns.mapInArrow(partial(_encode_sentences, encoder=encoder), _SCHEMA).transform(_with_length(encoder.length))
    sampled = columns.where(_has_content()).orderBy(F.xxhash64("item_id"), "item_id").limit(settings.fit_max_items)
    model = fit_content(sampled.drop("item_id").toArrow(), settings=settings)
    shared = allowed.sparkSession.sparkContext.broadcast(model)  # tens of MB: once per worker, not once per task
    encoded = columns.mapInArrow(partial(_encode_batches, shared=shared), _SCHEMA)
    return encoded.transform(_with_length(settings.content_dimensions))


def vector_length(vectors: DataFrame) -> int:
    """Length of the vectors of a `content_vectors` frame, without running it."""
    return int(vectors.schema["content_vector"].metadata[_LENGTH])


def fit_content(items: pa.Table, *, settings: FeatureSettings) -> ContentModel:
    """Vocabulary, IDF and reduction.

    Terms are the `max_terms` most frequent over both blocks (ties by name), pairs of words only if two items share them; with these, names
    and set phrases, content alone has a fifth more recall on ifdb_games. idf = ln((1 + n) / (1 + df)) + 1, so that a term of every item
    still counts. A vocabulary no larger than the vector needs no reduction and is kept as it is.

    Args:
        items: the content columns of item_annotations, n rows in a fixed order.
        settings: dimensions, max_terms and weights.
    """
    words, labels = _terms(items)
    used = [(name, terms) for name, terms, weight in _weighted(words, labels, settings) if weight > 0]
    frequency = Counter((name, term) for name, documents in used for document in documents for term in document)
    shared = [key for key, count in frequency.items() if count > 1 or " " not in key[1] or key[0] == "label"]
    kept = sorted(shared, key=lambda key: (-frequency[key], key))[: settings.max_terms]
    ordered = sorted(kept)
    num_documents = np.float32(items.num_rows)
    counts = np.array([frequency[key] for key in ordered], dtype=np.float32)
    model = ContentModel(
        vocabulary={f"{name}:{term}": position for position, (name, term) in enumerate(ordered)},
        idf=np.log((1 + num_documents) / (1 + counts)) + 1,
        components=np.zeros((len(ordered), 0), dtype=np.float32),
        num_dimensions=settings.content_dimensions,
        word_weight=settings.title_weight,
        label_weight=settings.label_weight,
    )
    return _replace_components(model, _reduction(_matrix(words, labels, model), settings.content_dimensions))


def encode_content(items: pa.Table, model: ContentModel) -> Floats:
    """Vectors (N, D) of N items: unit rows, or zeros where no term of the item is in the vocabulary. A row depends on its item only."""
    words, labels = _terms(items)
    reduced = np.asarray(_matrix(words, labels, model) @ model.components, dtype=np.float32)  # (N, D')
    lengths = np.linalg.norm(reduced, axis=1, keepdims=True)
    unit = np.divide(reduced, lengths, out=np.zeros_like(reduced), where=lengths > _NOISE)
    return np.pad(unit, ((0, 0), (0, model.num_dimensions - unit.shape[1])))


def unit_rows(matrix: Any) -> Any:
    """A sparse matrix with rows of Euclidean length 1; zero rows stay zero. Takes a matrix without columns, which scikit-learn refuses."""
    from scipy import sparse

    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1), dtype=np.float64).ravel())
    inverse = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    return (sparse.diags_array(inverse.astype(matrix.dtype)) @ matrix).tocsr()


def _encode_batches(batches: Iterable[pa.RecordBatch], shared: Any) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield _with_vectors(batch, encode_content(pa.Table.from_batches([batch]), shared.value))


def _encode_sentences(batches: Iterable[pa.RecordBatch], encoder: SentenceEncoder) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield _with_vectors(batch, encoder.encode(pa.Table.from_batches([batch])))


def _with_vectors(batch: pa.RecordBatch, vectors: Floats) -> pa.RecordBatch:
    offsets = pa.array(np.arange(len(vectors) + 1, dtype=np.int32) * vectors.shape[1])
    column = pa.ListArray.from_arrays(offsets, pa.array(vectors.ravel()))
    return pa.RecordBatch.from_arrays([batch["item_id"], column], names=["item_id", "content_vector"])


def _with_length(length: int) -> Callable[[DataFrame], DataFrame]:
    return lambda vectors: vectors.withMetadata("content_vector", {_LENGTH: length})


def _has_content() -> Column:
    filled = [F.col(name).isNotNull() for name in _CONTENT if name != "tag_weights"]
    return F.greatest(*filled)


def _embedding_length(annotations: DataFrame) -> int | None:
    """The most common length of own embeddings (the shorter at a tie); None: there are none."""
    lengths = annotations.where(F.size("embedding") > 0).agg(F.mode(F.size("embedding"), deterministic=True)).first()
    return None if lengths is None or lengths[0] is None else int(lengths[0])


def _unit(name: str, length: int) -> Column:
    """The vector at unit length; zeros where it is null, zero or of another length."""
    values = F.transform(F.col(name), lambda x: x.cast("double"))
    norm = F.sqrt(F.aggregate(values, F.lit(0.0), lambda total, x: total + x * x))
    usable = (F.size(name) == length) & (norm > 0)
    zeros = F.array_repeat(F.lit(0.0).cast("float"), length)
    return F.when(usable, F.transform(values, lambda x: (x / norm).cast("float"))).otherwise(zeros)


def _terms(items: pa.Table) -> tuple[list[Terms], list[Terms]]:
    """Term frequencies of each item: words, and labels."""
    title, text, categories, tags, weights, attributes = (items[name].to_pylist() for name in _CONTENT)
    words = [_words(f"{a or ''} {b or ''}") for a, b in zip(title, text, strict=True)]
    labels = [_labels(*row) for row in zip(categories, tags, weights, attributes, strict=True)]
    return words, labels


def _words(text: str) -> Terms:
    """Lower-cased words and pairs of neighboring words, with damped frequency 1 + ln(count)."""
    words = _WORD.findall(text.lower())
    counts = Counter(words)
    counts.update(f"{left} {right}" for left, right in pairwise(words))
    return {term: 1.0 + float(np.log(count)) if count > 1 else 1.0 for term, count in counts.items()}


def _labels(
    categories: Sequence[str | None] | None,
    tags: Sequence[str | None] | None,
    weights: Sequence[float | None] | None,
    attributes: Sequence[tuple[str, str | None]] | None,
) -> Terms:
    """Every prefix of the category path and every attribute at frequency 1; tags at their weight over the item's largest."""
    path = [level for level in categories or [] if level is not None]
    labels = {"category=" + ">".join(path[: depth + 1]): 1.0 for depth in range(len(path))}
    labels |= {f"attribute={name}={value}": 1.0 for name, value in attributes or [] if value is not None}
    given = weights if tags is not None and weights is not None and len(weights) == len(tags) else [1.0] * len(tags or [])
    largest = max((weight or 0.0 for weight in given), default=0.0)
    for tag, weight in zip(tags or [], given, strict=True):
        if tag and weight and weight > 0:
            labels["tag=" + tag.lower()] = weight / largest
    return labels


def _weighted(words: list[Terms], labels: list[Terms], settings: FeatureSettings) -> list[tuple[str, list[Terms], float]]:
    return [("word", words, settings.title_weight), ("label", labels, settings.label_weight)]


def _matrix(words: list[Terms], labels: list[Terms], model: ContentModel) -> Any:
    """TF-IDF rows (N, V), sparse: two blocks of unit length times their weights, the whole of unit length."""
    from scipy import sparse

    word_rows = model.word_weight * unit_rows(_block("word", words, model))
    label_rows = model.label_weight * unit_rows(_block("label", labels, model))
    return unit_rows(sparse.csr_matrix(word_rows + label_rows))


def _block(name: str, documents: list[Terms], model: ContentModel) -> Any:
    """Frequencies times IDF of one kind of terms (N, V)."""
    from scipy import sparse

    pointers, positions, values = [0], [], []
    for document in documents:
        for term, frequency in document.items():
            position = model.vocabulary.get(f"{name}:{term}")
            if position is not None:
                positions.append(position)
                values.append(frequency)
        pointers.append(len(positions))
    index = np.array(positions, dtype=np.int64)
    weighted = np.array(values, dtype=np.float32) * model.idf[index]
    block = sparse.csr_matrix((weighted, index, np.array(pointers)), shape=(len(documents), len(model.idf)))
    block.sort_indices()  # sums run in one order, whatever the order of words in the text
    return block


def _reduction(matrix: Any, num_dimensions: int) -> Floats:
    """Right singular vectors (V, D') of the rows, D' = min(D, V, N); the identity where it would only rotate."""
    from sklearn.utils.extmath import randomized_svd
    from threadpoolctl import threadpool_limits

    if matrix.shape[1] <= num_dimensions:
        return np.eye(matrix.shape[1], dtype=np.float32)
    distinct = _distinct_rows(matrix)
    rank = min(num_dimensions, distinct.shape[0])
    with threadpool_limits(1):  # equal bits on any machine, and faster than two busy threads at 26 k rows
        _, singular, right = randomized_svd(distinct, n_components=rank, n_iter=4, random_state=_SEED)
    meaningful = singular > _NOISE * singular[0]
    return np.ascontiguousarray(right[meaningful].T, dtype=np.float32)


def _distinct_rows(matrix: Any) -> Any:
    """Each different row once, times the root of its count: the same right singular vectors, at 40 % of the rows in the demo catalog."""
    rows: dict[tuple[bytes, bytes], int] = {}
    counts: list[int] = []
    first: list[int] = []
    for row, (begin, end) in enumerate(pairwise(matrix.indptr)):
        group = rows.setdefault((matrix.indices[begin:end].tobytes(), matrix.data[begin:end].tobytes()), len(rows))
        if group == len(first):
            first.append(row)
            counts.append(0)
        counts[group] += 1
    return matrix[first].multiply(np.sqrt(np.array(counts, dtype=matrix.dtype))[:, None]).tocsr()


def _replace_components(model: ContentModel, components: Floats) -> ContentModel:
    return ContentModel(**{**vars(model), "components": components})
