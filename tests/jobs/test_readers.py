"""Readers that poll all the time while nights are published, killed, rolled back, merged again and backfilled: one night, never two."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from deltalake import DeltaTable

from conf.errors import MachineError, PublishError, SettingsError
from conf.tables import ITEM_NEIGHBORS
from features import store
from jobs.export import export
from jobs.online import feature_store_folder, open_feature_store
from jobs.progress import Display
from jobs.publication import published
from jobs.reader import artifacts_of, neighbors_of, open_table
from jobs.remerge import remerge
from jobs.rollback import roll_back
from tests.conftest import ROOT
from tests.list_world import ListWorld

QUIET = Display(seconds_per_line=3600)
NIGHT = date(2024, 3, 31)
OFFLINE = {"online": {"enabled": False}}

READER = """
import json, sys
from pathlib import Path
import duckdb
from conf.errors import MachineError
from conf.tables import ITEM_NEIGHBORS
from jobs.reader import open_table

root, stop, out = sys.argv[1], Path(sys.argv[2]), []
while not stop.exists():
    table = open_table(root, ITEM_NEIGHBORS)
    query = "SELECT list(DISTINCT run_id), count(*), count(DISTINCT (item_id, head)) FROM read_parquet(?)"
    out.append([table.version(), *duckdb.execute(query, [table.file_uris()]).fetchone()])
print(json.dumps(out))
"""
PUBLISHER = """
import sys
from jobs.publication import publish_run, published

root, first, second = sys.argv[1:]
while True:
    current = published(root)
    publish_run(root, second if current.run_id == first else first, expected=current.version, inputs={})
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


@contextmanager
def polling(root: str, seen: list[tuple[frozenset[str], int, int]]) -> Iterator[None]:
    """A thread that reads the whole table through delta-rs, over and over: the runs, rows and distinct keys of each read."""
    end = threading.Event()

    def poll() -> None:
        while not end.is_set():
            rows = open_table(root, ITEM_NEIGHBORS).to_pyarrow_table(columns=["run_id", "item_id", "head"]).to_pylist()
            keys = {(row["item_id"], row["head"]) for row in rows}
            seen.append((frozenset(row["run_id"] for row in rows), len(rows), len(keys)))

    with ThreadPoolExecutor(1) as pool:
        polled = pool.submit(poll)
        try:
            yield
        finally:
            end.set()
            polled.result()


def test_readers_see_one_night_or_the_other(tmp_path: Path) -> None:
    world = ListWorld(folder=tmp_path, overrides=OFFLINE)
    sizes = {world.night(NIGHT, seed=1): 90}
    stop = tmp_path / "stop"
    by_duckdb, seen = start(READER, world.root, str(stop)), list[tuple[frozenset[str], int, int]]()
    with polling(world.root, seen):
        for number in range(2, 5):
            sizes[world.night(NIGHT + timedelta(days=number), seed=number, num_items=90 + number)] = 90 + number
        older = world.night(NIGHT - timedelta(days=9), seed=9, publish=False)  # a backfilled night
        first, second, *_ = sizes
        for _ in range(3):  # a publisher that dies wherever it is
            version, publisher = published(world.root).version, start(PUBLISHER, world.root, first, second)
            while published(world.root).version < version + 4:
                assert publisher.poll() is None
                time.sleep(0.001)
            publisher.kill()
            publisher.wait()
        roll_back(world.settings, second if published(world.root).run_id == first else first, display=QUIET)
        *_, newest = sizes
        roll_back(world.settings, newest, display=QUIET)
        world.set_policy(kind="quota", value=0.5)
        sizes[remerge(world.settings, display=QUIET).run_id] = sizes[newest]
        roll_back(world.settings, older, display=QUIET)
        sizes[older] = 90
    stop.touch()
    out, _ = by_duckdb.communicate()
    read = [(frozenset(runs), rows, keys) for _, runs, rows, keys in json.loads(out)] + seen
    assert {len(runs) for runs, _, _ in read} == {1}, "some reader saw two nights"
    assert all(rows == keys == 3 * sizes[next(iter(runs))] for runs, rows, keys in read), "some reader saw a part of a night"
    assert len({runs for runs, _, _ in read}) > 3
    # what died in between is in the folder, and in no reader's list
    table = open_table(world.root, ITEM_NEIGHBORS)
    assert {Path(uri).name for uri in table.file_uris()} < {path.name for path in Path(world.root, "item_neighbors").glob("*.parquet")}
    assert duckdb.execute("SELECT count(DISTINCT run_id) FROM read_parquet(?)", [table.file_uris()]).fetchone() == (1,)


ONLINE = """
import sys
from conf.settings import load_settings
from jobs.progress import Display
from jobs.rollback import roll_back

roll_back(load_settings(sys.argv[1]), sys.argv[2], display=Display(seconds_per_line=3600))
"""


def start_half_way(world: ListWorld, run_id: str) -> tuple[subprocess.Popen[str], Path]:
    """Begin to publish a run online; returns the process once twenty shards are, and the file that marks them."""
    state = artifacts_of(world.settings.lake, run_id) / f"online-{published(world.root).version}.json"
    publisher = start(ONLINE, str(world.config), run_id)
    while not state.exists() or len(json.loads(state.read_text())["shards"]) < 20:
        assert publisher.poll() is None
        time.sleep(0.001)
    return publisher, state


def kill_half_way(world: ListWorld, run_id: str) -> Path:
    """Begin to publish a run online, and kill it after twenty shards; returns the file that marks them."""
    publisher, state = start_half_way(world, run_id)
    publisher.send_signal(signal.SIGKILL)
    publisher.wait()
    return state


def served(world: ListWorld) -> set[str]:
    """Runs whose lists the online store has, of all items."""
    ids = [f"i{number:03d}" for number in range(world.num_items)]
    found = store.lookup_online(open_feature_store(world.settings), ids, heads=["merged"], k=100)
    return {lists["run_id"] for lists in found.values()}


def test_what_was_written_to_a_store_that_is_gone_is_written_again(tmp_path: Path) -> None:
    """By a publication that was killed, and by one that had ended."""
    world = ListWorld(folder=tmp_path, overrides={"online": {"shard_items": 1}})
    run_id = world.night(NIGHT, seed=1)
    kill_half_way(world, run_id)
    file = Path(feature_store_folder(world.settings.lake), store.SQLITE_FILE)
    for lost in ("lost", "lost again"):
        file.rename(file.with_name(lost))  # not removed: its number could be given to the next file
        roll_back(world.settings, run_id, display=QUIET)
        assert served(world) == {run_id}
    DeltaTable(f"{world.root}/{ITEM_NEIGHBORS.name}").vacuum(0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(PublishError, match="nothing to roll back"):  # a VACUUM changes no list
        roll_back(world.settings, run_id, display=QUIET)


@contextmanager
def forgetful_redis(port: int, folder: Path, *options: str) -> Iterator[None]:
    """A server that keeps nothing when it ends."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server on PATH; `apt-get install redis-server`, or your system's equivalent")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield
        server.kill()


def test_a_redis_with_a_password_that_may_not_be_asked_about_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MTMH_REDIS", f"127.0.0.1:{port},db=2,password=secret")
    world = ListWorld(folder=tmp_path, overrides={"online": {"store": "redis"}})
    run_id = world.night(NIGHT, seed=1)
    with forgetful_redis(port, tmp_path, "--requirepass", "secret", "--rename-command", "INFO", ""):
        roll_back(world.settings, run_id, display=QUIET)
        assert served(world) == {run_id}
        with pytest.raises(PublishError, match="nothing to roll back"):
            roll_back(world.settings, run_id, display=QUIET)


def test_a_publication_goes_on_in_a_redis_that_was_started_again_and_has_lost_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MTMH_REDIS", f"127.0.0.1:{port}")
    world = ListWorld(folder=tmp_path, overrides={"online": {"store": "redis", "shard_items": 1}})
    run_id = world.night(NIGHT, seed=1)
    with forgetful_redis(port, tmp_path):
        kill_half_way(world, run_id)
    for _ in range(2):  # the second time nothing was half-way, and the ledger says that all is online
        with forgetful_redis(port, tmp_path):
            roll_back(world.settings, run_id, display=QUIET)
            assert served(world) == {run_id}


def test_lakes_that_share_a_redis_serve_each_its_own_lists(tmp_path: Path, redis_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTMH_REDIS", redis_server)
    worlds = [ListWorld(folder=tmp_path / name, overrides={"online": {"store": "redis"}}) for name in ("one", "other")]
    nights = [world.night(NIGHT, seed=number) for number, world in enumerate(worlds)]
    for world, night in zip(worlds, nights, strict=True):
        roll_back(world.settings, night, display=QUIET)
    assert [served(world) for world in worlds] == [{night} for night in nights]


def test_whoever_publishes_last_has_the_last_word_online(tmp_path: Path) -> None:
    """A rollback while a night is still writing the online store waits for it, and then writes all lists again."""
    world = ListWorld(folder=tmp_path, overrides={"online": {"shard_items": 1}})
    first, second = world.night(NIGHT, seed=1), world.night(NIGHT + timedelta(days=1), seed=2)
    publisher, state = start_half_way(world, second)
    roll_back(world.settings, first, display=QUIET)
    assert publisher.wait() == 0
    assert not state.exists(), "it has come to its end"
    assert served(world) == {first}
    with pytest.raises(PublishError, match="nothing to roll back"):
        roll_back(world.settings, first, display=QUIET)


def test_a_killed_online_publication_goes_on_where_it_stopped(tmp_path: Path, redis_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTMH_REDIS", redis_server)
    world = ListWorld(folder=tmp_path, overrides={"online": {"store": "redis", "shard_items": 1}})
    first = world.night(NIGHT, seed=1)
    roll_back(world.settings, first, display=QUIET)
    second = world.night(NIGHT + timedelta(days=1), seed=2)
    state = kill_half_way(world, second)
    before = set(json.loads(state.read_text())["shards"])
    assert 20 <= len(before) < world.num_items
    ids = [f"i{number:03d}" for number in range(world.num_items)]
    assert served(world) == {first, second}  # run_id says which list is from which night
    roll_back(world.settings, second, display=QUIET)
    done = world.ledger.last_success(stage="publish_online")
    assert done is not None
    assert (done.run_id, done.metrics) == (second, {"num_items_written": 90.0, "num_items_expected": 90.0})
    assert not state.exists()
    found, wanted = store.lookup_online(open_feature_store(world.settings), ids, heads=["merged"], k=100), neighbors_of(world.root, ids)
    assert {lists["run_id"] for lists in found.values()} == {second}
    assert all(found[item]["merged"]["ids"] == [n["neighbor_id"] for n in wanted[item, "merged"]] for item in ids)


def test_redis_down_and_a_clock_that_went_back(tmp_path: Path, redis_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTMH_REDIS", "127.0.0.1:1")  # where nothing listens
    world = ListWorld(folder=tmp_path, overrides={"online": {"store": "redis"}})
    first, noon = world.night(NIGHT, seed=1), datetime(2024, 6, 1, 12, tzinfo=UTC)
    with pytest.raises(MachineError, match=r"the Redis server that MTMH_REDIS names does not answer: .*then run the same command again"):
        roll_back(world.settings, first, display=QUIET, now=noon)
    assert world.ledger.records(stage="publish_online")[-1].status == "failed"
    monkeypatch.setenv("MTMH_REDIS", redis_server)
    roll_back(world.settings, first, display=QUIET, now=noon)
    second = world.night(NIGHT + timedelta(days=1), seed=2)
    roll_back(world.settings, second, display=QUIET, now=noon - timedelta(hours=6))
    found = store.lookup_online(open_feature_store(world.settings), ["i001"], heads=["merged"], k=5)
    assert found["i001"]["run_id"] == second, "Redis refused what it took for older"


def test_lists_over_http(tmp_path: Path) -> None:
    world = ListWorld(folder=tmp_path)
    night = world.night(NIGHT, seed=1)
    roll_back(world.settings, night, display=QUIET)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    feast = Path(sys.executable).with_name("feast")
    command = [str(feast), "-c", f"{world.root}/_feast", "serve", "-h", "127.0.0.1", "-p", str(port), "--no-access-log"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as server:
        try:
            found = _asked(f"http://127.0.0.1:{port}", ["i007", "unknown"], server)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    values = dict(zip(found["metadata"]["feature_names"], (result["values"] for result in found["results"]), strict=True))
    wanted = neighbors_of(world.root, ["i007"])["i007", "merged"]
    assert values["merged_ids"][0] == [neighbor["neighbor_id"] for neighbor in wanted]
    assert values["run_id"] == [night, None]
    assert not values["merged_ids"][1]


def _asked(url: str, ids: list[str], server: subprocess.Popen[bytes]) -> dict[str, dict[str, list[str]]]:
    body = {"features": ["item_neighbors:merged_ids", "item_neighbors:run_id"], "entities": {"item_id": ids}}
    data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/get-online-features", data=data, headers=headers)
    while True:
        assert server.poll() is None, "feast serve has ended"
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.loads(answer.read())
        except ConnectionError:
            time.sleep(0.1)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.1)


def test_lists_are_exported_as_the_name_of_the_file_says(tmp_path: Path) -> None:
    world = ListWorld(folder=tmp_path, overrides=OFFLINE)
    run_id = world.night(NIGHT, seed=1)
    lists = {key: [neighbor["neighbor_id"] for neighbor in found] for key, found in neighbors_of(world.root, ["i003", "i004"]).items()}
    for name, read in (("lists.parquet", pd.read_parquet), ("lists.csv", pd.read_csv)):
        out = tmp_path / name
        rows = read(out) if export(world.root, str(out)) else pd.DataFrame()
        assert set(rows["run_id"]) == {run_id}
        assert set(rows["run_date"].astype(str)) == {str(NIGHT)}
        for (item_id, head), ids in lists.items():
            assert rows[(rows["item_id"] == item_id) & (rows["head"] == head)].sort_values("rank")["neighbor_id"].tolist() == ids
    number = len(pd.read_csv(tmp_path / "lists.csv"))
    assert export(world.root, str(tmp_path / "lists.csv"), head="merged") < number
    assert set(pd.read_csv(tmp_path / "lists.csv")["head"]) == {"merged"}
    with pytest.raises(SettingsError, match=r"lists\.xlsx ends in \.xlsx; wanted \.parquet or \.csv"):
        export(world.root, str(tmp_path / "lists.xlsx"))
    with pytest.raises(MachineError, match=r"cannot write .*nowhere/lists\.csv"):
        export(world.root, str(tmp_path / "nowhere" / "lists.csv"))
    assert not list(tmp_path.glob("*.partial"))
