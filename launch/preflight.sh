#!/usr/bin/env bash
# Check all nodes of a job before a training starts on them; by job.sh, or by hand in an allocation:
#     salloc --nodes 4 --gpus-per-node 8 launch/preflight.sh train.py --config configs/X.yaml --data_dir DIR
#
# Exit code 0: all nodes are fit. 2: the command is wrong, and a restart does not help. 1: the bad nodes are named, and
# listed with commas in the file bad_nodes of GCVIT_REPORT_DIR. Each phase has a time limit of its own.
set -euo pipefail
source launch/allocation.sh
export MIN_READ_MB
num_nodes=${#nodes[@]}
mkdir -p "${JOBS_DIR:?}/$SLURM_JOB_ID"
# The answers of the nodes: in a new folder, so that no old answer counts, which all nodes should see.
answers=$(mktemp -d "$JOBS_DIR/$SLURM_JOB_ID/preflight.XXXXXX")
trap 'rm -rf "$answers"' EXIT

code=0
# Each node alone writes what it finds, and a node that writes nothing is bad. `timeout`: a node whose file system is
# gone may never answer, and then srun's --wait has no effect. The exit code is ignored: it is 2 without Python, too.
timeout --kill-after=5 $((PREFLIGHT_SECONDS * 2 / 5)) srun --nodes="$num_nodes" --ntasks="$num_nodes" \
    --ntasks-per-node=1 --cpu-bind=none "$PYTHON" launch/preflight.py inspect "$answers" "$@" || true
bad=$("$PYTHON" launch/preflight.py judge "$answers" "${nodes[@]}") || code=$?
if ((code)); then
    [[ -z ${GCVIT_REPORT_DIR-} ]] || echo "$bad" > "$GCVIT_REPORT_DIR/bad_nodes"
    exit "$code"
fi

# All nodes together: whether they reach one another, and how fast.
left=$((PREFLIGHT_SECONDS - SECONDS))
timeout --kill-after=5 "$left" srun --nodes="$num_nodes" --ntasks=$((num_nodes * processes)) \
    --ntasks-per-node="$processes" --cpu-bind=none --kill-on-bad-exit=1 \
    "$PYTHON" launch/preflight_allreduce.py "$answers" "$@" || code=$?
((code != 2)) || exit 2
if ((code)); then
    bad=$("$PYTHON" launch/preflight.py silent "$answers" "${nodes[@]}") || true
    [[ -z ${GCVIT_REPORT_DIR-} ]] || echo "$bad" > "$GCVIT_REPORT_DIR/bad_nodes"
    exit 1
fi
