"""The benchmark of training: a small size of it has every row, and its parts are those of the steps."""

from jobs.bench_train import Spent, make_world, matrix_rate, measure


def test_a_small_size_has_all_rows() -> None:
    rows = list(measure(0.004, num_threads=1, num_items=300, num_measured=2))
    assert [row["method"] for row in rows] == ["mtmh", "implicit ALS", "gensim word2vec"]
    for row in rows:
        assert {"work", "size", "method", "median_s", "min_s", "max_s", "runs", "note"} <= row.keys()
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
    assert {"examples/s", "GFLOP/s", "data", "forward", "backward", "optimizer"} <= set(
        rows[0]["note"].replace(",", "").replace(";", "").split()
    )
    assert matrix_rate() > 1e8


def test_sessions_pairs_and_shares() -> None:
    world = make_world(0.004, num_items=300)
    assert sum(map(len, world.sessions)) == world.num_events
    pairs = world.data.full.pairs
    assert pairs.nnz > 0
    assert abs(pairs - pairs.T).max() == 0
    assert pairs.diagonal().max() == 0
    spent = Spent(data=1, forward=2, backward=4, optimizer=1)
    assert spent.total == 8
    assert str(spent) == "data 12%, forward 25%, backward 50%, optimizer 12%"
