#!/usr/bin/env bash
# Start the launcher of a node's processes; srun runs this on each node of a job. job.sh sets LAUNCHER, PROCESSES, NODES,
# MASTER_ADDR and MASTER_PORT.
#     launch/node.sh ENTRY.py ARGUMENT...
#
# Ranks follow the order of the nodes, so that job.sh knows the node of a rank that wrote no report.
set -euo pipefail

# USR1 reaches every process of the step, and would kill the launchers. They ignore it, and so do their children
# until they have installed their handler.
trap '' USR1
if [[ $LAUNCHER == deepspeed ]]; then
    hostfile=$GCVIT_REPORT_DIR/hostfile.$SLURM_NODEID
    # shellcheck disable=SC2086 # NODES is a list
    printf "%s slots=$PROCESSES\n" $NODES > "$hostfile"
    # --no_ssh: srun runs this on each node already, and what srun starts ends with the job.
    exec "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" \
        --force_multi --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"
fi
exec "$PYTHON" launch/torchrun_agent.py --nnodes "$SLURM_NNODES" --nproc-per-node "$PROCESSES" \
    --node-rank "$SLURM_NODEID" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    ${NUMA_BINDING:+--numa-binding "$NUMA_BINDING"} "$@"
