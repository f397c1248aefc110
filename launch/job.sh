# shellcheck shell=bash
# Functions of train.sbatch and evaluate.sbatch, which source this file in a job.
#     run_job ENTRY.py ARGUMENT...
# checks the nodes, starts one launcher per node, passes on a preemption signal, waits, reads how all processes ended,
# prints it in one line, and exits or requeues the job. LAUNCHER is torchrun or deepspeed.

source launch/allocation.sh

say() { echo "[$(date '+%F %T') job $SLURM_JOB_ID] $*"; }
die() { say "error: $*" >&2; exit 2; }

# A task of an array has an id of its own: the id of the array means all tasks.
job=$SLURM_JOB_ID
[[ -z ${SLURM_ARRAY_TASK_ID-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
restart=${SLURM_RESTART_COUNT:-0}
# The CPUs of the node with the fewest, out of "96(x3),48".
cpus=$(tr ',' '\n' <<< "${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-1}}" | sed 's/(.*//' | sort -n | head -n 1)
share=$((cpus > processes ? cpus / processes : 1)) # CPUs of each process
job_dir=$JOBS_DIR/$SLURM_JOB_ID
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$share}"
export GCVIT_REPORT_DIR="$job_dir/restart_$restart" NODES="${nodes[*]/%/$NODE_NAME_SUFFIX}"
export LAUNCHER="${LAUNCHER:-torchrun}"
mkdir -p "$GCVIT_REPORT_DIR" || die "cannot write JOBS_DIR=$JOBS_DIR; hint: set it in launch/env.sh"
rm -f "$GCVIT_REPORT_DIR"/*
((restart)) || rm -f "$job_dir/failures" # of an older job with this id

# One task per node, with all of its CPUs. A task that fails ends the others, which could wait for it forever.
per_node=(srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --cpus-per-task="$cpus"
    --cpu-bind=none --kill-on-bad-exit=1)

# The preemption signal (--signal=B:USR1@120, or SLURM's SIGTERM) only sets a flag: the loops below act on it.
is_preempted=0
trap 'is_preempted=1' USR1 TERM

run_job() {
    say "restart $restart: $1 on ${#nodes[@]} x $processes processes with $share CPUs each: ${nodes[*]}"
    [[ $PREFLIGHT == off ]] || check_nodes "$@"
    ((!is_preempted)) || stop_early
    "${per_node[@]}" launch/node.sh "$@" &
    local step=$! nap code=0
    while kill -0 "$step" 2> /dev/null; do # wait also returns at a signal
        sleep 3 & nap=$!
        wait -n "$step" "$nap" || true
        kill "$nap" 2> /dev/null || true
        # Repeatedly: a process that is still starting loses it, and a second signal changes nothing.
        if ((is_preempted)); then scancel --signal=USR1 "$job" || true; fi
    done
    wait "$step" || code=$?
    conclude "$code"
}

# Runs what precedes the training. A preemption ends it: a restart would do it again anyway.
before_training() {
    "$@" &
    local step=$! code=0
    wait "$step" || code=$?
    if ((is_preempted)); then
        kill "$step" 2> /dev/null || true
        stop_early
    fi
    return "$code"
}

stop_early() { # counted: a job that is always preempted this early would restart forever
    say "preempted: before the training began"
    restart_after "preempted before the training began" ""
}

check_nodes() {
    local code=0
    before_training launch/preflight.sh "$@" || code=$?
    case $code in
        0) ;;
        2) exit 2 ;;
        *) restart_after "the pre-flight failed" "$(cat "$GCVIT_REPORT_DIR/bad_nodes" 2> /dev/null || true)" ;;
    esac
}

# Exits or requeues by how the processes ended; $1 is the exit code of srun.
conclude() {
    local code=0 verdict
    verdict=$("$PYTHON" launch/job_outcome.py "$GCVIT_REPORT_DIR" "$processes" "$1" "${nodes[@]}") || code=$?
    # The signal kills a process that has not yet installed its handler.
    ((!is_preempted)) || [[ $verdict != "no process left a report"* ]] || verdict="preempted: before the training began"
    say "$verdict"
    case $code in
        0 | 2) exit "$code" ;;
        75) requeue "" ;;
        *) restart_after "$verdict" "" ;;
    esac
}

# Requeues after a crash, a hang or bad nodes ($2), a limited number of times a day: a long run on many nodes has a few.
restart_after() {
    local failures=0 now
    now=$(date +%s)
    [[ ! -f $job_dir/failures ]] || failures=$(awk -v since=$((now - 86400)) '$1 > since' "$job_dir/failures" | wc -l)
    if ((failures >= MAX_RESTARTS)); then
        say "not requeued: $failures restarts after failures within a day, MAX_RESTARTS=$MAX_RESTARTS"
        exit 1
    fi
    echo "$now $1" >> "$job_dir/failures"
    say "restart $((failures + 1)) of at most $MAX_RESTARTS after failures"
    requeue "$2"
}

# Asks SLURM again if its controller is busy, but not if it refuses.
ask_slurm() {
    local try words
    for try in 1 2 3 4 5 6; do
        if words=$("$@" 2>&1); then
            echo "$words"
            return
        fi
        [[ ! $words =~ disabled|denied|permission|Invalid ]] || break
        ((try == 6)) || sleep 5
    done
    echo "$words" >&2
    return 1
}

job_field() { # prints the field $1 of this job; nothing if SLURM does not answer
    ask_slurm scontrol show job --oneliner "$job" | sed -n "s/.* $1=\([^ ]*\).*/\1/p" || true
}

requeue() {
    # A cancelled job must not be requeued.
    local state
    state=$(job_field JobState)
    [[ ${state:-RUNNING} == RUNNING ]] || { say "not requeued: the job is $state"; exit 75; }
    # SLURM ends this script now. Until then the job is pending, cannot start, and can be changed.
    trap '' TERM USR1
    ask_slurm scontrol requeue "$job" || { say "SLURM does not requeue it: submit it again"; exit 75; }
    [[ -z $1 ]] || exclude "$1"
    say "requeued"
    exit 75
}

exclude() { # excludes nodes from the next start on, but not so many that the job could wait forever
    local excluded count
    excluded=$(job_field ExcNodeList)
    [[ $excluded == "(null)" || -z $excluded ]] && excluded=$1 || excluded="$excluded,$1"
    count=$(scontrol show hostnames "$excluded" | sort -u | wc -l)
    if ((count > 2 && count > ${#nodes[@]} / 4)); then
        say "not excluded: $1; with those before it would be $count nodes"
    else
        ask_slurm scontrol update JobId="$job" ExcNodeList="$excluded" && say "excluded from now on: $excluded"
    fi
}
