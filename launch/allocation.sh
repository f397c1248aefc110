# shellcheck shell=bash
# What job.sh and preflight.sh know of the nodes that they have; they source it in the checkout's root. Needs bash 4.4.

set +eu # modules and environments are seldom written for these
source launch/env.sh
set -eu

processes=${TASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # of each node
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export PROCESSES=$processes MASTER_ADDR="${nodes[0]}$NODE_NAME_SUFFIX"
# Another port at each restart, where somebody else has this one.
export MASTER_PORT=$((MASTER_PORT_BASE + (SLURM_JOB_ID + 1009 * ${SLURM_RESTART_COUNT:-0}) % 10000))
# srun's own words say how the nodes are divided, however the job divided them.
unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_CPUS_PER_TASK SLURM_GPUS_PER_TASK \
    SLURM_TRES_PER_TASK
