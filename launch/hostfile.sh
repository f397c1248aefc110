#!/usr/bin/env bash
# Print a hostfile for `deepspeed --hostfile`, where hosts are reached by ssh and there is no SLURM:
#     launch/hostfile.sh [--slots 8] node1 node2 ... > hostfile
#     deepspeed --hostfile hostfile --master_addr node1 train.py --config configs/gc_vit_large_zero.yaml ...
# Without names it takes those of the SLURM job that it runs in. Without --slots it asks each host for its GPUs.
#
# Variables other than PYTHON* reach the other hosts only through a file `.deepspeed_env` of lines NAME=value.
set -euo pipefail

slots=
if [[ ${1-} == --slots ]]; then
    slots=${2:?how many slots?}
    shift 2
fi
if ((!$#)); then
    : "${SLURM_JOB_NODELIST:?which hosts? name them, or call this in a SLURM job}"
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    set -- "${hosts[@]}"
    slots=${slots:-${SLURM_GPUS_ON_NODE:-}}
fi
for host in "$@"; do
    count=$slots
    # -n: ssh would read this script's standard input.
    [[ -n $count ]] || count=$(ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$host" 'nvidia-smi --list-gpus | wc -l')
    [[ $count =~ ^[1-9][0-9]*$ ]] || { echo "error: $host: got $count GPUs; hint: --slots N" >&2; exit 2; }
    echo "$host slots=$count"
done
