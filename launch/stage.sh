#!/usr/bin/env bash
# Copy a folder of shards to a folder local to this node; srun runs it once on each node, see train.sbatch --stage.
#     launch/stage.sh /shared/imagenet-wds /scratch/$USER/imagenet-wds
#
# Files of the same size and time are kept, so that a requeue finds them. Files that the source no longer has are removed.
# A file is copied beside its place and renamed, so that a killed copy leaves no partial file. The manifests come last.
set -euo pipefail

source=${1:?which shards?}
target=${2:?where to?}
mkdir -p "$target"
# One job at a time on a node. The system frees the lock when this process ends.
exec 9> "$target/.staging"
flock 9

mapfile -t tars < <(cd "$source" && find . -type f -name '*.tar' | sort)
mapfile -t others < <(cd "$source" && find . -type f ! -name '*.tar' ! -name '.*' | sort)
files=("${tars[@]}" "${others[@]}")
((${#tars[@]})) || { echo "error: no shards: got $source; hint: name a folder of data_prep.shard" >&2; exit 2; }
comm -13 <(printf '%s\n' "${files[@]}" | sort) <(cd "$target" && find . -type f ! -name .staging | sort) |
    (cd "$target" && xargs --no-run-if-empty --delimiter '\n' rm --)
number=0 copied=0 reported=$SECONDS
for file in "${files[@]}"; do
    number=$((number + 1))
    if [[ $(stat -c '%s %Y' "$source/$file") != "$(stat -c '%s %Y' "$target/$file" 2> /dev/null)" ]]; then
        mkdir -p "$(dirname "$target/$file")"
        cp --preserve=timestamps "$source/$file" "$target/$file.part"
        mv "$target/$file.part" "$target/$file"
        [[ $file != *.tar ]] || copied=$((copied + 1))
    fi
    if ((SECONDS - reported >= 30)); then
        reported=$SECONDS
        echo "$(hostname): staged $number of ${#files[@]} files"
    fi
done
echo "$(hostname): all ${#tars[@]} shards are in $target, $copied of them copied now"
