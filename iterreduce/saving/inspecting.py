"""What stands in a checkpoint directory, as text for a person: the job, its attempts, its checkpoints.

It only reads. It takes nothing over, so it may look while a job runs: what that drops meanwhile is said, and
if another run takes the directory over in the middle, it looks again. It trusts nothing that it reads: what
is damaged is told, and text out of files is shown with its control characters spelled out.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from iterreduce.errors import CheckpointError
from iterreduce.saving.directory import (
    FINISHED,
    FORMAT,
    HISTORY,
    MARKER,
    WRITING,
    Attempt,
    Entry,
    History,
    attempts_in,
    entries_in,
    finished_in,
    is_ours,
    published_in,
)
from iterreduce.saving.manifest import MANIFEST, TableInfo
from iterreduce.saving.reading import Checkpoint, check_sizes, compare, load, verify
from iterreduce.saving.sealing import Damaged

MOST_LOOKS = 20
# Of the lists in a file that anybody may have written, only so many entries are shown.
MOST_SHOWN = 100
MOST_TEXT = 200
#: A fact of a stopping rule, and those that say nothing to a person.
_RULE = re.compile(r"(?P<rule>(?:.*: )?until\.\d+)\.(?P<field>\w+)(?:\.\d+)?\Z", re.DOTALL)
_NOT_CHOSEN = ("outcome", "width")


class _TakenOver(Exception):
    """The attempt's directory has another name by now."""


def describe(directory: str | os.PathLike[str], verify: bool = True) -> tuple[str, bool]:
    """What stands in the directory, in lines, and whether all of it is good.

    `verify`: read every byte and compare checksums; otherwise only manifests and the sizes of files are
    looked at. Raises nothing for what it finds: a directory of another kind is told and not good.

    >>> import tempfile
    >>> from iterreduce.collectives import SoloGroup
    >>> place = tempfile.mkdtemp()
    >>> describe(place)[0] == f"{place}: nothing was saved here yet\\n"
    True
    >>> attempt = Attempt.open(SoloGroup(), place)
    >>> attempt.note(iteration=0, seconds=2.5, end="stopped")
    >>> print(describe(place)[0])  # doctest: +ELLIPSIS
    /...
      attempt 1: began ... on ... (1 rank), ran for 2.5 s, finished no iteration, stopped
      no checkpoint is published
      the job has not finished: the next run begins anew
    <BLANKLINE>
    """
    path = os.path.abspath(os.fspath(directory))
    for _ in range(MOST_LOOKS):
        try:
            lines, good = _described(path, verify)
        except _TakenOver:
            continue
        except (CheckpointError, Damaged) as problem:
            lines, good = [str(problem)], False
        except OSError as error:
            lines, good = [f"{path}: {error.strerror or error}"], False
        return "".join(f"{line}\n" for line in lines), good
    return f"{path}: other runs take it over all the time\n", False


def _described(path: str, verified: bool) -> tuple[list[str], bool]:
    marked, numbers = is_ours(path), attempts_in(path)
    if not numbers:
        return [f"{path}: nothing was saved here yet"], True
    attempt = Attempt(path, numbers[-1])
    found = _Found(attempt, verified)
    try:
        found.look()
    except FileNotFoundError:
        raise _TakenOver from None
    if not os.path.isdir(attempt.path):
        raise _TakenOver
    head = [f"{path}: checkpoints of {found.job}, format {FORMAT}", *found.given]
    if not marked:
        head.append(f"  {MARKER} is missing; the next run writes it")
    head += [f"  attempt-{n:06d} is left out: a copy, beside attempt {numbers[-1]}" for n in numbers[:-1]]
    return head + found.lines, found.good


class _Found:
    """What one look at an attempt's directory found, in lines."""

    def __init__(self, attempt: Attempt, verified: bool):
        self.attempt, self.verified = attempt, verified
        self.lines: list[str] = []
        self.job = "a job"
        self.given: list[str] = []
        self.good = True
        self._newest: Checkpoint | None = None
        self._last = 0  # the newest that the history says was published

    def look(self) -> None:
        self._attempts()
        numbers = published_in(self.attempt.path)
        for number in numbers:
            self._checkpoint(number)
        if not numbers:
            self._say("no checkpoint is published")
        self._drafts()
        self._end(bool(numbers))

    def _say(self, line: str, depth: int = 1) -> None:
        self.lines.append("  " * depth + line)

    def _bad(self, line: str) -> None:
        self.good = False
        self._say(line)

    def _attempts(self) -> None:
        try:
            entries = entries_in(self.attempt.path)
        except Damaged as damage:
            if os.path.isdir(self.attempt.path):
                self._bad(f"the history of attempts is lost: {HISTORY}: {shown(damage)}")
            return
        self._last = History(tuple(entries)).published
        if len(entries) > MOST_SHOWN:
            self._say(f"{len(entries) - MOST_SHOWN} earlier attempts are not shown")
        for entry in entries[-MOST_SHOWN:]:
            self._say(_attempt_line(entry, entry.number == self.attempt.number))

    def _checkpoint(self, number: int) -> None:
        place = self.attempt.place(number)
        try:
            checkpoint = load(place)
            self._say(f"checkpoint {number}: {_standing(checkpoint)}")
            self._say(_writers(checkpoint), 2)
            state = self._checked(checkpoint)
        except (Damaged, OSError, MemoryError) as damage:
            if os.path.isdir(place):
                self._bad(f"checkpoint {number} is BAD: {shown(str(damage) or type(damage).__name__)}")
            elif os.path.isdir(self.attempt.path):
                self._say(f"checkpoint {number} was dropped in this moment, as newer ones stand")
            return
        self._say(state, 2)
        for line in _limited(list(checkpoint.tables.values()), _table_line, "tables"):
            self._say(line, 2)
        if self._newest is None:
            self._newest = checkpoint
            self._learn(checkpoint.facts)

    def _learn(self, facts: Mapping[str, Any]) -> None:
        """What the job is."""
        job = _mapped(facts.get("job"))
        name = str(_mapped(job.get("loop")).get("name", "'a loop'")).strip("'")
        self.job = f'the loop "{shown(name)}"'
        self.given = ["  " + line for line in _given(job)]

    def _checked(self, checkpoint: Checkpoint) -> str:
        if self.verified:
            compare(checkpoint, verify(checkpoint))
            return "good: every byte fits its checksum"
        check_sizes(checkpoint)
        return "not verified; its manifest is good and its files have their sizes"

    def _drafts(self) -> None:
        for name in sorted(os.listdir(self.attempt.path)):
            if name.startswith(WRITING):
                self._say(f"{shown(name)}: being written, or left by a run that was cut off")

    def _end(self, published: bool) -> None:
        try:
            facts = finished_in(self.attempt.path)
        except Damaged as damage:
            if os.path.isdir(self.attempt.path):
                self._bad(f"the completion marker is lost: {FINISHED}: {shown(damage)}")
            facts = None
        if facts is not None:
            if self._newest is None:
                self._learn(facts)
            self._say(f"the job has finished: {_outcome(facts)}")
            for line in _limited(_rules(_mapped(facts.get("until"))), str, "stopping rules"):
                self._say(line, 2)
            if "result_sha256" in facts:
                self._say(f"digest of the result (SHA-256): {shown(facts['result_sha256'])}", 2)
        elif self._newest is not None:
            self._say(f"the job has not finished: the next run goes on from checkpoint {self._newest.number}")
        elif published:
            self._bad("no checkpoint is good: only a run with --fresh can begin anew")
        elif self._last:
            self._bad(
                f"checkpoint {self._last} was published and is gone: only a run with --fresh begins anew"
            )
        else:
            self._say("the job has not finished: the next run begins anew")


# ---------------------------------------------------------------- lines


def _attempt_line(entry: Entry, last: bool) -> str:
    ends = {
        "interrupted": "cut off",
        "ended": "ended, its results not yet marked as written",
        "taken over": f"taken over by attempt {entry.number + 1} while it ran",
    }
    end = ends.get(entry.end, entry.end)
    if entry.end == "running":
        end = "running, or cut off since" if last else "cut off"
    return (
        f"attempt {entry.number}: began {_when(entry.started)} on {shown(entry.host)} "
        f"({_count(entry.ranks, 'rank')}), {_progress(entry)}, {end}"
    )


def _progress(entry: Entry) -> str:
    """An attempt that could not tell its end has noted how far it was from time to time, or not yet."""
    if entry.end in ("running", "interrupted", "taken over"):
        if not entry.iteration:
            return "noted no iteration"
        return f"at iteration {entry.iteration:,} after {entry.seconds:.1f} s"
    reached = f"reached iteration {entry.iteration:,}" if entry.iteration else "finished no iteration"
    return f"ran for {entry.seconds:.1f} s, {reached}"


def _standing(checkpoint: Checkpoint) -> str:
    """Iteration, and the path where inner loops are open: their labels and iterations."""
    levels = [level for level in _listed(checkpoint.facts.get("levels")) if isinstance(level, dict)]
    if "levels" not in checkpoint.facts:
        return "rows that cannot be read again, saved before the first iteration"
    if not levels:
        return "of no known iteration"
    path = [f'iteration {shown(at.get("iteration"))} of "{shown(at.get("loop"))}"' for at in levels]
    return ", in it ".join(path[:MOST_SHOWN])


def _writers(checkpoint: Checkpoint) -> str:
    manifest = checkpoint.manifest
    nbytes = sum(file.nbytes for file in (*manifest.files, manifest.index))
    written = _when(os.stat(os.path.join(checkpoint.path, MANIFEST)).st_mtime)
    return (
        f"written {written} by attempt {manifest.attempt} ({_count(manifest.ranks, 'rank')}, iterreduce "
        f"{shown(manifest.written_by)}), {size(nbytes)} in {_count(len(manifest.files), 'file')}"
    )


def _table_line(table: TableInfo) -> str:
    columns = [f"{shown(name)} {field.describe()}" for name, field in table.schema.items()]
    columns = _limited(columns, str, "columns")
    where = "the same on all ranks" if table.everywhere else _dealt(table.rank_rows)
    return f'table "{shown(table.name)}": {_count(table.rows, "row")} {where}: {", ".join(columns)}'


def _dealt(rows: tuple[int, ...]) -> str:
    return f"({min(rows):,} to {max(rows):,} of each rank)" if len(rows) > 1 else "(of one rank)"


def _given(job: Mapping[str, Any]) -> Iterator[str]:
    """What the loop was given: a line for its inputs, one for what else is part of the job."""
    for part, what in (("input", "input"), ("settings", "settings")):
        facts = _mapped(job.get(part))
        told = [f"{shown(name)}: {shown(value)}" for name, value in facts.items()]
        if told:
            yield f"{what}: {', '.join(_limited(told, str, 'facts'))}"


def _outcome(facts: Mapping[str, Any]) -> str:
    """
    >>> _outcome({"outcome": "CONVERGED", "iterations": 12, "python": "3.11"})
    'CONVERGED after 12 iterations'
    """
    n = facts.get("iterations")
    after = f" after {_count(n, 'iteration')}" if isinstance(n, int) else ""
    return shown(facts.get("outcome", "with no word of its outcome")) + after


def _rules(until: Mapping[str, Any]) -> list[str]:
    """Stopping rules out of their facts, with what was chosen for them.

    >>> facts = {"kind": "'Distance'", "columns.length": "1", "columns.0": "'x'", "threshold": "0.5"}
    >>> _rules({f"until.0.{name}": value for name, value in {**facts, "table": "None"}.items()})
    ['stopping rule: Distance, columns x, threshold 0.5']
    """
    rules: dict[str, dict[str, list[str]]] = {}
    for place, value in until.items():
        match = _RULE.match(str(place))
        text = str(value).strip("'")
        if match and text != "None" and match["field"] not in _NOT_CHOSEN:
            rules.setdefault(match["rule"], {}).setdefault(match["field"], []).append(text)
    return [_rule(rule, fields) for rule, fields in rules.items()]


def _rule(place: str, fields: dict[str, list[str]]) -> str:
    inner = place.rpartition("until.")[0].removesuffix(": ")
    kind = fields.pop("kind", ["of no known kind"])
    chosen = [f"{name} {' '.join(values)}" for name, values in fields.items()]
    whose = f' of the inner loop "{inner}"' if inner else ""
    return shown(f"stopping rule{whose}: {', '.join([*kind, *chosen])}")


def _limited(things: list[Any], line: Callable[[Any], str], what: str) -> list[str]:
    more = len(things) - MOST_SHOWN
    return [line(thing) for thing in things[:MOST_SHOWN]] + ([f"and {more} more {what}"] if more > 0 else [])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapped(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _when(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "at a time that cannot be"


def size(nbytes: int) -> str:
    """Bytes for a person.

    >>> size(1), size(2539), size(45 << 20)
    ('1 byte', '2,539 bytes', '45.0 MiB')
    """
    return _count(nbytes, "byte") if nbytes < 1 << 16 else f"{nbytes / (1 << 20):,.1f} MiB"


def shown(value: object) -> str:
    r"""Text of any origin, for a terminal: nothing that moves the cursor, and not too long.

    >>> shown("größe\n\x1b[31m"), len(shown("x" * 10**6))
    ('größe\\n\\x1b[31m', 203)
    """
    text = str(value)[: MOST_TEXT + 1]
    plain = "".join(_spelled(text[:MOST_TEXT]))
    return plain + "..." if len(text) > MOST_TEXT else plain


def _spelled(text: str) -> Iterator[str]:
    for c in text:
        yield c if c.isprintable() else c.encode("unicode_escape").decode()
