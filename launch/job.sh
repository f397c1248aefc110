# shellcheck shell=bash
# What train.sbatch and evaluate.sbatch have in common; they source it in a job.
#     run_job ENTRY.py ARGUMENT...
# asks the nodes, starts one launcher per node, hands a warning on, waits, reads how all processes ended, says it in
# one line, and exits or requeues the job. LAUNCHER is torchrun or deepspeed.

source launch/env.sh

say() { echo "[$(date '+%F %T') job $SLURM_JOB_ID] $*"; }
die() { say "error: $*" >&2; exit 2; }

restart=${SLURM_RESTART_COUNT:-0}
processes=${TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
share=$((cpus > processes ? cpus / processes : 1)) # CPUs of each process
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
job_dir=$JOBS_DIR/$SLURM_JOB_ID
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$share}"
export MASTER_ADDR="${nodes[0]}$NODE_NAME_SUFFIX" MASTER_PORT=$((MASTER_PORT_BASE + SLURM_JOB_ID % 10000))
export GCVIT_REPORT_DIR="$job_dir/restart_$restart" PROCESSES=$processes NODES="${nodes[*]/%/$NODE_NAME_SUFFIX}"
export LAUNCHER="${LAUNCHER:-torchrun}"

# One task per node with all of its CPUs: since 22.05 srun does not inherit them. A task that fails ends the others,
# which could wait for it forever.
per_node=(srun --nodes="${#nodes[@]}" --ntasks-per-node=1 --cpus-per-task="$cpus" --cpu-bind=none --kill-on-bad-exit=1)

# A warning (--signal=B:USR1@120, or a preemption's). It is only remembered here: the loop below sends it on.
is_told=0
trap 'is_told=1' USR1 TERM

run_job() {
    mkdir -p "$GCVIT_REPORT_DIR" || die "cannot write JOBS_DIR=$JOBS_DIR; cure: set it in launch/env.sh"
    rm -f "$GCVIT_REPORT_DIR"/*
    say "restart $restart: $1 on ${#nodes[@]} x $processes processes with $share CPUs each: ${nodes[*]}"
    [[ $PREFLIGHT == off ]] || ask_nodes "$@"
    "${per_node[@]}" launch/node.sh "$@" &
    local step=$! nap code=0
    while kill -0 "$step" 2> /dev/null; do # wait returns at a signal too
        # Again and again, since it is lost on a process that is still starting; more than one changes nothing.
        if ((is_told)); then scancel --signal=USR1 "$SLURM_JOB_ID" || true; fi
        sleep 3 & nap=$!
        wait -n "$step" "$nap" || true
        kill "$nap" 2> /dev/null || true
    done
    wait "$step" || code=$?
    conclude "$code"
}

ask_nodes() {
    local code=0
    launch/preflight.sh "$@" || code=$?
    case $code in
        0) ;;
        2) exit 2 ;;
        *) restart_after "the pre-flight failed" "$(cat "$GCVIT_REPORT_DIR/bad_nodes" 2> /dev/null || true)" ;;
    esac
}

# What follows from how the processes ended; $1 is srun's code.
conclude() {
    local code=0 verdict
    verdict=$("$PYTHON" launch/verdict.py "$GCVIT_REPORT_DIR" "$processes" "$1" "${nodes[@]}") || code=$?
    say "$verdict"
    case $code in
        0 | 2) exit "$code" ;;
        75) requeue "" ;;
        *) restart_after "$verdict" "" ;;
    esac
}

# After a crash, a hang or bad nodes ($2): a limited number of times.
restart_after() {
    local failures=0
    [[ ! -f $job_dir/failures ]] || failures=$(wc -l < "$job_dir/failures")
    if ((failures >= MAX_RESTARTS)); then
        say "not requeued: $failures restarts after failures, MAX_RESTARTS=$MAX_RESTARTS"
        exit 1
    fi
    echo "$1" >> "$job_dir/failures"
    say "restart $((failures + 1)) of at most $MAX_RESTARTS after failures"
    requeue "$2"
}

requeue() {
    # A job that somebody cancelled would come back to life.
    local state
    state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    [[ $state == RUNNING ]] || { say "not requeued: the job is $state"; exit 75; }
    # From here on SLURM ends this script; until it has, the job is pending and cannot start, and can be changed.
    trap '' TERM USR1
    scontrol requeue "$SLURM_JOB_ID" || { say "SLURM does not requeue it: submit it again"; exit 75; }
    if [[ -n $1 ]]; then
        local excluded
        excluded=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
        [[ $excluded != "(null)" && -n $excluded ]] && excluded="$excluded,$1" || excluded=$1
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded" && say "excluded from now on: $excluded"
    fi
    say "requeued"
    exit 75
}
