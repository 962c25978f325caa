"""What each list may offer: filters and limits by the columns that source.items.columns.filters maps, for trigger and neighbor.

A filter admits or refuses a neighbor, a limit admits the first n of a kind in the order of the list. Values are codes, so that a task
maps them like the rest of the index. A scope is a coarsest category (`toys`), a value of a column (`market=de`), or `default`.

No trigger costs a look at every item: a filter names the items that it leaves to a trigger by the holders of the trigger's values
(`Rules.pool`), and a limit those that come first of their kind (`Rules.first_of_kind`).

Shapes: `N` items, `M` (trigger, neighbor) pairs, `W` values of the item that has most in a column.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from conf.settings import FilterSettings, RetrievalSettings
from models.data import Bools, Ints
from models.ranking import Longs, ends, segments

CATEGORY = "category"
_COARSEST = ""  # a column name that no table has
_META = "filters.json"


@dataclass(frozen=True, kw_only=True)
class FilterColumn:
    """One column: (N, W) codes, -1 behind an item's last value, and the value of each code."""

    codes: Ints
    values: Sequence[str]

    @classmethod
    def encode(cls, values: Sequence[Sequence[str] | None]) -> Self:
        """From N items' values."""
        known = sorted({value for some in values for value in some or ()})
        code = {value: number for number, value in enumerate(known)}
        codes = np.full((len(values), max((len(some) for some in values if some), default=0)), -1, np.int32)
        for row, some in enumerate(values):
            codes[row, : len(some or ())] = [code[value] for value in some or ()]
        return cls(codes=codes, values=known)

    @classmethod
    def rarest(cls, values: Sequence[Sequence[str] | None], most: int) -> Self:
        """From N items' values, at most some of each: those that the fewest items have, the rarest first."""
        counts = Counter(value for some in values for value in set(some or ()))
        return cls.encode([sorted(set(some or ()), key=lambda value: (counts[value], value))[:most] for some in values])

    @property
    def known(self) -> Bools:
        """(N,) the item has a value."""
        return np.asarray((self.codes >= 0).any(axis=1))

    def has(self, values: Iterable[str]) -> Bools:
        """(N,) the item has one of the values."""
        return np.asarray(np.isin(self.codes, [number for number, value in enumerate(self.values) if value in set(values)]).any(axis=1))

    @cached_property
    def _by_value(self) -> tuple[Longs, Ints]:
        """Offsets per value, and the items that have it, ascending."""
        item, place = np.nonzero(self.codes >= 0)
        code = self.codes[item, place]
        order = np.argsort(code, kind="stable")
        return ends(np.bincount(code, minlength=len(self.values))), item[order].astype(np.int32)

    @cached_property
    def without(self) -> Ints:
        """Items that have no value, ascending."""
        return np.flatnonzero(~self.known).astype(np.int32)

    def num_holders(self, codes: Sequence[int]) -> int:
        """How many items have one of some values, at most."""
        offsets, _ = self._by_value
        return int(sum(offsets[code + 1] - offsets[code] for code in codes))

    def holders(self, codes: Sequence[int]) -> Ints:
        """Items that have one of some values, ascending."""
        offsets, items = self._by_value
        parts = [items[offsets[code] : offsets[code + 1]] for code in codes]
        return parts[0] if len(parts) == 1 else np.unique(np.concatenate([*parts, items[:0]]))

    def shared(self, left: Ints, right: Ints) -> Bools:
        """(M,) items left and right have a value in common."""
        return np.asarray(self.shared_values(left, right).any(axis=1))

    def shared_values(self, left: Ints, right: Ints) -> Bools:
        """(M, W) which of item left's values item right has, too."""
        mine, other = self.codes[left], self.codes[right]
        return np.asarray(((mine[:, :, None] == other[:, None, :]) & (mine >= 0)[:, :, None]).any(axis=2))


@dataclass(frozen=True, kw_only=True)
class FilterColumns:
    """All columns that filters, limits and scopes read, as of the run date."""

    columns: Mapping[str, FilterColumn]
    as_of: date

    @classmethod
    def encode(cls, values: Mapping[str, Sequence[Sequence[str] | None]], *, coarsest: Sequence[str | None], as_of: date) -> Self:
        """From N items' values by column, and their coarsest category names."""
        given = {**values, _COARSEST: [None if name is None else [name] for name in coarsest]}
        return cls(columns={name: FilterColumn.encode(column) for name, column in given.items()}, as_of=as_of)

    def save(self, folder: Path) -> None:
        """Write codes as memory-mappable files."""
        for number, column in enumerate(self.columns.values()):
            np.save(folder / f"filter-{number}.npy", column.codes)
        values = {name: list(column.values) for name, column in self.columns.items()}
        (folder / _META).write_text(json.dumps({"as_of": self.as_of.isoformat(), "values": values}))

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Map what `save` wrote."""
        meta = json.loads((folder / _META).read_text())
        codes = [np.asarray(np.load(folder / f"filter-{number}.npy", mmap_mode="r")) for number in range(len(meta["values"]))]
        columns = {
            name: FilterColumn(codes=some, values=values) for (name, values), some in zip(meta["values"].items(), codes, strict=True)
        }
        return cls(columns=columns, as_of=date.fromisoformat(meta["as_of"]))

    def at(self, items: Ints) -> Self:
        """The same of some items only."""
        some = {name: FilterColumn(codes=column.codes[items], values=column.values) for name, column in self.columns.items()}
        return type(self)(columns=some, as_of=self.as_of)

    def in_scope(self, scope: str) -> Bools:
        """(N,) items that a scope other than `default` names; of a column that is not mapped: none."""
        column, equals, value = scope.partition("=")
        name, wanted = (column, value) if equals and column in self.columns else (_COARSEST, scope)
        return self.columns[name].has([wanted])

    def scope_of(self, scopes: Sequence[str]) -> Ints:
        """(N,) position of each item's scope, -1 for none: a column's value goes before a category, then the earlier scope wins."""
        chosen = np.full(len(self.columns[_COARSEST].codes), -1, np.int32)
        order = sorted(range(len(scopes)), key=lambda number: ("=" in scopes[number], -number))
        for number in order:  # later ones overwrite
            chosen[self.in_scope(scopes[number])] = number
        return chosen

    def passing(self, rule: FilterSettings) -> Bools:
        """(N,) neighbors that a filter which does not look at the trigger lets pass."""
        column = self.columns[rule.column]
        if rule.rule == "released":
            passes = column.has([value for value in column.values if _is_day(value) and value[:10] <= self.as_of.isoformat()])
        else:
            passes = column.has(rule.values) ^ (rule.rule == "none_of")
        return np.where(column.known, passes, rule.missing)

    def not_days(self, rule: FilterSettings) -> list[str]:
        """Values of a column of release days that are none; items with nothing else are not released."""
        return [value for value in self.columns[rule.column].values if rule.rule == "released" and not _is_day(value)]

    def everywhere(self, filters: Sequence[FilterSettings]) -> Bools:
        """(N,) items that may be offered in some list at all: those that pass every filter of all lists and triggers."""
        passes = np.ones(len(self.columns[_COARSEST].codes), np.bool_)
        for rule in filters:
            if not (rule.heads or rule.scopes or _looks_at_trigger(rule)):
                passes &= self.passing(rule)
        return passes


def _is_day(value: str) -> bool:
    if not re.match(r"\d{4}-\d\d-\d\d", value):  # fromisoformat takes 20240331 and week dates too
        return False
    try:
        date.fromisoformat(value[:10])
    except ValueError:
        return False
    return True


def _looks_at_trigger(rule: FilterSettings) -> bool:
    return rule.rule in ("shared", "different")


@dataclass(frozen=True, kw_only=True)
class _Filter:
    """A filter at work. `column`: compared between trigger and neighbor; else `passing` (N,) decides by the neighbor alone."""

    rule: FilterSettings
    column: FilterColumn | None
    passing: Bools
    ruled: Bools | None  # (N,) triggers; None: all

    @cached_property
    def _passing_items(self) -> Ints:
        return np.flatnonzero(self.passing).astype(np.int32)

    def pool(self, trigger: int) -> tuple[int, Hashable, Callable[[], Ints]] | None:
        """How many items a trigger is left with at most, a name for them, and the items; None: it may be nearly all."""
        if self.ruled is not None and not self.ruled[trigger]:
            return None
        if self.column is None:
            return len(self._passing_items), (), lambda: self._passing_items
        codes = [code for code in self.column.codes[trigger].tolist() if code >= 0]
        if self.rule.rule == "different" or (self.rule.missing and not codes):
            return None
        others = self.column.without if self.rule.missing else self.column.without[:0]
        column = self.column
        return column.num_holders(codes) + len(others), tuple(codes), lambda: np.union1d(column.holders(codes), others).astype(np.int32)

    def allowed(self, trigger: Ints, item: Ints) -> Bools:
        """(M,) neighbors of (M,) triggers that pass."""
        passes = self.passing[item] if self.column is None else self._compared(self.column, trigger, item)
        return passes if self.ruled is None else passes | ~self.ruled[trigger]

    def _compared(self, column: FilterColumn, trigger: Ints, item: Ints) -> Bools:
        shared = column.shared(trigger, item)
        if self.rule.rule == "different":
            return ~shared
        unknown = ~(self.passing[trigger] & self.passing[item])
        return shared | unknown if self.rule.missing else shared


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Items among which all are that a trigger's list may hold: their number at most, and a name that equal pools share."""

    size: int
    name: Hashable
    items: Callable[[], Ints]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Filters and limit of every list; a list without any is not in the mappings."""

    filters: Mapping[str, tuple[_Filter, ...]]
    limits: Mapping[str, tuple[Ints, int]]

    @classmethod
    def of(cls, settings: RetrievalSettings, columns: FilterColumns, heads: Sequence[str], *, categories: Ints) -> Self:
        """The settings' rules; filters that hold everywhere are left to the index, which holds no item that they refuse.

        Args:
            settings: filters and limits.
            columns: what they read.
            heads: names of the lists, merged included.
            categories: (N, L) codes per level, -1 behind the end.
        """
        local = [rule for rule in settings.filters if rule.heads or rule.scopes or _looks_at_trigger(rule)]
        made = [(rule, _filter(rule, columns)) for rule in local]
        filters = {head: tuple(filter_ for rule, filter_ in made if not rule.heads or head in rule.heads) for head in heads}
        limits: dict[str, tuple[Ints, int]] = {}
        for limit in settings.limits:
            kind = _finest(categories) if limit.by == CATEGORY else _first(columns.columns[limit.by].codes)
            limits |= {head: (kind, limit.at_most) for head in heads if not limit.heads or head in limit.heads}
        return cls(filters={head: some for head, some in filters.items() if some}, limits=limits)

    def pool(self, head: str, trigger: int) -> Pool | None:
        """The fewest items that one of a list's filters leaves to a trigger; None: no filter says which."""
        pools = [(found, number) for number, filter_ in enumerate(self.filters.get(head, ())) if (found := filter_.pool(trigger))]
        if not pools:
            return None
        (size, name, items), number = min(pools, key=lambda found: found[0][0])
        return Pool(size=size, name=(head, number, name), items=items)

    def first_of_kind(self, head: str, order: Ints, group: Ints, most: int) -> Ints:
        """Of (R,) items in an order those that come first of their kind in their group: the list's limit, and `most` more."""
        kinds, at_most = self.limits[head]
        kind = kinds[order]
        by_kind = np.lexsort((kind, group))
        new = (np.diff(group[by_kind], prepend=-2) != 0) | (np.diff(kind[by_kind], prepend=-2) != 0)
        place = np.arange(len(order))
        number = np.empty(len(order), np.int64)
        number[by_kind] = place - np.maximum.accumulate(np.where(new, place, 0))
        return order[number < at_most + most]

    def restrict(self, heads: Iterable[str]) -> bool:
        """Whether any of the lists has a filter or a limit."""
        return any(head in self.filters or head in self.limits for head in heads)

    def allowed(self, head: str, trigger: Ints, item: Ints) -> Bools:
        """(M,) neighbors of (M,) triggers that pass the list's filters."""
        passes = np.ones(len(item), np.bool_)
        for filter_ in self.filters.get(head, ()):
            passes &= filter_.allowed(trigger, item)
        return passes

    def within_limit(self, head: str, segment: Longs, item: Ints) -> Bools:
        """(M,) neighbors that are among the first n of their kind in their list; lists lie one after the other, each in its order."""
        if head not in self.limits:
            return np.ones(len(item), np.bool_)
        kinds, at_most = self.limits[head]
        kind = kinds[item]
        order = np.lexsort((kind, segment))  # stable: the order of a list stays inside each kind
        new = (np.diff(segment[order], prepend=-1) != 0) | (np.diff(kind[order], prepend=-2) != 0)
        place = np.arange(len(item))
        first = np.maximum.accumulate(np.where(new, place, 0))
        number = np.empty(len(item), np.int64)
        number[order] = place - first
        return (number < at_most) | (kind < 0)

    def offered(self, head: str, trigger: Ints, segment: Longs, item: Ints) -> Bools:
        """(M,) neighbors that a list in this order would hold; `trigger` (M,) beside each."""
        passes = np.flatnonzero(self.allowed(head, trigger, item))
        out = np.zeros(len(item), np.bool_)
        out[passes[self.within_limit(head, segment[passes], item[passes])]] = True
        return out

    def apart(self, heads: Iterable[str], *, by_limit: bool = False) -> list[str]:
        """One of the lists for each set of filters, or of filters and limit."""
        limits = {head: (id(kind), at_most) for head, (kind, at_most) in self.limits.items()} if by_limit else {}
        return list({(*map(id, self.filters.get(head, ())), limits.get(head)): head for head in heads}.values())

    def depth(self, head: str, k: int, offsets: Longs) -> int:
        """How many candidates of a list to rank, so that k remain after `cut`: k, or with a limit all."""
        return max(k, int(np.diff(offsets).max(initial=0))) if head in self.limits else k

    def cut(self, head: str, offsets: Longs, item: Ints, k: int) -> tuple[Longs, Longs]:
        """Lists of (R,) items in order to what their limit leaves of them, k at most: positions among the R, and new offsets."""
        if head not in self.limits:
            return np.arange(len(item)), offsets
        segment = segments(offsets)
        kept = np.flatnonzero(self.within_limit(head, segment, item))
        starts = ends(np.bincount(segment[kept], minlength=len(offsets) - 1))
        kept = kept[np.arange(len(kept)) - starts[segment[kept]] < k]
        return kept, ends(np.bincount(segment[kept], minlength=len(offsets) - 1))

    def admit(self, head: str, trigger: int, listed: Ints, item: Ints) -> Ints:
        """Those of some items, in order, that a list may hold behind what it holds already."""
        passing = item[self.allowed(head, np.full(len(item), trigger, np.int32), item)]
        whole = np.concatenate([listed, passing])
        return passing[self.within_limit(head, np.zeros(len(whole), np.int64), whole)[len(listed) :]]

    def num_possible(self, head: str, trigger: int, eligible: Ints) -> int:
        """How many of some (ascending) eligible items a trigger's list could hold."""
        pool = self.pool(head, trigger)
        some = eligible if pool is None else np.intersect1d(pool.items(), eligible, assume_unique=True)
        return len(self.admit(head, trigger, eligible[:0], some[some != trigger]))


def _filter(rule: FilterSettings, columns: FilterColumns) -> _Filter:
    column = columns.columns[rule.column]
    ruled = np.any([columns.in_scope(scope) for scope in rule.scopes], axis=0) if rule.scopes else None
    if _looks_at_trigger(rule):
        return _Filter(rule=rule, column=column, passing=column.known, ruled=ruled)
    return _Filter(rule=rule, column=None, passing=columns.passing(rule), ruled=ruled)


def _finest(categories: Ints) -> Ints:
    """(N, L) -> (N,) the last code that is not -1."""
    if not categories.shape[1]:
        return np.full(len(categories), -1, np.int32)
    depth = (categories >= 0).sum(axis=1)
    last = np.take_along_axis(categories, np.maximum(depth - 1, 0)[:, None], axis=1)[:, 0]
    return np.where(depth > 0, last, -1).astype(np.int32)


def _first(codes: Ints) -> Ints:
    return codes[:, 0] if codes.shape[1] else np.full(len(codes), -1, np.int32)
