"""Who says how relevant a neighbor is: the catalog's own taxonomy, its labels, or graded pairs.

A grade is a number in [0, 1] that a judge gives a pair of items. A judge is of use when the lists could not have learned from what it
looks at, so that it is asked about facts withheld from training; the words of a title, say, judge only how much titles overlap. Grades
are of the catalog as it was when the judge was made: they have no time.

Shapes: `N` items of the catalog, `P` pairs, `B` items, `T` triggers, `K` positions, `L` levels of the taxonomy, `V` labels, `D` documents
(one an item, `D = N`).
"""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array

from models.data import Bools, Floats, Ints

Values = npt.NDArray[np.float64]
Items = npt.NDArray[np.integer]
Document = Mapping[str, float]

_PAIRS_AT_ONCE = 250_000  # judged together: with 20 labels an item, three sparse matrices of 60 MB
_WORD = re.compile(r"\w+")


class Judge(ABC):
    """A symmetric or directed view on pairs of N items; a pair it knows nothing about has grade 0."""

    @property
    @abstractmethod
    def defined(self) -> Bools:
        """(N,) items the judge can say anything about; the others have grade 0 with everything."""

    @property
    def num_items(self) -> int:
        """`N`."""
        return len(self.defined)

    def grades(self, left: Items, right: Items) -> Values:
        """Graded relevance of pairs.

        Args:
            left: (P,) item indices; -1, or N and above (items the catalog did not know), have grade 0.
            right: (P,) likewise.

        Returns:
            (P,) in [0, 1]; 0 for an item with itself, which is nobody's neighbor.
        """
        known = self._known(left) & self._known(right) & (left != right)
        found = np.zeros(len(left))
        if known.any():
            found[known] = self._grades(left[known], right[known])
        return found

    def rows(self, items: Items) -> Floats:
        """Grades against the whole catalog.

        Args:
            items: (B,) item indices; -1, or N and above, have a row of zeros.

        Returns:
            (B, N) in [0, 1], `grades` rounded to float32; the own cell is 0. The caller bounds B.
        """
        known = np.flatnonzero(self._known(items))
        found = np.zeros((len(items), self.num_items), dtype=np.float32)
        if len(known):
            found[known] = self._rows(items[known])
            found[known, items[known]] = 0.0
        return found

    def _known(self, items: Items) -> Bools:
        return (items >= 0) & (items < self.num_items)

    @abstractmethod
    def _grades(self, left: Items, right: Items) -> Values:
        """`grades` of at least one pair, each of two different items of the catalog."""

    @abstractmethod
    def _rows(self, items: Items) -> Floats:
        """`rows` of at least one item, all of the catalog; the own cells may hold anything."""


@dataclass(frozen=True, kw_only=True)
class TaxonomyJudge(Judge):
    """Two items are as relevant as their category paths run together: level_grades[shared levels - 1], 0 if not even the first is shared.

    Attributes:
        codes: (N, L) a code per level that stands for the whole path down to it, -1 beyond the path's end.
        level_grades: grade of 1, 2, ... shared levels.

    Raises:
        ValueError: a path is deeper than there are grades, or a grade is outside [0, 1].
    """

    codes: Ints
    level_grades: Sequence[float]

    def __post_init__(self) -> None:
        depth = int((self.codes >= 0).sum(axis=1).max(initial=0))
        if depth > len(self.level_grades):
            raise ValueError(
                f"found paths of {depth} levels in codes and level_grades of {len(self.level_grades)} levels {tuple(self.level_grades)}; "
                "wanted a grade for each level: add grades or cut the paths"
            )
        _check_grades(np.asarray(self.level_grades, dtype=np.float64), "level_grades")

    @property
    def defined(self) -> Bools:
        """(N,) items with a category."""
        found: Bools = np.any(self.codes >= 0, axis=1)
        return found

    def _grades(self, left: Items, right: Items) -> Values:
        mine, other = self.codes[left], self.codes[right]
        grades: Values = self._by_depth()[((mine == other) & (mine >= 0)).sum(axis=1)]
        return grades

    def _rows(self, items: Items) -> Floats:
        depth = np.zeros((len(items), len(self.codes)), dtype=np.int8)
        for level in self.codes.T:  # a level at a time: (B, N, L) would be L times the answer
            mine = np.where(level[items] >= 0, level[items], -2)  # -2 equals nobody's end of path
            depth += mine[:, None] == level
        return self._by_depth().astype(np.float32)[depth]

    def _by_depth(self) -> Values:
        """(levels + 1,) grade of 0, 1, ... shared levels."""
        return np.array([0.0, *self.level_grades])


@dataclass(frozen=True, kw_only=True)
class LabelJudge(Judge):
    """Two items are as relevant as the cosine of their labels, in which rare labels weigh more.

    Attributes:
        vectors: (N, V) rows of unit length, or empty for an item without labels that tell anything.
    """

    vectors: csr_array

    @classmethod
    def from_documents(cls, documents: Sequence[Document | None], *, ignored: Sequence[str] = (), weighted: bool = True) -> Self:
        """Weigh labels by tf-idf: weight * ln(documents with a label / documents with this label), then rows of unit length.

        The idf is that of Spärck Jones (1972), unsmoothed: a label that every item carries tells nothing, and weighs nothing.

        Args:
            documents: (D,) labels with weights >= 0 of each item, None for none; labels that differ only in case are one label.
            ignored: regular expressions; labels that one of them matches as a whole, in any case, are dropped.
            weighted: False gives every label of a document weight 1, whatever it says.

        Raises:
            ValueError: a weight that counts is negative or not finite.
            re.error: an expression of `ignored` is none.
        """
        vectors = _label_weights(documents, ignored=ignored, weighted=weighted)
        num_labeled = np.count_nonzero(np.diff(vectors.indptr))
        num_documents = np.bincount(vectors.indices, minlength=vectors.shape[1])
        vectors.data *= np.log(num_labeled / num_documents[vectors.indices])
        vectors.eliminate_zeros()
        row = np.repeat(np.arange(len(documents)), np.diff(vectors.indptr))
        vectors.data /= np.sqrt(np.bincount(row, weights=vectors.data**2, minlength=len(documents)))[row]
        return cls(vectors=vectors)

    @property
    def defined(self) -> Bools:
        """(N,) items with a label that not every item carries."""
        return np.diff(self.vectors.indptr) > 0

    def _grades(self, left: Items, right: Items) -> Values:
        cosine = np.asarray(self.vectors[left].multiply(self.vectors[right]).sum(axis=1), dtype=np.float64)
        return np.minimum(cosine.ravel(), 1.0)  # equal rows can exceed 1 by a rounding error

    def _rows(self, items: Items) -> Floats:
        cosine = (self.vectors[items] @ self.vectors.T).astype(np.float32).toarray()
        return np.minimum(np.asarray(cosine, dtype=np.float32), np.float32(1.0))


@dataclass(frozen=True, kw_only=True)
class PairJudge(Judge):
    """Pairs that people or a language model have graded; any other pair has grade 0.

    Attributes:
        table: (N, N) grade of each graded pair, grades of 0 stored like any other; row = left item.
        symmetric: the table holds each pair in both directions.
    """

    table: csr_array
    symmetric: bool

    @classmethod
    def from_pairs(cls, left: Items, right: Items, grade: npt.NDArray[np.floating], *, num_items: int, symmetric: bool = True) -> Self:
        """Collect graded pairs; the grades of a pair that was graded more than once are averaged.

        Args:
            left: (P,) item indices. Pairs with an item that the catalog does not know, or of an item with itself, are left out.
            right: (P,) likewise.
            grade: (P,) in [0, 1].
            num_items: N.
            symmetric: a grade is of both directions; so a pair graded in either direction is one pair.

        Raises:
            ValueError: the arrays differ in length, or a grade is outside [0, 1].
        """
        if not len(left) == len(right) == len(grade):
            raise ValueError(f"found {len(left)} left items, {len(right)} right items and {len(grade)} grades; wanted one of each a pair")
        _check_grades(grade, "grade")
        kept = (np.minimum(left, right) >= 0) & (np.maximum(left, right) < num_items) & (left != right)
        row, column = left[kept].astype(np.int64), right[kept].astype(np.int64)
        if symmetric:
            row, column = np.minimum(row, column), np.maximum(row, column)
        pair, of = np.unique(row * num_items + column, return_inverse=True)
        mean = np.bincount(of, weights=grade[kept], minlength=len(pair)) / np.bincount(of, minlength=len(pair))
        row, column = np.divmod(pair, num_items)
        if symmetric:
            row, column, mean = np.concatenate([row, column]), np.concatenate([column, row]), np.tile(mean, 2)
        return cls(table=coo_array((mean, (row, column)), shape=(num_items, num_items)).tocsr(), symmetric=symmetric)

    @property
    def defined(self) -> Bools:
        """(N,) items of a graded pair, on either side."""
        found: Bools = np.diff(self.table.indptr) > 0
        found[self.table.indices] = True
        return found

    @property
    def num_pairs(self) -> int:
        """Different pairs that were graded, also with 0; the two directions of a symmetric judge are one pair."""
        return int(self.table.nnz) // (2 if self.symmetric else 1)

    def _grades(self, left: Items, right: Items) -> Values:
        return np.asarray(self.table[left, right], dtype=np.float64)

    def _rows(self, items: Items) -> Floats:
        return np.asarray(self.table[items].toarray(), dtype=np.float32)


def word_documents(titles: Sequence[str | None]) -> list[Document | None]:
    """Titles as documents of lower-cased words with their counts, for a LabelJudge that says how much titles overlap.

    Where the lists saw titles too, its grades are of the same source: they say no more than that.

    Args:
        titles: (N,).

    Returns:
        (N,), None where there is no word.
    """
    return [Counter(_WORD.findall(title.lower())) or None if title else None for title in titles]


def judged_lists(judge: Judge, triggers: Items, lists: Items) -> Values:
    """Grade each listed item for its trigger, a bounded number of pairs at a time.

    Args:
        judge: of N items.
        triggers: (T,) item indices.
        lists: (T, K) item indices, -1 for a missing position.

    Returns:
        (T, K) in [0, 1], NaN for missing positions; items or triggers that the judge's catalog does not know have 0.
    """
    width = lists.shape[1]
    judged = np.full(lists.shape, np.nan)
    step = max(1, _PAIRS_AT_ONCE // max(1, width))
    for start in range(0, len(lists), step):
        block = lists[start : start + step]
        found = judge.grades(np.repeat(triggers[start : start + step], width), block.ravel())
        judged[start : start + step] = np.where(block >= 0, found.reshape(block.shape), np.nan)
    return judged


def _label_weights(documents: Sequence[Document | None], *, ignored: Sequence[str], weighted: bool) -> csr_array:
    """(D, V) weight of each label that is not ignored; labels are lower-cased, weights of one that then occurs twice added."""
    codes: dict[str, int] = {}
    rows, columns, weights = [], [], []
    for row, document in enumerate(documents):
        for label, weight in (document or {}).items():
            if weighted and not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"found weight {weight} of label {label!r} of document {row}; wanted a finite number from 0")
            rows.append(row)
            columns.append(codes.setdefault(label.lower(), len(codes)))
            weights.append(float(weight))
    found = coo_array((np.array(weights), (np.array(rows, np.int64), np.array(columns, np.int64))), shape=(len(documents), len(codes)))
    labels = found.tocsr()  # adds up what stands in one cell
    if not weighted:
        labels.data[:] = 1.0
    labels.eliminate_zeros()
    patterns = [re.compile(pattern, re.IGNORECASE) for pattern in ignored]
    kept = [code for label, code in codes.items() if not any(pattern.fullmatch(label) for pattern in patterns)]
    return labels[:, np.array(kept, dtype=np.int64)]


def _check_grades(grades: npt.NDArray[np.floating], name: str) -> None:
    wrong = grades[~((grades >= 0) & (grades <= 1))]
    if len(wrong):
        raise ValueError(f"found {name} {wrong[:5].tolist()}, {len(wrong)} of {len(grades)} outside the range; wanted grades from 0 to 1")
