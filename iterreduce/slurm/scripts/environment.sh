# shellcheck shell=bash
# What ranks of iterreduce need around them inside a Slurm job. run.sbatch, requeue.sbatch and array.sbatch read
# it; `python -m iterreduce submit` writes it into the scripts that it makes. Edit it for your site.
#
# Chosen by you, before this is read or in the environment of sbatch; guessed below where they are not set:
#   PYTHON     the interpreter that has iterreduce
#   LAUNCHER   what starts the ranks, such as "srun --mpi=pmix"; words are split at spaces
#   SCRATCH    a directory of the node's own, on every node; with --memory, rows that do not fit go there

# Modules of your site come first, since they change PATH:
# module purge && module load python openmpi

PYTHON=${PYTHON:-python3}

# Threads. Ranks, and the threads that iterreduce starts itself, are what works in parallel. A linear algebra
# library that starts its own beside them, as a login profile may have asked, only makes all of them wait.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export ITERREDUCE_THREADS=$SLURM_CPUS_PER_TASK
    # since Slurm 22.05 srun does not take this from sbatch any more
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

# Scratch. Compiled kernels go to the temporary directory, and ranks of a node wait for each other's with locks:
# fast on a node's own disk, slow or broken on a home that a thousand ranks share.
local_scratch() {
    local place
    for place in "${SCRATCH:-}" "${SLURM_TMPDIR:-}" "${TMPDIR:-}" /tmp; do
        [ -n "$place" ] && [ -d "$place" ] && [ -w "$place" ] || continue
        case $(stat -f -c %T "$place" 2>/dev/null) in
            nfs* | lustre | gpfs | beegfs | ceph | fhgfs | panfs | afs | smb* | cifs) ;;
            *) printf '%s\n' "$place" && return ;;
        esac
    done
    printf '/tmp\n'
}
TMPDIR=$(local_scratch)
export TMPDIR
unset NUMBA_CACHE_DIR # a profile's, in the home perhaps: iterreduce makes one in TMPDIR
# Some parallel file systems refuse HDF5's locks. Checkpoints do not need them: they have a fence of their own.
export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-BEST_EFFORT}
ulimit -c 0 # ranks that are killed shall not fill the disk with their memory

# Launcher. It has to speak the language of the MPI that mpi4py was built for. With another one each rank would
# be a world of its own; iterreduce notices that and says so.
mpi_library() {
    "$PYTHON" -c 'import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().split("\n")[0].strip("\0"))'
}

choose_launcher() {
    local library mpirun bound='' cpus=${SLURM_CPUS_PER_TASK:-1}
    library=$(mpi_library) || return
    mpirun=$(dirname "$(command -v "$PYTHON")")/mpirun # that of a wheel lies beside Python
    # each rank on cores of its own, where this Slurm gives cores to jobs
    if scontrol show config | grep '^TaskPlugin .*\(affinity\|cgroup\)' >/dev/null; then bound=1; fi
    # A rank that is killed would leave the others waiting for it: a minute after the first has ended, all do.
    # Not at once, which is --kill-on-bad-exit: ranks that save and leave with 75 need not leave together.
    LAUNCHER=(srun --kill-on-bad-exit=0 --wait=60 ${bound:+--cpu-bind=cores})
    case $library in
        "Open MPI"*)
            # srun passes every signal on to the ranks. mpirun kills them soon after a SIGTERM, which is how Slurm
            # announces a preemption; it is for sites whose Slurm has no PMIx.
            if srun --mpi=list 2>&1 | grep -w pmix >/dev/null; then
                LAUNCHER+=(--mpi=pmix)
            else
                [ -x "$mpirun" ] || mpirun=mpirun
                LAUNCHER=("$mpirun" -n "${SLURM_NTASKS:-1}" ${bound:+--map-by "slot:PE=$cpus"})
            fi
            ;;
        *CRAY*) ;; # the site's default is the right one
        *)         # MPICH and its kin: Intel MPI (which also wants I_MPI_PMI_LIBRARY), MVAPICH
            if [ -x "$mpirun" ]; then
                # With the wheel `srun --mpi=pmi2` was seen to fail at times ("value not properly terminated in
                # client request"). Its own mpirun knows Slurm.
                LAUNCHER=("$mpirun" -n "${SLURM_NTASKS:-1}" ${bound:+-bind-to "core:$cpus"})
                # by srun, too, which would wait for ever for a daemon whose node or watcher was lost
                export SLURM_WAIT=${SLURM_WAIT:-60}
            else
                LAUNCHER+=(--mpi=pmi2)
            fi
            ;;
    esac
}

if [ -z "${LAUNCHER:-}" ]; then
    choose_launcher || {
        echo "$PYTHON cannot import mpi4py: set PYTHON to the interpreter that has iterreduce" >&2
        exit 1
    }
else
    read -r -a LAUNCHER <<<"$LAUNCHER"
fi
