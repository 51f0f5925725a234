"""Faults are data: they go through JSON unchanged, and what makes no sense is refused by name."""

from __future__ import annotations

import errno
import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterreduce.errors import UsageError
from iterreduce.events import EVENTS, PLACES, Event
from iterreduce.options import FAULTS_VARIABLE, resolve
from iterreduce.testing import (
    Delay,
    DeleteFile,
    FailCall,
    FailRename,
    Fault,
    Faults,
    FillDisk,
    FlipBit,
    Kill,
    LimitFileSize,
    Raise,
    Slow,
    Stop,
    TearFile,
)
from iterreduce.testing.faults import CALLS, KINDS, detail_of

_counts = st.integers(0, 1000)
_seconds = st.floats(0, 100) | st.integers(0, 100)
_paths = st.text(min_size=1, max_size=20)
_OWN: dict[type[Fault], dict[str, st.SearchStrategy[Any]]] = {
    Kill: {"signal": st.sampled_from(["SIGKILL", "SIGTERM", "SIGINT"]), "delay": _seconds},
    Stop: {"seconds": st.none() | _seconds},
    Raise: {"error": st.sampled_from(["ValueError", "InputError", "ENOSPC"]), "message": st.text(max_size=9)},
    Delay: {"seconds": _seconds},
    Slow: {"seconds": _seconds, "every": st.integers(1, 9)},
    TearFile: {"path": _paths, "keep": st.none() | st.integers(-9, 9)},
    FlipBit: {"path": _paths, "byte": st.none() | st.integers(-9, 9), "bit": st.none() | st.integers(0, 7)},
    DeleteFile: {"path": _paths},
    FailCall: {"call": st.sampled_from(CALLS), "error": st.sampled_from(sorted(errno.errorcode.values()))},
    FailRename: {"first": st.integers(1, 9), "times": st.none() | st.integers(1, 9)},
    FillDisk: {"free": _counts, "told": st.booleans()},
    LimitFileSize: {"size": _counts},
}


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    kind = draw(st.sampled_from(sorted(_OWN, key=lambda k: k.__name__)))
    event = draw(st.sampled_from(sorted(EVENTS)))
    place = event + draw(st.sampled_from(["", ":*", ":some: text"])) if detail_of(event) else event
    when: dict[str, Any] = {"rank": draw(st.none() | _counts), "nth": draw(st.integers(1, 99))}
    if "iteration" in EVENTS[event][0]:
        when["iteration"] = draw(st.none() | _counts)
    own = {name: draw(values) for name, values in _OWN[kind].items()}
    return kind(at=place, **when, **own)


def test_every_kind_of_fault_is_tried() -> None:
    assert set(_OWN) == set(KINDS.values())


@given(st.lists(faults(), max_size=4), st.integers(0, 2**63), st.none() | st.text(max_size=9))
def test_a_schedule_goes_through_json_unchanged(made: list[Fault], seed: int, marks: str | None) -> None:
    schedule = Faults(tuple(made), seed, marks)
    assert Faults.from_json(schedule.to_json()) == schedule
    assert Faults.from_json(json.dumps(json.loads(schedule.to_json()), indent=1)) == schedule


@given(faults(), st.sampled_from(sorted(EVENTS)), st.integers(0, 3))
def test_a_fault_is_at_events_of_its_name_and_iteration_only(fault: Fault, name: str, iteration: int) -> None:
    told = {f: iteration if f == "iteration" else "some: text" for f in EVENTS[name][0]}
    expected = fault.at.split(":")[0] == name and fault.iteration in (None, iteration)
    assert fault.is_at(Event(name, 0.0, told)) == expected


def test_a_detail_chooses_among_events_of_one_name() -> None:
    fault = Kill(at="stage.start:lloyd: Total*")
    stages = ["lloyd: Total into sums", "lloyd: Shuffle into sums", "other: Total into sums"]
    assert [fault.is_at(Event("stage.start", 0.0, {"stage": s, "iteration": 1})) for s in stages] == [1, 0, 0]
    fault = Kill(at="checkpoint.step:write.half")
    assert fault.is_at(Event("checkpoint.step", 0.0, {"number": 3, "step": "write.half"}))
    assert not fault.is_at(Event("checkpoint.step", 0.0, {"number": 3, "step": "write"}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not the JSON of a schedule"),
        ("[" * 100_000, "not the JSON of a schedule"),
        ('{"seed": NaN}', "NaN is no number"),
        ('{"seed": 1, "seed": 2}', "'seed' stands there twice"),
        ("[]", "faults: wanted an object"),
        ('{"seeds": 1}', "unknown field 'seeds'; did you mean \"seed\"?"),
        ('{"seed": "1"}', "Faults: seed is '1'; wanted int"),
        ('{"faults": {}}', "wanted a list"),
        ('{"faults": [1]}', "a fault: wanted an object"),
        ('{"faults": [{"at": "run.start"}]}', "there is no fault None"),
        ('{"faults": [{"fault": "Kil", "at": "run.start"}]}', "no fault 'Kil'; did you mean \"Kill\"?"),
        ('{"faults": [{"fault": "Kill"}]}', "Kill: wanted at"),
        ('{"faults": [{"fault": "TearFile", "at": "run.start"}]}', "TearFile: wanted path"),
        ('{"faults": [{"fault": "Kill", "at": "run.start", "rang": 1}]}', "did you mean \"rank\"?"),
        ('{"faults": [{"fault": "Kill", "at": "run.start", "rank": true}]}', "rank is True; wanted int"),
        ('{"faults": [{"fault": "Kill", "at": "run.start", "rank": 1.5}]}', "rank is 1.5; wanted int"),
        ('{"faults": [{"fault": "Kill", "at": 3}]}', "at is 3; wanted str"),
    ],
)  # fmt: skip
def test_text_that_is_no_schedule_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        Faults.from_json(text)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("kind", "given_", "said"),
    [
        (Kill, {"at": "stage.begin"}, "there is no event 'stage.begin'; did you mean"),
        (Kill, {"at": "commit.start:x"}, "commit.start has no detail to compare; leave ':x' out"),
        (Kill, {"at": "checkpoint.step", "iteration": 3}, "tells no iteration; say which by nth"),
        (Kill, {"at": "run.start", "nth": 0}, "nth is 0; wanted 1 or more"),
        (Kill, {"at": "run.start", "rank": -1}, "rank is -1; wanted 0 or more"),
        (Kill, {"at": "run.start", "signal": "SIGKIL"}, "no signal 'SIGKIL'; did you mean \"SIGKILL\"?"),
        (Delay, {"at": "run.start", "seconds": float("nan")}, "seconds is nan; wanted 0 or more"),
        (Slow, {"at": "run.start", "every": 0}, "every is 0; wanted 1 or more"),
        (Raise, {"at": "run.start", "error": "ValueEror"}, "did you mean \"ValueError\"?"),
        (FlipBit, {"at": "run.start", "path": "x", "bit": 8}, "bit is 8; wanted 0 to 7"),
        (FailCall, {"call": "fsnyc"}, "no call 'fsnyc'"),
        (FailCall, {"error": "ENOSPACE"}, "did you mean \"ENOSPC\"?"),
        (FillDisk, {"free": -1}, "free is -1; wanted 0 or more"),
    ],
)  # fmt: skip
def test_a_fault_that_makes_no_sense_is_refused(kind: type[Fault], given_: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        kind(**given_)
    assert said in str(error.value)


def test_only_known_kinds_of_faults_make_a_schedule() -> None:
    with pytest.raises(UsageError, match="wanted faults such as"):
        Faults((Fault(at="run.start"),))
    with pytest.raises(UsageError, match="wanted faults such as"):
        Faults(("Kill",))  # type: ignore[arg-type]


def test_the_environment_may_hold_a_schedule_and_no_setting_is_meant() -> None:
    schedule = Faults((Kill(at="run.start"),), seed=3)
    environment = {FAULTS_VARIABLE: schedule.to_json()}
    assert Faults.from_environment(environment) == schedule
    assert Faults.from_environment({}) == Faults()
    assert resolve(environment=environment).options == resolve(environment={}).options
    with pytest.raises(UsageError, match=f"{FAULTS_VARIABLE}: .*not the JSON"):
        Faults.from_environment({FAULTS_VARIABLE: "kill"})


def test_exceptions_are_made_by_name_from_python_this_package_and_the_operating_system() -> None:
    for name in ("ValueError", "KeyboardInterrupt", "MemoryError", "InputError", "CheckpointError"):
        made = Raise(name, "so it is", at="run.start").made()
        assert (type(made).__name__, str(made)) == (name, "so it is")
    full = Raise("ENOSPC", at="run.start").made()
    assert isinstance(full, OSError) and full.errno == errno.ENOSPC


def test_a_fault_says_itself_without_its_defaults() -> None:
    assert str(Kill(at="run.start", rank=2)) == "Kill(at='run.start', rank=2)"
    assert str(TearFile("*.h5", keep=3, at="restart")) == "TearFile(at='restart', path='*.h5', keep=3)"


def test_places_are_events_and_fields_of_faults_have_one_meaning() -> None:
    assert set(EVENTS) >= PLACES
    types: dict[str, set[str]] = {}
    for kind in KINDS.values():
        for f in fields(kind):
            types.setdefault(f.name, set()).add(str(f.type))
    assert {name: kinds for name, kinds in types.items() if len(kinds) > 1} == {
        "seconds": {"float", "float | None"}
    }
