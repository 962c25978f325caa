"""What `make bench-pairs` counts: a seeded click log of any size, the demo's grocery baskets, and interactive-fiction games.

The click log: 90 days from 2024-01-01; a user's activity is lognormal (sigma 1.5: the busiest hundredth makes a fifth of the sessions), at
most one session per user and day, its length geometric with mean 5 and at most 40; items are 50,000 times the square root of the millions
of events, and follow a Zipf law with exponent 1.05; seven of ten clicks fall into the category of their session, one of 200 that follow
such a law, too, so that popular pairs come back every day and most others are seen once.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from conf.errors import SourceError
from conf.settings import WindowSettings, load_settings
from conf.tables import ENGAGEMENTS
from jobs.demo_source import lay_source

NUM_DAYS = 90
START = datetime(2024, 1, 1, tzinfo=UTC)
SESSION = WindowSettings(kind="session", symmetric=True)
_MICROS = 1_000_000
_DAY = 86_400
_NUM_CATEGORIES = 200
_MEAN_LENGTH, _MAX_LENGTH = 5, 40
_FILES = 4
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Events in Parquet files with the columns of engagements, and the window they are counted with."""

    name: str
    size: int
    folder: Path
    window: WindowSettings
    one_session_a_day: bool


def open_work(name: str, folder: Path) -> Work:
    """A piece of work by name, laid out below the folder the first time: `clicks-<millions>m`, `grocery` or `ifdb_games`.

    Raises:
        SourceError: the name is another one, or the data are not on this machine.
    """
    place = folder / name
    if name.startswith("clicks-"):
        size = int(float(name.removeprefix("clicks-").removesuffix("m")) * 1_000_000)
        if not place.exists():
            _lay(place, click_log(size))
        return Work(name=name, size=size, folder=place, window=SESSION, one_session_a_day=True)
    if name not in ("grocery", "ifdb_games"):
        raise SourceError(f"no work named {name!r}; have clicks-<millions>m, e.g. clicks-4m, grocery and ifdb_games")
    if not place.exists():
        _lay(place, _grocery(folder / "demo") if name == "grocery" else _games())
    size = sum(pq.read_metadata(path).num_rows for path in place.glob("*.parquet"))
    window = load_settings("demo" if name == "grocery" else name).pairs.window
    return Work(name=name, size=size, folder=place, window=window, one_session_a_day=False)


def click_log(num_events: int, *, seed: int = 5) -> pa.Table:
    """About `num_events` clicks as engagements, the same for the same seed: the log of the module's docstring."""
    rng = np.random.default_rng(seed)
    num_sessions = num_events // _MEAN_LENGTH
    user, day = _sessions(rng, num_sessions)
    length = np.minimum(rng.geometric(1 / (_MEAN_LENGTH - 1), len(user)) + 1, _MAX_LENGTH)
    session = np.repeat(np.arange(len(user)), length)
    place = np.arange(len(session)) - np.repeat(np.cumsum(length) - length, length)
    begin = rng.integers(0, _DAY - 30 * _MAX_LENGTH, len(user))
    item = _items(rng, session, num_items=int(50_000 * (num_events / 1_000_000) ** 0.5))
    time = (int(START.timestamp()) + day[session] * _DAY + begin[session] + 30 * place) * _MICROS
    return _engagements(_named("u", user[session]), _named("i", item), _named("s", session), time)


def _sessions(rng: np.random.Generator, num_sessions: int) -> tuple[Ints, Ints]:
    """(user, day) of each session, each at most once."""
    num_users = max(10, num_sessions // 8)
    busy = np.cumsum(rng.lognormal(0.0, 1.5, num_users))
    drawn = np.searchsorted(busy / busy[-1], rng.random(3 * num_sessions)) * NUM_DAYS + rng.integers(0, NUM_DAYS, 3 * num_sessions)
    cells = rng.permutation(np.unique(drawn))[:num_sessions]
    return cells // NUM_DAYS, cells % NUM_DAYS


def _items(rng: np.random.Generator, session: Ints, *, num_items: int) -> Ints:
    category = _zipf(rng, _NUM_CATEGORIES, int(session[-1]) + 1)[session]
    inside = category + _NUM_CATEGORIES * _zipf(rng, num_items // _NUM_CATEGORIES, len(session))
    return np.where(rng.random(len(session)) < 0.7, inside, _zipf(rng, num_items, len(session)))


def _zipf(rng: np.random.Generator, size: int, num: int) -> Ints:
    mass = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -1.05)
    return np.minimum(np.searchsorted(mass / mass[-1], rng.random(num)), size - 1)


def _named(letter: str, number: Ints) -> pa.Array:
    """Ids as text, e.g. i17; each distinct one is spelled once."""
    distinct, code = np.unique(number, return_inverse=True)
    return pa.array([f"{letter}{value}" for value in distinct.tolist()]).take(pa.array(code))


def _engagements(user: pa.Array, item: pa.Array, session: pa.Array, time: Ints) -> pa.Table:
    at = pa.array(time, pa.int64()).cast(pa.timestamp("us", tz="UTC"))
    columns = {
        "user_id": user,
        "item_id": item,
        "action": pa.array(["click"]).take(pa.array(np.zeros(len(time), np.int64))),
        "engaged_at": at,
        "session_id": session,
        "weight": pa.array(np.ones(len(time))),
        "event_date": pc.floor_temporal(at, unit="day").cast(pa.date32()),
    }
    return pa.table({name: columns[name] for name in ENGAGEMENTS.column_names})


def _lay(place: Path, table: pa.Table) -> None:
    """As files of equal size, in the order of time, as a lake has them."""
    table = table.sort_by("engaged_at")
    partial = place.with_name(f"{place.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    step = -(-table.num_rows // _FILES)
    for number in range(_FILES):
        pq.write_table(table.slice(number * step, step), partial / f"part-{number}.parquet")
    partial.rename(place)


def _grocery(folder: Path) -> pa.Table:
    lay_source(folder)
    raw = pq.read_table(folder / "events")
    ids = [raw[name].combine_chunks().cast(pa.string()) for name in ("household_id", "product_id", "basket_id")]
    return _distinct(_engagements(ids[0], ids[1], ids[2], raw["purchased_at"].cast(pa.int64()).to_numpy()))


def _games() -> pa.Table:
    source = load_settings("ifdb_games").source.events
    if not Path(source.path).exists():
        raise SourceError(f"no data at {source.path}, which conf/ifdb_games.yaml names; choose other work with --works")
    raw = pq.read_table(source.path, columns=["user_id", "item_id", "ts"])
    user, item = (raw[name].cast(pa.string()).combine_chunks() for name in ("user_id", "item_id"))
    return _distinct(_engagements(user, item, user, raw["ts"].cast(pa.int64()).to_numpy() * _MICROS))


def _distinct(table: pa.Table) -> pa.Table:
    """One row per user, item, session and instant."""
    return table.group_by(table.column_names, use_threads=False).aggregate([])
