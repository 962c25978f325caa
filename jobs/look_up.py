"""Neighbors of one or several triggers from the online store in one call: what a service or a notebook uses. No Spark, no Java.

    from jobs.look_up import Lookup

    shelf = Lookup.open("demo")
    shelf.lookup(["1029743"], k=5)                                     # next to one item
    shelf.lookup(["1029743", "1082185"], exclude=bought, k=20)         # next to a basket

Lists are of the night that was published last; `run_id` beside each neighbor says which, and `max_age_days` leaves out what is older.
"""

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Self

from rich.console import Console
from rich.table import Table as RichTable

from conf.errors import SettingsError
from conf.settings import Settings, load_settings
from features import store
from jobs.arguments import add_config, report_errors
from jobs.online import feature_store_folder, reaching_redis, redis_connection


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A neighbor, the trigger whose list it comes from, its rank there (from 1) and score, and the night that made the list."""

    neighbor_id: str
    trigger_id: str
    rank: int
    score: float
    run_id: str


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """An opened online store."""

    settings: Settings
    feature_store: Any

    @classmethod
    def open(cls, config: str, assignments: Sequence[str] = ()) -> Self:
        """Open the store of a configuration; costs seconds, so keep it.

        Args:
            config: name of a packaged overlay, or path of a .yaml file.
            assignments: `section.key=value`, as with --set.

        Raises:
            SettingsError: the configuration is wrong.
            MachineError: Redis is wanted and the environment does not say where it is.
        """
        settings = load_settings(config, assignments)
        online = settings.online
        folder = feature_store_folder(settings.lake)
        return cls(
            settings=settings, feature_store=store.open_store(folder=folder, online=online, redis_connection=redis_connection(online))
        )

    def lookup(
        self,
        trigger_ids: Sequence[str],
        *,
        exclude: Collection[str] = (),
        k: int = 10,
        head: str = "merged",
        max_per_trigger: int | None = None,
        max_age_days: int | None = None,
        today: date | None = None,
    ) -> list[Offer]:
        """The k best offers next to some triggers: first every trigger's first neighbor in the order of the triggers, then the second, …

        An item is offered once, for the trigger that ranks it highest; never a trigger itself. An unknown trigger has no offers and is no
        error.

        Args:
            trigger_ids: one or several.
            exclude: items not to offer, e.g. those bought before.
            k: most offers.
            head: which list.
            max_per_trigger: most offers from one trigger's list; None: no such limit.
            max_age_days: lists of nights more than this many days before today are not used; None: all are.
            today: None: the clock's UTC day.

        Raises:
            SettingsError: no such list, or k or a limit is below 1.
            TableError: no list has been published online yet.
            MachineError: Redis does not answer.
        """
        self._check(head, k=k, max_per_trigger=max_per_trigger)
        triggers = list(dict.fromkeys(trigger_ids))
        with reaching_redis(self.settings.online):
            found = store.lookup_online(self.feature_store, triggers, heads=[head], k=self.settings.retrieval.list_length)
        oldest = None if max_age_days is None else (today or datetime.now(UTC).date()) - timedelta(days=max_age_days)
        fresh = {trigger: lists for trigger, lists in found.items() if oldest is None or _is_from(lists, oldest)}
        taken, given, offers = {*exclude, *triggers}, dict.fromkeys(triggers, 0), list[Offer]()
        for offer in _by_rank(fresh, head):
            if len(offers) == k:
                break
            if offer.neighbor_id in taken or given[offer.trigger_id] == max_per_trigger:
                continue
            taken.add(offer.neighbor_id)
            given[offer.trigger_id] += 1
            offers.append(offer)
        return offers

    def _check(self, head: str, **limits: int | None) -> None:
        if head not in self.settings.list_names:
            raise SettingsError(f"no list named {head!r}; have {self.settings.list_names}")
        if low := {name: limit for name, limit in limits.items() if limit is not None and limit < 1}:
            raise SettingsError(f"found {low}, wanted at least 1")


def _is_from(lists: Mapping[str, Any], oldest: date) -> bool:
    return lists["as_of"] is not None and date.fromisoformat(lists["as_of"]) >= oldest


def _by_rank(found: Mapping[str, Mapping[str, Any]], head: str) -> Iterator[Offer]:
    longest = max((len(lists[head]["ids"]) for lists in found.values()), default=0)
    for position in range(longest):
        for trigger, lists in found.items():
            if position < len(lists[head]["ids"]):
                neighbor, score = lists[head]["ids"][position], lists[head]["scores"][position]
                yield Offer(neighbor_id=neighbor, trigger_id=trigger, rank=position + 1, score=score, run_id=lists["run_id"])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the offers next to some triggers."""
    parser = argparse.ArgumentParser(description="neighbors of one or several items from the online store")
    parser.add_argument("items", nargs="+", metavar="ITEM", help="trigger item id")
    parser.add_argument("--exclude", nargs="*", default=[], metavar="ITEM", help="items not to offer")
    parser.add_argument("--k", type=int, default=10, help="most offers")
    parser.add_argument("--head", default="merged", help="which list")
    parser.add_argument("--max-age-days", type=int, help="leave out lists of older nights")
    add_config(parser, default="demo")

    def run() -> None:
        values = parser.parse_args(argv)
        opened = Lookup.open(values.config, values.set)
        offers = opened.lookup(values.items, exclude=values.exclude, k=values.k, head=values.head, max_age_days=values.max_age_days)
        table = RichTable("neighbor", "next to", "rank", "score", "run")
        for offer in offers:
            table.add_row(offer.neighbor_id, offer.trigger_id, str(offer.rank), f"{offer.score:.4g}", offer.run_id)
        Console().print(table)

    report_errors(run)


if __name__ == "__main__":
    main()
