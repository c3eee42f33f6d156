import os
import subprocess
import sys
import textwrap
from itertools import combinations
from math import factorial

import lightgbm as lgb
import numpy as np
import pytest
import torch
from assay_platform.errors import ArtifactError, InputError
from assay_platform.models.trees import TreeEnsemble
from hypothesis import given, settings
from hypothesis import strategies as st


def _trained(seed=0, num_rows=400, num_columns=6, missing=0.1, **parameters):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_rows, num_columns)).round(1)
    rows[rng.random(rows.shape) < missing] = np.nan
    filled = np.nan_to_num(rows)
    labels = (filled[:, 0] * filled[:, 1] + filled[:, 2] > rng.normal(size=num_rows)).astype(float)
    settings = {"objective": "binary", "verbosity": -1, "num_leaves": 15, "min_data_in_leaf": 5, "num_threads": 1}
    booster = lgb.train({**settings, **parameters}, lgb.Dataset(rows, labels), 20)
    return booster, rows


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize("num_rows", [0, 1, 300])
def test_scores_are_those_of_lightgbm(missing, num_rows):
    booster, rows = _trained(missing=missing)
    trees = TreeEnsemble.from_lightgbm(booster)
    # Missing values may come at serving time where training saw none.
    asked = rows[:num_rows].copy()
    asked[::3, 1] = np.nan
    expected = booster.predict(asked, raw_score=True) if num_rows else np.empty(0)
    assert np.allclose(trees.logits(asked), expected, atol=1e-12)


def test_the_first_trees_can_be_taken_alone():
    booster, rows = _trained()
    assert len(TreeEnsemble.from_lightgbm(booster, num_trees=7)) == 7
    expected = booster.predict(rows, raw_score=True, num_iteration=7)
    assert np.allclose(TreeEnsemble.from_lightgbm(booster, num_trees=7).logits(rows), expected, atol=1e-12)


def test_trees_that_follow_others_add_their_scores_and_reasons():
    booster, rows = _trained()
    more, _ = _trained(seed=1)
    first, second = TreeEnsemble.from_lightgbm(booster), TreeEnsemble.from_lightgbm(more)
    both = first.followed_by(second)
    assert len(both) == len(first) + len(second)
    assert np.allclose(both.logits(rows), first.logits(rows) + second.logits(rows), atol=1e-12)
    parts = [trees.explain(rows[:9], rows[10])[0] for trees in (both, first, second)]
    assert np.allclose(parts[0], parts[1] + parts[2], atol=1e-12)
    read = TreeEnsemble.from_tensors(both.to_tensors(), both.num_columns)
    assert np.array_equal(read.logits(rows), both.logits(rows))
    with pytest.raises(InputError, match="cannot follow"):
        first.followed_by(TreeEnsemble.from_lightgbm(_trained(num_columns=4)[0]))


def _by_definition(trees, row, reference):
    """Shapley values over all subsets of columns."""
    columns = range(len(row))
    out = np.zeros(len(row))
    for c in columns:
        others = [o for o in columns if o != c]
        for size in range(len(others) + 1):
            weight = factorial(size) * factorial(len(row) - size - 1) / factorial(len(row))
            for chosen in combinations(others, size):
                without = reference.copy()
                without[list(chosen)] = row[list(chosen)]
                having = without.copy()
                having[c] = row[c]
                gained = trees.logits(np.stack([having, without]))
                out[c] += weight * (gained[0] - gained[1])
    return out


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), num_leaves=st.integers(2, 40))
def test_contributions_are_the_shapley_values_of_the_definition(seed, num_leaves):
    booster, rows = _trained(seed, num_leaves=num_leaves)
    trees = TreeEnsemble.from_lightgbm(booster)
    asked, reference = rows[:3], rows[3]
    contribution, base = trees.explain(asked, reference)
    assert base == pytest.approx(trees.logits(reference[None])[0])
    for i in range(3):
        assert np.allclose(contribution[i], _by_definition(trees, asked[i], reference), atol=1e-9)


def test_many_rows_are_explained_like_few_and_add_up():
    booster, rows = _trained(num_rows=2000, num_columns=30, num_leaves=63)
    trees = TreeEnsemble.from_lightgbm(booster)
    reference = np.nanmedian(rows, axis=0)
    many, base = trees.explain(rows, reference)
    few, _ = trees.explain(rows[:4], reference)
    assert np.array_equal(many[:4], few)
    assert np.allclose(base + many.sum(axis=1), trees.logits(rows), atol=1e-9)


def test_what_is_saved_comes_back():
    booster, rows = _trained()
    trees = TreeEnsemble.from_lightgbm(booster)
    again = TreeEnsemble.from_tensors(trees.to_tensors(), 6)
    assert np.array_equal(again.logits(rows), trees.logits(rows))


@pytest.mark.parametrize("name", ["left", "column", "roots"])
def test_damaged_trees_are_refused(name):
    trees = TreeEnsemble.from_lightgbm(_trained()[0])
    tensors = trees.to_tensors()
    broken = tensors[name].clone()
    broken[0] = 0 if name == "left" else 10_000  # a node that is its own child; what is not there
    with pytest.raises(ArtifactError):
        TreeEnsemble.from_tensors({**tensors, name: broken}, 6)
    with pytest.raises(ArtifactError, match="value"):
        TreeEnsemble.from_tensors({n: t for n, t in tensors.items() if n != "value"}, 6)


def test_no_trees_and_trees_of_one_leaf_score_a_constant():
    rows = np.zeros((50, 2))
    booster = lgb.train({"objective": "binary", "verbosity": -1}, lgb.Dataset(rows, np.arange(50) % 2), 3)
    trees = TreeEnsemble.from_lightgbm(booster)
    assert np.allclose(trees.logits(rows), booster.predict(rows, raw_score=True))
    contribution, _ = trees.explain(rows, rows[0])
    assert not contribution.any()


def test_categorical_splits_are_refused():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 5, (300, 1)).astype(float)
    data = lgb.Dataset(rows, rows[:, 0] % 2, categorical_feature=[0])
    booster = lgb.train({"objective": "binary", "verbosity": -1, "min_data_per_group": 1, "cat_smooth": 1}, data, 2)
    with pytest.raises(InputError, match="categorical"):
        TreeEnsemble.from_lightgbm(booster)


def test_tensors_hold_no_objects():
    assert all(isinstance(t, torch.Tensor) for t in TreeEnsemble.from_lightgbm(_trained()[0]).to_tensors().values())


def test_a_batch_on_all_cores_leaves_torch_the_threads_it_had():
    script = textwrap.dedent("""
        import lightgbm as lgb, numpy as np, torch
        from assay_platform.models.trees import TreeEnsemble

        rows = np.random.default_rng(0).normal(size=(2000, 3))
        booster = lgb.train({"objective": "binary", "verbosity": -1}, lgb.Dataset(rows, rows[:, 0] > 0), 2)
        torch.set_num_threads(1)
        assert torch.get_num_threads() == 1  # from here on, torch has the thread set up
        TreeEnsemble.from_lightgbm(booster).explain(rows, rows[0])
        assert torch.get_num_threads() == 1
    """)
    # Numba starts its threads once a process.
    two = {**os.environ, "OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=two)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_leaves=st.sampled_from([2, 31, 32, 33, 64, 65, 150]),
    num_rows=st.sampled_from([9, 63, 64, 65, 200]),
    missing=st.sampled_from([0.0, 0.3]),
    kind=st.sampled_from([np.float32, np.float64]),
)
def test_many_rows_score_as_one_by_one_to_the_bit(seed, num_leaves, num_rows, missing, kind):
    booster, rows = _trained(seed, num_rows=1000, num_leaves=num_leaves, min_data_in_leaf=2, missing=missing)
    trees = TreeEnsemble.from_lightgbm(booster)
    # Values at a threshold, next to it in both precisions, and beyond all of them.
    cuts = trees.threshold[trees.column >= 0]
    rng = np.random.default_rng(seed)
    asked = rows[:num_rows].astype(kind)
    near = rng.choice(cuts, size=asked.shape).astype(kind)
    near = rng.choice(np.stack([near, np.nextafter(near, kind(-np.inf)), np.nextafter(near, kind(np.inf))]), axis=0)
    asked = np.where(rng.random(asked.shape) < 0.5, near, asked)
    asked[0], asked[1], asked[2] = np.inf, -np.inf, np.nan
    many = trees.logits(asked)
    assert np.array_equal(many, np.concatenate([trees.logits(row[None]) for row in asked]))


def test_trees_that_share_a_node_are_refused():
    trees = TreeEnsemble.from_lightgbm(_trained()[0])
    tensors = trees.to_tensors()
    right = tensors["right"].clone()
    right[0] = tensors["left"][0]
    with pytest.raises(ArtifactError, match="damaged"):
        TreeEnsemble.from_tensors({**tensors, "right": right}, 6)
