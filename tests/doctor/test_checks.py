"""What `doctor` makes of facts: every check with facts that it must object to, and with none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from iterreduce.doctor import checks
from iterreduce.doctor.checks import BROKEN, CARE, CHECKS, OK, Check, Finding, Findings, judge
from iterreduce.doctor.facts import Facts
from iterreduce.doctor.meeting import Meeting

SOFTWARE = dict.fromkeys(("iterreduce", "Python", "interpreter", "numpy", "numba", "mpi4py"), "1.0")
MPI = {"library": "MPICH Version: 5.0.2", "standard": [5, 0], "threads": "funneled", "tolerant": False}
GIB = 2**30


def rank(number: int = 0, host: str = "a", **changes: Any) -> Facts:
    """One of four, two on each of the nodes a and b, of which everything is well."""
    well = Facts(
        host=host,
        rank=number,
        launched=4,
        ranks_here=2,
        first_here=number % 2 == 0,
        software=SOFTWARE,
        cores=[number % 2],
        quota=None,
        variables={},
        shared={"total": 8 * GIB, "free": 7 * GIB, "left": []},
        cache={"path": "/tmp/k", "kind": "ext4", "free": GIB, "writable": True, "files": 3, "own": True},
        hdf5="2.0.0",
        slurm={},
        directory={"path": "/d", "kind": "lustre", "free": 9 * GIB, "writable": True, "made_in": None},
    )
    return replace(well, **changes)


def crew(**changes: Any) -> list[Facts]:
    """All four; the changes are those of node b."""
    return [rank(0), rank(1), rank(2, "b", **changes), rank(3, "b", **changes)]


def found(everybody: list[Facts] | None = None, **changes: Any) -> Findings:
    ranks = crew() if everybody is None else everybody
    told = {"clocks": [100.0] * 4, "sees": [True] * 4, "mpi": MPI, "size": 4} | changes.pop("met", {})
    met = Meeting(facts=ranks, **told)
    return Findings(**{"mine": ranks[0], "met": met, "directory": "/d"} | changes)


def bad(check: Check, findings: Findings) -> list[Finding]:
    return [finding for finding in check(findings) if finding.verdict != OK]


def test_where_all_is_well_nothing_is_objected_to() -> None:
    assert {finding.verdict for finding in judge(found())} == {OK}
    alone = rank(launched=None, ranks_here=None)
    tried = Meeting(size=2, mpi=MPI, seconds=1.0)
    made = Findings(alone, Meeting(size=1, facts=[alone], mpi=MPI, clocks=[1.0]), tried, "mpirun")
    assert {finding.verdict for finding in judge(made)} == {OK}


#: By check: facts that it must object to, how badly, and words that it must say.
OBJECTIONS: list[tuple[str, Findings, str, str]] = [
    ("launcher", found(met={"size": 1}), BROKEN, "started 4 processes, and MPI sees 1"),
    ("launcher", found(met={"problem": "after 30 s the ranks have not met"}), BROKEN, "after 30 s"),
    ("launcher", found([rank(software=SOFTWARE | {"mpi4py": "missing"})]), BROKEN, "there is no mpi4py"),
    (
        "launcher",
        found([rank(launched=None, software=SOFTWARE | {"mpi4py": "missing"})]),
        CARE,
        "there is no mpi4py",
    ),
    ("trial", found(tried=Meeting(size=1), launcher="srun --mpi=none"), BROKEN, "of 2 ranks each sees 1"),
    (
        "trial",
        found(tried=Meeting(problem="not enough slots"), launcher="mpirun"),
        BROKEN,
        "not enough slots",
    ),
    ("mpi", found(met={"mpi": MPI | {"threads": "single"}}), BROKEN, "single"),
    (
        "software",
        found(crew(software=SOFTWARE | {"numpy": "2.0"})),
        BROKEN,
        "numpy differs: 1.0 on a; 2.0 on b",
    ),
    ("software", found(crew(software={**SOFTWARE, "numba": "missing"})), BROKEN, "missing on b"),
    ("software", found([rank(software=SOFTWARE | {"numpy": "missing"})]), BROKEN, "there is no numpy"),
    ("hdf5", found(crew(hdf5="cannot be loaded")), BROKEN, "b: h5py cannot be loaded"),
    ("threads", found(crew(variables={"OMP_NUM_THREADS": "8"})), CARE, "b: OMP_NUM_THREADS=8 for each of 2"),
    ("threads", found(crew(variables={"ITERREDUCE_THREADS": "2"})), CARE, "b: ITERREDUCE_THREADS=2"),
    ("cores", found(crew(cores=[0])), CARE, "b: 2 ranks on 1 cores"),
    ("cores", found(crew(quota=1.5)), CARE, "b: the control group grants 1.5 cores to 2 ranks"),
    (
        "shared_memory",
        found(crew(shared={"total": 2**26, "free": 2**26, "left": []})),
        CARE,
        "b: 64.0 MiB free",
    ),
    (
        "shared_memory",
        found(crew(shared={"total": 2**33, "free": 2**20, "left": []})),
        BROKEN,
        "b: 1.0 MiB free",
    ),
    (
        "shared_memory",
        found(crew(shared={"total": 2**33, "free": 2**33, "left": ["mpich_7"]})),
        CARE,
        "mpich_7",
    ),
    (
        "kernels",
        found(crew(cache=rank().cache | {"writable": False})),
        BROKEN,
        "b: compiled kernels in /tmp/k",
    ),
    ("kernels", found(crew(cache=rank().cache | {"kind": "nfs4"})), CARE, "on nfs4"),
    (
        "slurm",
        found([rank(variables={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"})]),
        CARE,
        "is for 8 tasks, and 4",
    ),
    (
        "slurm",
        found([rank(launched=None, variables={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"})]),
        CARE,
        "one process without a launcher",
    ),
    (
        "slurm",
        found(
            [rank(slurm={"version": "22", "types": ["pmi2"]})], met={"mpi": MPI | {"library": "Open MPI v5"}}
        ),
        CARE,
        "does not speak PMIx",
    ),
    ("clock", found(met={"clocks": [9.0, 9.0, 14.5, 9.0]}), CARE, "b is 5.5 s ahead of a"),
    (
        "directory",
        found(met={"sees": [True, True, False, False]}),
        BROKEN,
        "/d on b is another one than on a",
    ),
    ("directory", found(crew(directory=rank().directory | {"writable": False})), BROKEN, "written to on b"),
    ("directory", found(crew(directory=rank().directory | {"kind": "tmpfs"})), CARE, "in memory (tmpfs)"),
    ("directory", found(crew(directory=rank().directory | {"free": 2**20})), CARE, "b: 1.0 MiB free"),
]


@pytest.mark.parametrize(
    ("name", "findings", "verdict", "words"), OBJECTIONS, ids=[f"{o[0]}-{o[3][:24]}" for o in OBJECTIONS]
)
def test_a_check_objects_in_words_that_name_the_node_and_what_to_do(
    name: str, findings: Findings, verdict: str, words: str
) -> None:
    objections = bad(getattr(checks, name), findings)
    assert any(words in one.text and one.verdict == verdict for one in objections), objections
    assert all(one.advice for one in objections)


def test_every_check_has_facts_that_it_objects_to() -> None:
    assert {check.__name__ for check in CHECKS} == {name for name, *_ in OBJECTIONS}


def test_a_directory_that_is_not_there_is_told_with_where_it_would_be_made() -> None:
    below = rank(directory=rank().directory | {"made_in": "/"})
    (told,) = checks.directory(found([below]))
    assert told.verdict == OK and "/d: not there yet, would be made in /: lustre" in told.text
    (told,) = checks.directory(found([below], directory="/no/d"))
    assert told.verdict == checks.BROKEN and "/no/d is not there, nor /no" in told.text


def test_an_old_mpi_is_told_and_is_no_fault() -> None:
    told = list(checks.mpi(found(met={"mpi": MPI | {"standard": [3, 1]}})))
    assert [one.verdict for one in told] == [OK, OK] and "no persistent collectives" in told[1].text


def test_what_cannot_be_known_is_not_judged() -> None:
    """No launcher, no MPI, nothing looked at."""
    blank = rank(launched=None, shared={}, cache={}, hdf5=None, directory={}, software=dict(SOFTWARE))
    assert BROKEN not in {finding.verdict for finding in judge(Findings(blank, Meeting()))}
