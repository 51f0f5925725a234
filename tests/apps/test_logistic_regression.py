"""The logistic regression app: against NumPy, scikit-learn, and what its messages promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import iterreduce as ir
from iterreduce.appfile import load_app
from iterreduce.testing import run_ranks
from tests.launch import ROOT, mpirun

APP = load_app(str(ROOT / "apps" / "logistic_regression.py")).function


def examples(rows: int, columns: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels that are small multiples of 2**-10; labels follow a plane, with noise."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-2048, 2049, (rows, columns)) / 1024
    plane = rng.normal(size=columns)
    return x, (rng.random(rows) < 1 / (1 + np.exp(-(x @ plane) - 0.5))).astype(np.int64)


def descend(
    x: np.ndarray, y: np.ndarray, steps: int, rate: float, l2: float = 0.0, intercept: bool = True
) -> np.ndarray:
    """The reference: the textbook's formula on all rows at once."""
    w, b = np.zeros(x.shape[1]), 0.0
    for _ in range(steps):
        residual = 1 / (1 + np.exp(-(x @ w + b))) - y
        w, b = w - rate * (x.T @ residual / len(x) + l2 * w), b - rate * residual.mean() * intercept
    return np.append(w, b)


def save(path: Path, **columns: Any) -> str:
    np.savez(path, **columns)
    return str(path)


def learn(path: str, ranks: int = 1, **options: Any) -> ir.Result:
    """The app's result; of tables that are spread, all rows in order."""

    def work(group: ir.Group) -> ir.Result:
        given = {k: ir.read(v) if k in ("test", "predict") else v for k, v in options.items()}
        return APP(ir.read(path), **given).run(group)

    return run_ranks(ranks, work)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray, np.ndarray]:
    x, y = examples(1777, 5)
    return save(tmp_path_factory.mktemp("rows") / "rows.npz", x=x, y=y), x, y


@pytest.mark.parametrize("options", [{}, {"l2": 0.1}, {"intercept": False}, {"l2": 0.01, "intercept": False}])
def test_weights_are_those_of_the_textbook_on_any_number_of_ranks(
    data: tuple[str, np.ndarray, np.ndarray], ranks: int, options: dict[str, Any]
) -> None:
    path, x, y = data
    result = learn(path, ranks, rate=0.5, max_iterations=40, tolerance=0.0, **options)
    assert result.outcome is ir.Outcome.ITERATIONS_USED and result.iterations == 40 and result.everywhere
    assert result["feature"].to_list() == [*(f"x{i}" for i in range(5)), "intercept"]
    np.testing.assert_allclose(result["weight"], descend(x, y, 40, 0.5, **options), rtol=1e-12, atol=1e-12)


def test_weights_have_the_same_bits_on_every_rank(data: tuple[str, np.ndarray, np.ndarray]) -> None:
    weights = run_ranks(
        3, lambda group: APP(ir.read(data[0]), max_iterations=10).run(group)["weight"].tobytes()
    )
    assert len(set(weights)) == 1


def test_more_ranks_than_rows_learn_what_one_rank_learns(tmp_path: Path) -> None:
    x, y = examples(3, 2)
    path = save(tmp_path / "few.npz", x=x, y=y)
    result = learn(path, 8, max_iterations=5, tolerance=0.0)
    np.testing.assert_allclose(result["weight"], descend(x, y, 5, 0.1), rtol=1e-12, atol=1e-15)


def test_the_limit_is_the_optimum_that_scikit_learn_finds(data: tuple[str, np.ndarray, np.ndarray]) -> None:
    from sklearn.linear_model import LogisticRegression

    path, x, y = data
    l2 = 0.01  # scikit-learn minimises sum of losses * C + |w|^2 / 2
    rival = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-12, max_iter=1000).fit(x, y)
    result = learn(path, rate=2.0, l2=l2, tolerance=1e-10, max_iterations=2000)
    assert result.outcome is ir.Outcome.CONVERGED
    np.testing.assert_allclose(result["weight"], np.append(rival.coef_, rival.intercept_), atol=1e-6)


def test_loss_and_accuracy_are_scikit_learns(
    data: tuple[str, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    from sklearn.metrics import accuracy_score, log_loss

    path, x, y = data
    other_x, other_y = examples(500, 5, seed=2)
    other = save(tmp_path / "test.npz", x=other_x, y=other_y)
    result = learn(path, 2, rate=1.0, test=other)
    w = result["weight"]
    for prefix, rows, labels in (("", x, y), ("test_", other_x, other_y)):
        p = 1 / (1 + np.exp(-(rows @ w[:-1] + w[-1])))
        assert result.values[f"{prefix}log_loss"] == pytest.approx(log_loss(labels, p), rel=1e-12)
        assert result.values[f"{prefix}accuracy"] == accuracy_score(labels, p > 0.5)


@pytest.mark.parametrize("ranks", [1, 3])
def test_predictions_are_rows_of_the_file_in_their_order(
    data: tuple[str, np.ndarray, np.ndarray], tmp_path: Path, ranks: int
) -> None:
    path, x, _ = data
    new = tmp_path / "new.npy"
    np.save(new, x[::-1])
    weights = learn(path, rate=1.0)["weight"]

    def work(group: ir.Group) -> ir.Batch:
        return APP(ir.read(path), rate=1.0, predict=ir.read(str(new))).run(group).batch

    found = ir.Batch.concat(run_ranks(ranks, work))
    p = 1 / (1 + np.exp(-(x[::-1] @ weights[:-1] + weights[-1])))
    np.testing.assert_allclose(found["probability"], p, rtol=1e-12)
    assert found["label"].tolist() == (p > 0.5).astype(int).tolist()


def test_standardized_learning_is_learning_on_standardized_columns(tmp_path: Path, ranks: int) -> None:
    """Also where means are a million times the deviations, and where a column is constant."""
    x, y = examples(900, 3)
    x = x * [1.0, 100.0, 0.01] + [1e6, -3.0, 0.5]
    x = np.column_stack([x, np.full(len(x), 7.0)])
    path = save(tmp_path / "wide.npz", x=x, y=y)
    result = learn(path, ranks, rate=0.5, l2=0.05, max_iterations=60, tolerance=0.0, standardize=True)
    deviation = np.where(x.std(axis=0) > 0, x.std(axis=0), 1)
    reference = descend((x - x.mean(axis=0)) / deviation, y, 60, 0.5, 0.05)
    weights = reference[:-1] / deviation
    np.testing.assert_allclose(result["weight"][:-1], weights, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(result["weight"][-1], reference[-1] - x.mean(axis=0) @ weights, rtol=1e-8)


def test_columns_of_a_table_are_features_in_their_order_wherever_the_label_stands(tmp_path: Path) -> None:
    x, y = examples(300, 3)
    path = tmp_path / "table.csv"
    np.savetxt(
        path, np.column_stack([x[:, 0], y, x[:, 1:]]), "%.17g", ",", header="age,y,size,x", comments=""
    )
    result = learn(str(path), 2, max_iterations=20, tolerance=0.0)
    np.testing.assert_allclose(result["weight"], descend(x, y, 20, 0.1), rtol=1e-12)


@pytest.mark.parametrize("ranks", [1, 5])
def test_one_feature_may_be_a_vector_and_ranks_may_have_no_rows(ranks: int, tmp_path: Path) -> None:
    x, y = examples(3, 1)
    result = learn(save(tmp_path / "one.npz", x=x[:, 0], y=y), ranks, max_iterations=5, tolerance=0.0)
    np.testing.assert_allclose(result["weight"], descend(x, y, 5, 0.1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64, np.bool_])
def test_labels_may_be_of_any_type_of_number(tmp_path: Path, dtype: type) -> None:
    x, y = examples(200, 2)
    path = save(tmp_path / "rows.npz", x=x, y=y.astype(dtype))
    weights = learn(path, max_iterations=5, tolerance=0.0)["weight"]
    np.testing.assert_allclose(weights, descend(x, y, 5, 0.1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.float32])
def test_features_may_be_of_any_type_of_number(tmp_path: Path, dtype: type) -> None:
    x, y = examples(200, 2)
    x = np.round(x).astype(dtype)
    path = save(tmp_path / "rows.npz", x=x, y=y)
    weights = learn(path, max_iterations=5, tolerance=0.0)["weight"]
    np.testing.assert_allclose(weights, descend(x.astype(float), y, 5, 0.1), rtol=1e-12)


def test_scores_that_would_overflow_are_finite_and_right(tmp_path: Path) -> None:
    x = np.array([[-1000.0], [1000.0], [-2000.0], [3000.0]])
    y = np.array([0, 1, 0, 1])
    result = learn(save(tmp_path / "far.npz", x=x, y=y), rate=10.0, max_iterations=3, tolerance=0.0)
    assert np.isfinite(result["weight"]).all()
    assert result.values == {"log_loss": 0.0, "accuracy": 1.0}
    wrong = learn(save(tmp_path / "wrong.npz", x=x, y=np.array([0, 1, 1, 1])), rate=10.0, max_iterations=1)
    margin = -2000 * wrong["weight"][0] + wrong["weight"][1]
    assert wrong.values["log_loss"] == pytest.approx(-margin / 4, rel=1e-12)


def test_a_single_label_is_learned(tmp_path: Path) -> None:
    x, _ = examples(50, 2)
    result = learn(save(tmp_path / "ones.npz", x=x, y=np.ones(50, int)), max_iterations=30)
    assert result.values["accuracy"] == 1.0 and result["weight"][-1] > 0


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_command_line_writes_weights_predictions_and_scores(
    data: tuple[str, np.ndarray, np.ndarray], tmp_path: Path, ranks: int
) -> None:
    path, x, y = data
    weights, chances, summary = (tmp_path / name for name in ("w.csv", "p.npz", "run.json"))
    words = ["-m", "iterreduce", str(ROOT / "apps" / "logistic_regression.py"), path, "--quiet"]
    words += ["--rate", "0.5", "--tolerance", "0", "--max-iterations", "20", "--summary", str(summary)]
    for more in (["--out", str(weights)], ["--predict", path, "--test", path, "--out", str(chances)]):
        result = mpirun(ranks, *words, *more)
        assert (result.returncode, result.stderr) == (0, "")
    reference = descend(x, y, 20, 0.5)
    lines = [line.split(",") for line in weights.read_text().split()]
    assert lines[0] == ["feature", "weight"] and [line[0] for line in lines[1:]][-1] == "intercept"
    np.testing.assert_allclose([float(line[1]) for line in lines[1:]], reference, rtol=1e-12)
    p = 1 / (1 + np.exp(-(x @ reference[:-1] + reference[-1])))
    with np.load(chances) as found:
        np.testing.assert_allclose(found["probability"], p, rtol=1e-10)
        assert found["label"].tolist() == (p > 0.5).astype(int).tolist()
    told = json.loads(summary.read_text())
    assert told["app"] == "logistic_regression" and told["ranks"] == ranks
    assert told["values"]["accuracy"] == told["values"]["test_accuracy"] == ((p > 0.5) == y).mean()


# ---------------------------------------------------------------- what it refuses


def refused(kind: type[Exception], path: str, ranks: int = 1, **options: Any) -> str:
    with pytest.raises(kind) as told:
        learn(path, ranks, **options)
    return str(told.value)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_the_first_row_with_another_label_is_named(tmp_path: Path, ranks: int) -> None:
    x, y = examples(2000, 2)
    y[1234], y[1500] = 2, -1
    text = refused(ir.InputError, save(tmp_path / "rows.npz", x=x, y=y), ranks)
    assert "rows.npz row 1234 has the label y=2; wanted 0 or 1" in text


@pytest.mark.parametrize(("column", "value"), [("x", np.nan), ("x", np.inf), ("y", np.nan)])
def test_a_value_that_is_not_finite_is_named_by_its_row(tmp_path: Path, column: str, value: float) -> None:
    x, y = examples(1000, 2)
    columns = {"x": x, "y": y.astype(float)}
    columns[column][700] = value
    text = refused(ir.InputError, save(tmp_path / "rows.npz", **columns), 2)
    assert f"rows.npz row 700 of {column} holds {value}" in text


def test_test_rows_and_new_rows_must_have_the_same_features(
    data: tuple[str, np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    x, y = examples(10, 4)
    other = save(tmp_path / "test.npz", x=x, y=y)
    for option in ("test", "predict"):
        text = refused(ir.InputError, data[0], 2, **{option: other})
        assert "test.npz has 4 features, the training rows have 5; give the same columns" in text


def test_rows_without_labels_or_without_features_are_refused(tmp_path: Path) -> None:
    x, y = examples(10, 2)
    assert '"y"' in refused(ir.IterReduceError, save(tmp_path / "unlabelled.npz", x=x, z=y))
    assert "no column beside y" in refused(ir.InputError, save(tmp_path / "bare.npz", y=y))


def test_no_rows_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "none.npz", x=np.zeros((0, 2)), y=np.zeros(0))
    assert "there are no rows to learn from" in refused(ir.IterReduceError, path, 2)


@pytest.mark.filterwarnings("ignore:overflow")
def test_steps_that_are_too_long_say_so(data: tuple[str, np.ndarray, np.ndarray]) -> None:
    text = refused(ir.UsageError, data[0], 2, rate=1e308, l2=10.0)
    assert "--rate 1e+308 is too large for these rows; make it smaller, or give --standardize" in text
    for wrong in ({"rate": 0.0}, {"rate": -1.0}, {"rate": np.nan}, {"l2": -1.0}):
        assert "wanted --rate above 0" in refused(ir.UsageError, data[0], **wrong)
