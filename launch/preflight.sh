#!/usr/bin/env bash
# Ask all nodes of a job whether they are fit, before a training takes them; by job.sh, or by hand in an allocation:
#     salloc --nodes 4 --gpus-per-node 8 launch/preflight.sh train.py --config configs/X.yaml --data_dir DIR
#
# Exit code 0: all are. 2: a restart cannot mend it. 1: the nodes that are not are named, and listed, divided by
# commas, in the file bad_nodes of GCVIT_REPORT_DIR. Each phase has its own time limit, whatever the nodes do.
set -euo pipefail
source launch/allocation.sh
export MIN_READ_MB
num_nodes=${#nodes[@]}
mkdir -p "${JOBS_DIR:?}/$SLURM_JOB_ID"
# It holds what the nodes answer: a new folder, so that no old answer counts, and one that all nodes should see.
answers=$(mktemp -d "$JOBS_DIR/$SLURM_JOB_ID/preflight.XXXXXX")
trap 'rm -rf "$answers"' EXIT

code=0
# By each node alone: it writes down what it finds, and one that is silent is bad. `timeout`, since a node whose file
# system is gone may never come back; srun's own --wait does not count then.
# Its code says nothing: of a node without Python it is 2, too.
timeout --kill-after=5 $((PREFLIGHT_SECONDS * 2 / 5)) srun --nodes="$num_nodes" --ntasks="$num_nodes" \
    --ntasks-per-node=1 --cpu-bind=none "$PYTHON" launch/preflight.py look "$answers" "$@" || true
bad=$("$PYTHON" launch/preflight.py judge "$answers" "${nodes[@]}") || code=$?
if ((code)); then
    [[ -z ${GCVIT_REPORT_DIR-} ]] || echo "$bad" > "$GCVIT_REPORT_DIR/bad_nodes"
    exit "$code"
fi

# By all together: that they reach one another, and how fast.
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
