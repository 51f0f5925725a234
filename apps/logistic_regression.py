"""Logistic regression by gradient descent: rows stay on their rank, one gradient per rank moves.

    mpirun -n 64 python -m iterreduce apps/logistic_regression.py train.h5 --rate 0.5 --out weights.csv
    python -m iterreduce apps/logistic_regression.py train.h5 --predict new.csv --out predictions.csv

Minimises the mean log-loss of labels y in {0, 1}, plus l2/2 times the squared weights (not the intercept):

    P(y = 1 | x) = 1 / (1 + exp(-(x w + b)))        w, b  <-  w, b - rate * gradient      (full batch)

With the sign s = -1 for y = 1 and +1 for y = 0, and m = s (x w + b), a row's loss is log(1 + exp(m)) and its
slope s / (1 + exp(-m)): neither subtracts numbers that are close to each other, nor can it overflow.
"""

from dataclasses import dataclass

import numpy as np

import iterreduce as ir


@dataclass(frozen=True)
class Examples:
    """A kernel, run once: features as a matrix of ``facts``' width, the label's sign beside it."""

    file: str
    labelled: bool = True

    def run(self, context: ir.Context, rows: ir.Batch, *facts: ir.Batch) -> ir.Batch:
        x = rows["x"] if rows["x"].ndim == 2 else rows["x"][:, None]
        if facts and x.shape[1] != facts[0]["mean"].shape[1]:
            wanted = facts[0]["mean"].shape[1]
            raise ir.InputError(
                f"{self.file} has {x.shape[1]} features, the training rows have {wanted}; "
                "give the same columns"
            )
        x = x if x.dtype.kind == "f" else x.astype(np.float64)
        if not self.labelled:
            return ir.Batch(x=x)
        wrong = (rows["y"] != 0) & (rows["y"] != 1)
        if wrong.any():
            row = int(wrong.argmax())
            raise ir.InputError(
                f"{self.file} row {context.first_row + row} has the label y={rows['y'][row]}; "
                "wanted 0 or 1 (rows are counted from 0)"
            )
        return ir.Batch(x=x, sign=1.0 - 2.0 * rows["y"].astype(np.float64))


def start(facts: ir.Batch) -> ir.Batch:
    """Weights of 0, the intercept last."""
    if not len(facts):
        raise ir.InputError("there are no rows to learn from; wanted at least one")
    return ir.Batch(weight=np.zeros(facts["mean"].shape[1] + 1))


def scaled(facts: ir.Batch) -> ir.Batch:
    """Standard deviations beside the means; 1 for a feature that is constant."""
    variance = facts["variance"]
    return facts.drop("variance").with_columns(scale=np.sqrt(np.where(variance > 0, variance, 1.0)))


def shifted(rows: ir.Batch, facts: ir.Batch) -> np.ndarray:
    return rows["x"] - facts["mean"] if "scale" in facts else rows["x"]


def unscaled(values: np.ndarray, facts: ir.Batch) -> np.ndarray:
    return values / facts["scale"][0] if "scale" in facts else values


def linear(x: np.ndarray, facts: ir.Batch, weights: ir.Batch) -> np.ndarray:
    """x w + b, for rows that are shifted already."""
    return x @ unscaled(weights["weight"][:-1], facts) + weights["weight"][-1]


def gradient(rows: ir.Batch, facts: ir.Batch, weights: ir.Batch) -> ir.Batch:
    """One row: the sum over these rows."""
    x, sign = shifted(rows, facts), rows["sign"]
    with np.errstate(over="ignore"):  # exp is infinite only where the slope is 0
        slope = sign / (1 + np.exp(-sign * linear(x, facts, weights)))
    return ir.Batch(gradient=np.append(unscaled(slope @ x, facts), slope.sum())[None, :])


@dataclass(frozen=True)
class Descend:
    """A kernel: one step against the gradient."""

    rate: float
    l2: float
    intercept: bool

    def run(self, context: ir.Context, total: ir.Batch, facts: ir.Batch, weights: ir.Batch) -> ir.Batch:
        old = weights["weight"]
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            uphill = total["gradient"][0] / facts["rows"][0]
            uphill[:-1] += self.l2 * old[:-1]
            uphill[-1] *= self.intercept
            new = old - self.rate * uphill
        if not np.isfinite(new).all():
            raise ir.UsageError(
                f"weights grew beyond all bounds: --rate {self.rate:g} is too large for these rows; "
                "make it smaller, or give --standardize"
            )
        return weights.with_columns(weight=new)


def score(rows: ir.Batch, facts: ir.Batch, weights: ir.Batch) -> ir.Batch:
    """Log-loss of each row, and whether its label is the likelier one."""
    margin = rows["sign"] * linear(shifted(rows, facts), facts, weights)
    loss = np.maximum(margin, 0) + np.log1p(np.exp(-np.abs(margin)))
    return ir.Batch(log_loss=loss, right=(margin < 0) | ((margin == 0) & (rows["sign"] > 0)))


def predictions(rows: ir.Batch, facts: ir.Batch, weights: ir.Batch) -> ir.Batch:
    """Probability of label 1, and the likelier label (0 where both are alike)."""
    logit = linear(shifted(rows, facts), facts, weights)
    with np.errstate(over="ignore"):
        return ir.Batch(probability=1 / (1 + np.exp(-logit)), label=(logit > 0).astype(np.int64))


def model(weights: ir.Batch, facts: ir.Batch) -> ir.Batch:
    """The weights for rows as they are in the file."""
    w, b = unscaled(weights["weight"][:-1], facts), weights["weight"][-1]
    b = b - facts["mean"][0] @ w if "scale" in facts else b
    return ir.Batch(feature=[*(f"x{i}" for i in range(len(w))), "intercept"], weight=np.append(w, b))


@ir.app
def logistic_regression(
    rows: ir.Dataset,
    rate: float = 0.1,
    l2: float = 0.0,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    standardize: bool = False,
    intercept: bool = True,
    test: ir.Dataset | None = None,
    predict: ir.Dataset | None = None,
) -> ir.Dataset:
    """Learn from ROWS which of two labels a row has.

    ROWS has a column y of labels, 0 or 1, and a column x of vectors, or other columns of numbers, all of
    which are taken. The result is a weight for each feature (x0, x1, ... in the order of the columns) and the
    intercept; with --predict FILE it is the probability of label 1, and the likelier label, of each row of
    FILE. The summary's values are log_loss and accuracy on ROWS, and with --test FILE test_log_loss and
    test_accuracy on its rows.

    Stops when a step moves the weights by at most --tolerance (root of the sum of squares). --standardize
    learns on features of mean 0 and deviation 1 (the result fits the rows as they are); --l2 then penalises
    those weights. Rows of a single label are no error: their weights grow from step to step.
    """
    if not 0 < rate < np.inf or not 0 <= l2 < np.inf:
        raise ir.UsageError(f"wanted --rate above 0 and --l2 of at least 0, got {rate:g} and {l2:g}")
    if not tolerance >= 0:
        raise ir.UsageError(f"--tolerance: wanted 0 or more, got {tolerance:g}")
    plan = Plan()
    plan.learns_from(rows, standardize)
    plan.scores("train", "")
    plan.finish.append(ir.Local(model, ("weights", "facts"), "model", cut="share"))
    if test is not None:
        plan.reads("test", test)
        plan.scores("test", "test_")
    if predict is not None:
        plan.reads("new", predict, labelled=False)
        plan.finish.append(ir.Local(predictions, ("new", "facts", "weights"), "predictions"))
    step = ir.Superstep(
        "gradient step",
        (
            ir.Local(gradient, ("train", "facts", "weights"), "gradients"),
            ir.Total("gradients", (), ir.SUM, "gradient"),
            ir.Local(Descend(rate, l2, intercept), ("gradient", "facts", "weights"), "moved", cut="share"),
        ),
        (ir.Replace("weights", "moved"),),
    )
    until = ir.Until.of(ir.l2("weight") <= tolerance, max_iterations).on("weights")
    loop = plan.loop(step, until, "model" if predict is None else "predictions")
    return ir.Dataset.of_loop(loop, rows.comm)


class Plan:
    """What runs once: before the first step, and after the last."""

    def __init__(self) -> None:
        self.inputs = ir.Inputs()
        self.prepare: list[ir.Local | ir.Total] = []
        self.finish: list[ir.Local | ir.Total] = []
        self.values: dict[str, tuple[str, str]] = {}

    def learns_from(self, rows: ir.Dataset, standardize: bool) -> None:
        """Examples, and what all ranks must know of them: how many, means, variances."""
        self.reads("train", rows)
        if standardize:
            about = {"rows": ir.count(), "mean": ir.mean("x"), "variance": ir.var("x")}
            self.prepare.append(ir.Total("train", (), about, "moments"))
            self.prepare.append(ir.Local(scaled, ("moments",), "facts", cut="share"))
        else:
            about = {"rows": ir.count(), "mean": ir.first("x")}  # any row, for its width
            self.prepare.append(ir.Total("train", (), about, "facts"))
        self.prepare.append(ir.Local(start, ("facts",), "start", cut="share"))

    def reads(self, name: str, data: ir.Dataset, labelled: bool = True) -> None:
        """Rows of a file as examples; those that are not learned from must have as many features."""
        checked = ("x", "y") if labelled else ("x",)
        source = self.inputs.rows(f"{name} rows", data.as_matrix("x", keep=("y",)).finite(*checked))
        beside = () if name == "train" else ("facts",)
        self.prepare.append(ir.Local(Examples(data.described, labelled), (source, *beside), name))

    def scores(self, name: str, prefix: str) -> None:
        means = {"log_loss": ir.mean("log_loss"), "accuracy": ir.mean("right")}
        self.finish += [
            ir.Local(score, (name, "facts", "weights"), f"{name} scored"),
            ir.Total(f"{name} scored", (), means, f"{name} score"),
        ]
        self.values |= {prefix + value: (f"{name} score", value) for value in means}

    def loop(self, step: ir.Superstep, until: ir.Until, result: str) -> ir.Loop:
        return ir.Loop(
            "logistic regression",
            self.inputs.sources,
            {"weights": ir.State("start")},
            (step,),
            until,
            result,
            prepare=(*self.inputs.prepare, *self.prepare),
            finish=tuple(self.finish),
            values=self.values,
        )
