# shellcheck shell=bash
# Starts the ranks of a job and stays with them: run_once, and run_until_done, which queues the job again.
# PYTHON and LAUNCHER come from environment.sh.

# Before the limit (`--signal=B:USR1@120` above) Slurm sends SIGUSR1 to this shell, and to nobody else. The ranks
# take it as the wish to save and stop. A trap interrupts `wait`, so run_once waits again after it.
wished='' launched='' watched=''
forward() {
    wished=1
    [ -z "$launched" ] || kill -USR1 "$launched" 2>/dev/null || true
}
trap forward USR1
# scancel and the limit itself send SIGTERM to the ranks too: they save. The shell stays to hear how they left.
trap ':' TERM

# run_once APP ARGUMENTS...: the exit status is that of the ranks.
run_once() {
    local status=0 nagging='' watching='' finished
    [ -z "$wished" ] || return 75 # there is no time left to begin
    finished=$(finished_in "$watched")
    # A signal that comes before Python is there to hold it would kill the rank: ignored until then.
    # shellcheck disable=SC2016
    "${LAUNCHER[@]}" sh -c 'trap "" USR1; exec "$0" "$@"' "$PYTHON" -m iterreduce "$@" &
    launched=$!
    if [ -n "$watched" ]; then
        let_go "$launched" "$watched" "$finished" &
        watching=$!
    fi
    while :; do
        if [ -n "$wished" ] && [ -z "$nagging" ]; then
            # Asked again: the first wish may have come before any rank could hear it. Not often: a launcher that
            # gets a signal while its ranks leave may take that for a failure.
            (while pause 30 && kill -USR1 "$launched" 2>/dev/null; do :; done) &
            nagging=$!
        fi
        status=0
        wait "$launched" || status=$?
        kill -0 "$launched" 2>/dev/null || break
    done
    # where the signal interrupted the last wait, only another one tells the status
    status=0
    wait "$launched" || status=$?
    launched=''
    # shellcheck disable=SC2086
    kill $nagging $watching 2>/dev/null || true
    return "$status"
}

# let_go LAUNCHER DIR FINISHED: end a launcher that does not leave though the ranks are done. When the watcher of a
# rank (slurmstepd) is killed, srun waits for it for ever, and so does an mpirun that started its daemons by srun.
let_go() {
    local finished
    while pause "${LOOK_SECONDS:-10}"; do
        finished=$(finished_in "$2")
        [ -n "$finished" ] && [ "$finished" != "$3" ] || continue
        pause "${LEAVE_SECONDS:-30}"
        echo "requeue: the ranks are done, and what started them does not leave: ended" >&2
        kill -TERM "$1" && pause 5 && kill -KILL "$1"
        return
    done
}

# pause SECONDS: whoever is killed meanwhile leaves a sleep behind, which holds no output open
pause() {
    sleep "$1" >/dev/null 2>&1
}

# checkpoint_dir ARGUMENTS...: what they say behind --checkpoint-dir
checkpoint_dir() {
    local found=${ITERREDUCE_CHECKPOINT_DIR:-}
    while [ $# -gt 0 ]; do
        case $1 in
            --checkpoint-dir=*) found=${1#*=} ;;
            --checkpoint-dir) found=${2:-} ;;
        esac
        shift
    done
    printf '%s\n' "$found"
}

# newest_checkpoint DIR: the number of the last that was published
newest_checkpoint() {
    local place newest=0
    for place in "$1"/attempt-*/0*; do
        [ -d "$place" ] && place=$((10#${place##*/})) && [ "$place" -gt "$newest" ] && newest=$place
    done
    printf '%d\n' "$newest"
}

# finished_in DIR: what the ranks wrote when they were done, after all else. A launcher's status does not say it:
# mpirun ends with 0 when a node dies, too, and with 1 or 137 when all is well but new ranks came for lost ones.
# One that was there before may be of a job that now goes on with other stopping rules. It moves with its directory.
finished_in() {
    stat --format='%i %.Y' "$1"/attempt-*/finished.json 2>/dev/null || true
}

# last_end DIR: how the last start ended, as far as it came to tell
last_end() {
    cat "$1"/attempt-*/attempts.json 2>/dev/null | grep -o '"end": "[a-z ]*"' | tail -n 1 || true
}

# sweep_nodes: remove shared memory that ranks of this user left when they were killed. Under srun MPICH names it by
# job and step, which are those of the attempt before: on a node that has seen that one, MPI_Init fails or hangs.
sweep_nodes() {
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --mpi=none \
        "$PYTHON" -m iterreduce doctor --sweep || echo "requeue: /dev/shm was not swept on all nodes" >&2
}

# run_until_done APP ARGUMENTS...: save before the limit, or when the job is preempted, and queue the job again
# until it is done. The ranks' exit statuses: 0 done, 75 stopped and saved, 1 and 2 failed; others mean that
# they were killed, and go on from the last checkpoint.
run_until_done() {
    local saved before after status=0 fruitless=0 why state finished_before finished
    saved=$(checkpoint_dir "$@")
    if [ -z "$saved" ]; then
        echo "requeue: nothing could go on without --checkpoint-dir DIR" >&2
        return 2
    fi
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        drop_fresh "$@" # that was for the first start
        set -- "${words[@]}"
        sweep_nodes
    fi
    before=$(newest_checkpoint "$saved") finished_before=$(finished_in "$saved")
    watched=$saved
    run_once "$@" || status=$?
    after=$(newest_checkpoint "$saved") finished=$(finished_in "$saved")
    [ "$status" != 0 ] || [ "$(last_end "$saved")" != '"end": "finished"' ] || finished_before='' # and nothing was to do
    if [ -n "$finished" ] && [ "$finished" != "$finished_before" ]; then
        rm -f "$saved.fruitless"
        return 0
    fi
    case $status in
        0) why="the launcher says that all is well, and no rank said that the job has finished" ;;
        75) why="stopped and saved" ;;
        1 | 2) # the ranks said why, and it would be the same again
            [[ $status = 1 && " $* " = *" --respawn"* ]] || return "$status"
            why="mpirun ends with 1, which may mean no more than that new ranks came"
            ;;
        *) why="ranks were lost (status $status)" ;;
    esac
    # cancelled by scancel, it also was stopped and saved: a requeue would bring it back
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null | grep -o 'JobState=[A-Z_]*' || true)
    if [ "$state" != JobState=RUNNING ]; then
        echo "requeue: $why, and not queued again: ${state:-Slurm does not answer}" >&2
        return "$((status == 0 ? 1 : status))"
    fi
    # a limit that is too short even for one iteration, or a rank that always dies, must not go on for ever
    if [ "$after" = "$before" ]; then
        fruitless=$(($(cat "$saved.fruitless" 2>/dev/null || echo 0) + 1))
        echo "$fruitless" >"$saved.fruitless"
    else
        rm -f "$saved.fruitless"
    fi
    if [ "$fruitless" -ge "${MOST_FRUITLESS:-3}" ]; then
        echo "requeue: $why; $fruitless attempts in a row published no checkpoint: given up" >&2
        rm -f "$saved.fruitless"
        return "$((status == 0 ? 1 : status))"
    fi
    echo "requeue: $why; queued again after checkpoint $after" >&2
    if scontrol requeue "$SLURM_JOB_ID"; then
        # Slurm ends this shell.
        trap - TERM USR1
        sleep 120
    fi
    echo "requeue: Slurm did not queue the job again; submit the same script again and it goes on" >&2
    return "$((status == 0 ? 1 : status))"
}

# drop_fresh ARGUMENTS...: all but --fresh, in `words`
drop_fresh() {
    local word
    words=()
    for word in "$@"; do
        [ "$word" = --fresh ] || words+=("$word")
    done
}
