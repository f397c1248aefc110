#!/usr/bin/env bash
# Copy a folder of shards to a folder local to this node; srun runs it once on each node, see train.sbatch --stage.
#     launch/stage.sh /shared/imagenet-wds /scratch/$USER/imagenet-wds
#
# What is there already, of the same size and time, is kept, so that a requeue finds it; what the source has no more is
# removed. A file is copied beside its place and renamed, so that a killed copy leaves no half. The manifests go last.
set -euo pipefail

source=${1:?which shards?}
target=${2:?where to?}
mkdir -p "$target"
# Not two jobs on a node at once; the system frees it when this process ends.
exec 9> "$target/.staging"
flock 9

mapfile -t tars < <(cd "$source" && find . -type f -name '*.tar' | sort)
mapfile -t others < <(cd "$source" && find . -type f ! -name '*.tar' ! -name '.*' | sort)
files=("${tars[@]}" "${others[@]}")
((${#tars[@]})) || { echo "error: no shards: got $source; hint: name a folder of data_prep.shard" >&2; exit 2; }
comm -13 <(printf '%s\n' "${files[@]}" | sort) <(cd "$target" && find . -type f ! -name .staging | sort) |
    (cd "$target" && xargs --no-run-if-empty --delimiter '\n' rm --)
number=0 copied=0 told=$SECONDS
for file in "${files[@]}"; do
    number=$((number + 1))
    if [[ $(stat -c '%s %Y' "$source/$file") != "$(stat -c '%s %Y' "$target/$file" 2> /dev/null)" ]]; then
        mkdir -p "$(dirname "$target/$file")"
        cp --preserve=timestamps "$source/$file" "$target/$file.part"
        mv "$target/$file.part" "$target/$file"
        [[ $file != *.tar ]] || copied=$((copied + 1))
    fi
    if ((SECONDS - told >= 30)); then
        told=$SECONDS
        echo "$(hostname): staged $number of ${#files[@]} files"
    fi
done
echo "$(hostname): all ${#tars[@]} shards are in $target, $copied of them copied now"
