"""What is read off expressions and changed in them: the columns they name, parts, other names.

Nothing is computed or typed here, and no operation means anything. Who speaks to it: `linkprogram` (what a
joined table decides alone), `folding`, and whoever rewrites plans.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping

from iterreduce.columns.expressions import Apply, Column, Expr, Parameter, key_of


def walk(tree: Expr) -> Iterator[Expr]:
    """The tree and all its parts, each before its own parts, from left to right.

    >>> from iterreduce.columns.expressions import col
    >>> list(walk(col("a") + 1))
    [(a + 1), a, 1]
    """
    yield tree
    if isinstance(tree, Apply):
        for part in tree.arguments:
            yield from walk(part)


def columns_of(tree: Expr) -> tuple[str, ...]:
    """The columns that it reads, in the order of their first use.

    >>> from iterreduce.columns.expressions import col
    >>> columns_of(col("b") + col("a") * col("b"))
    ('b', 'a')
    """
    return tuple(leaf.name for leaf in leaves(tree) if isinstance(leaf, Column))


def parameters_of(tree: Expr) -> tuple[Parameter, ...]:
    """The parameters that it needs, each name once, in the order of their first use."""
    return tuple(leaf for leaf in leaves(tree) if isinstance(leaf, Parameter))


def leaves(tree: Expr) -> tuple[Column | Parameter, ...]:
    """Its columns and parameters, each name once, in the order of their first use; remembered by the tree."""
    if isinstance(tree, Apply):
        found: tuple[Column | Parameter, ...] | None = tree.__dict__.get("_leaves")
        if found is None:
            named: dict[tuple[type, str], Column | Parameter] = {}
            for leaf in (leaf for part in tree.arguments for leaf in leaves(part)):
                named.setdefault((type(leaf), leaf.name), leaf)
            found = tuple(named.values())
            object.__setattr__(tree, "_leaves", found)
        return found
    return (tree,) if isinstance(tree, Column | Parameter) else ()


def substitute(tree: Expr, trees: Mapping[str, Expr]) -> Expr:
    """The tree with these columns replaced by trees; what does not change is the same object.

    >>> from iterreduce.columns.expressions import col
    >>> substitute(col("a") + col("b"), {"a": col("x") * 2})
    ((x * 2) + b)
    """
    if isinstance(tree, Column):
        return trees.get(tree.name, tree)
    return rebuilt(tree, lambda part: substitute(part, trees))


def renamed(tree: Expr, names: Mapping[str, str]) -> Expr:
    """The tree with these columns under other names: ``{old: new}``."""
    return substitute(tree, {old: Column(new) for old, new in names.items()})


def rebuilt(tree: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """The tree with each argument changed; itself where none is."""
    if not isinstance(tree, Apply):
        return tree
    arguments = [change(part) for part in tree.arguments]
    if all(new is old for new, old in zip(arguments, tree.arguments, strict=True)):
        return tree
    return tree.of(arguments)


def split(tree: Expr, here: Collection[str], names: Callable[[int], str]) -> tuple[Expr, dict[str, Expr]]:
    """The tree with its largest parts that read columns of ``here`` alone replaced by columns ``names(i)``.

    Returns the rest, and what each new column stands for; equal parts become one.

    >>> from iterreduce.columns.expressions import col
    >>> rest, parts = split(col("rank") / col("degree") * col("w"), {"rank", "degree"}, "v{}".format)
    >>> rest, parts
    ((v0 * w), {'v0': (rank / degree)})
    """
    found: dict[Hashable, tuple[str, Expr]] = {}
    rest = _split(tree, set(here), found, names)
    return rest, dict(found.values())


def _split(
    tree: Expr, here: set[str], found: dict[Hashable, tuple[str, Expr]], names: Callable[[int], str]
) -> Expr:
    read = columns_of(tree)
    if read and set(read) <= here:
        name, _ = found.setdefault(key_of(tree), (names(len(found)), tree))
        return Column(name)
    return rebuilt(tree, lambda part: _split(part, here, found, names))


def is_monotone(tree: Expr, name: str) -> bool:
    """Does the value surely never fall where this column rises? (It may, and this says no.)

    >>> from iterreduce.columns.expressions import col, maximum
    >>> is_monotone(maximum(col("x") + col("w"), 3) - col("v"), "x"), is_monotone(1 - col("x"), "x")
    (True, False)
    """
    if name not in columns_of(tree) or isinstance(tree, Column):
        return True
    if not isinstance(tree, Apply):
        return False
    first, *rest = tree.arguments
    if tree.operation in ("add", "minimum", "maximum"):
        return all(is_monotone(part, name) for part in tree.arguments)
    if tree.operation == "subtract":
        return is_monotone(first, name) and all(name not in columns_of(part) for part in rest)
    if tree.operation == "where":
        return name not in columns_of(first) and all(is_monotone(part, name) for part in rest)
    return False


def with_parameters(tree: Expr, numbers: Mapping[str, Expr]) -> Expr:
    """The tree with other numbers under these names."""
    if not any(p.name in numbers for p in parameters_of(tree)):
        return tree
    if isinstance(tree, Apply):
        return rebuilt(tree, lambda part: with_parameters(part, numbers))
    return numbers.get(tree.name, tree) if isinstance(tree, Parameter) else tree
