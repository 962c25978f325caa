"""What the scorer expects, as vectors."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest
from scipy.sparse import csr_array

from models.data import TrainingData
from models.distillation import distil, expected
from models.factorization import ScoreWeights, factorize
from models.scorer import CandidateSource, Scorer, log_softmax
from models.start import build_model
from models.train import train
from models.workers import Workers
from tests.models.small_world import SmallWorld, make_spec, source_of

WEIGHTS = ScoreWeights(
    user_level_weight=1.0, dimension=12, target_norm_exponent=0.5, popularity_weight=0.2, temperature=3.0, prior_users=1.0
)


@pytest.fixture
def source(data: TrainingData, tmp_path: Path) -> CandidateSource:
    """Of the past, with an item that may not be offered."""
    eligible = data.eligible.copy()
    eligible[3] = False
    start = factorize(data.fit, data.content, weights=WEIGHTS, seed=0)
    model = build_model(start, data.content, make_spec(tmp_path).model, 0.5, seed=0)
    return source_of(dataclasses.replace(data, full=data.fit, eligible=eligible), model, min_users=1)


def test_rows_are_the_scorers_p_over_each_triggers_candidates(source: CandidateSource, tmp_path: Path) -> None:
    scorer, widths, told = Scorer.mixture(), make_spec(tmp_path).widths, list[int]()
    found = expected(source, scorer, widths=widths, watch=told.append)
    assert told[-1] == found.shape[0]
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert not found.diagonal().any()
    assert not found[:, [3]].data.any(), "an item that may not be offered is expected of nobody"
    trigger = np.array([20], dtype=np.int32)
    alone = source.propose(trigger, csr_array((1, found.shape[1]), dtype=np.float32), widths=widths)
    p = np.exp(log_softmax(scorer.logits(alone.features), alone.segment))
    np.testing.assert_allclose(found[trigger].toarray()[0, alone.target], p, rtol=1e-5)
    assert found[trigger].nnz == len(p)


def test_vectors_say_what_the_scorer_expects_and_content_stands_in_for_nobodys_candidate(
    world: SmallWorld, data: TrainingData, source: CandidateSource, tmp_path: Path
) -> None:
    new, blank = data.num_items - 1, world.num_known  # of the new one content alone is known, of the blank one nothing
    eligible = source.eligible.copy()
    eligible[[new, blank]] = False
    closed = dataclasses.replace(source, eligible=eligible)
    head = distil(closed, Scorer.mixture(), weights=WEIGHTS, dimension=500, widths=make_spec(tmp_path).widths, seed=1)
    assert head.trigger.shape == head.target.shape == (data.num_items, data.num_items)
    scores = head.trigger[:20] @ head.target.T
    scores[np.arange(20), np.arange(20)] = -np.inf
    near = np.argsort(-scores, axis=1)[:, :3]
    assert np.mean([len(set(items) & world.bundle_of(i)) / 3 for i, items in enumerate(near.tolist())]) > 0.8
    assert head.target[new, :-1].any()
    assert not head.target[blank, :-1].any()


def test_a_larger_catalog_has_none_and_lists_never_read_them(data: TrainingData, tmp_path: Path) -> None:
    metrics, files = {}, {}
    for name, most in {"small": data.num_items, "large": data.num_items - 1}.items():
        metrics[name] = train(data, make_spec(tmp_path / name, distil_max_items=most), Workers())
        files[name] = ds.dataset(tmp_path / name / "embeddings").to_table()
    heads = {name: sorted(set(table["head"].to_pylist())) for name, table in files.items()}
    assert heads == {"small": ["distilled", "engagement", "relevance"], "large": ["engagement", "relevance"]}
    assert metrics["small"]["distillation_seconds"] > 0
    assert not [metric for metric in metrics["large"] if metric.startswith("distil")]
    others = ds.field("head") != "distilled"
    assert files["small"].filter(others).equals(files["large"])
    scorers = [json.loads((tmp_path / name / "scorer.json").read_text()) for name in metrics]
    assert scorers[0] == scorers[1]
