# shellcheck shell=bash
# All that differs between clusters. Every script here sources it; edit it, or set the variables before sbatch.
# What sbatch itself reads (the first part) counts only if the submitting shell sourced this file too:
#     source launch/env.sh && sbatch --nodes 4 --gpus-per-node 8 launch/train.sbatch configs/gc_vit_large_fsdp.yaml

# ---- the queue -------------------------------------------------------------------------------------------------
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00

# ---- the software ----------------------------------------------------------------------------------------------
# module purge; module load cuda/12.8
: "${PYTHON:=$PWD/.venv/bin/python}"
# The checkout comes before anything installed; DeepSpeed's launcher takes the python that it finds first.
export PYTHON PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PATH="${PYTHON%/*}:$PATH"
export PYTHONUNBUFFERED=1 # the last words of a killed process are in the log

# ---- the network -----------------------------------------------------------------------------------------------
# The interface that the nodes reach one another by: `ip -brief address` lists them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# The InfiniBand adapters to use, where a node has others for its storage: `ibstat -l` lists them.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_4,mlx5_5
# export NCCL_IB_DISABLE=1 # for a cluster with Ethernet alone
: "${MASTER_PORT_BASE:=20000}" # a job takes one of the 10,000 ports from here on, by its number
: "${NODE_NAME_SUFFIX:=}"      # appended to a node's name, where only "node1-ib" leads over the fast network

# ---- folders ---------------------------------------------------------------------------------------------------
: "${JOBS_DIR:=$PWD/runs/.jobs}" # on a file system that all nodes share: what each job's processes report
: "${SCRATCH:=}"                 # local to each node, outliving a job: where --stage copies the shards, as /scratch/$USER

# ---- what a job does by itself ---------------------------------------------------------------------------------
: "${MAX_RESTARTS:=3}"  # requeues within a day after crashes, hangs and bad nodes; those after a preemption do not count
: "${PREFLIGHT:=on}"    # off: start without asking the nodes
: "${PREFLIGHT_SECONDS:=60}" # for all of it; more where Python starts slowly from a shared file system
: "${MIN_READ_MB:=0}"   # slower nodes are bad: MB/s that one process reads a shard with
: "${NUMA_BINDING:=}"   # node: torchrun binds each process to the CPUs near its GPU (not tried yet)
: "${TASKS_PER_NODE:=}" # processes on each node; empty: one for each GPU, and one where there are none
