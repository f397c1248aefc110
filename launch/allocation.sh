# shellcheck shell=bash
# Variables that describe the nodes of a job. job.sh and preflight.sh source it in the checkout's root. Needs bash 4.4.

set +eu # scripts of modules and environments often fail under -eu
source launch/env.sh
set -eu

processes=${TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # of each node
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export PROCESSES=$processes MASTER_ADDR="${nodes[0]}$NODE_NAME_SUFFIX"
# Another port at each restart: another process may use this one.
export MASTER_PORT=$((MASTER_PORT_BASE + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))
# The options of srun decide how the nodes are divided, whatever the job asked for.
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_GPUS_PER_TASK \
    SLURM_TRES_PER_TASK
