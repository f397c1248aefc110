#!/usr/bin/env bash
# Install on a cluster without a network, from wheels gathered on a machine that has one.
#     launch/wheelhouse.sh gather FOLDER [--platform manylinux_2_28_x86_64] [--extras demo,report]
#     (carry FOLDER and the checkout over)
#     launch/wheelhouse.sh install FOLDER [VENV]
#
# `gather` takes wheels for the cluster's platform, with the cluster's version of Python (PYTHON names it here) on a
# Linux: pip decides by what it runs on which packages a requirement means. What has no wheel, DeepSpeed alone, is built
# here, as pure Python.
# --extras are those of pyproject.toml, by default what the guides use; `install` takes what was gathered.
# The 2_28 of --platform is the oldest C library of the cluster: `ldd --version` tells it there.
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL choose the index, for PyTorch of another CUDA say.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${PYTHON:=python3}"

gather() {
    local folder=${1:?where to?} version extras=demo,report platform=manylinux_2_28_x86_64
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    shift
    while (($#)); do
        case $1 in
            --platform) platform=$2 ;;
            --extras) extras=$2 ;;
            *) echo "error: got $1; expected: --platform, --extras" >&2; exit 2 ;;
        esac
        shift 2
    done
    [[ $platform =~ ^manylinux_2_([0-9]+)_(.+)$ ]] ||
        { echo "error: --platform: got $platform; expected: manylinux_2_28_x86_64 and the like" >&2; exit 2; }
    # A platform takes wheels for all older C libraries too, but pip takes a --platform by its name.
    local glibc machine=${BASH_REMATCH[2]} platforms=(--platform "linux_${BASH_REMATCH[2]}")
    for ((glibc = BASH_REMATCH[1]; glibc >= 5; glibc--)); do platforms+=(--platform "manylinux_2_${glibc}_$machine"); done
    platforms+=(--platform "manylinux2014_$machine" --platform "manylinux2010_$machine" --platform "manylinux1_$machine")
    [[ $(uname -s) == Linux ]] || { echo "error: got $(uname -s); expected: Linux, as on the cluster" >&2; exit 2; }
    local needed
    needed=$(requirements "$extras")
    mkdir -p "$folder"
    echo "$extras" > "$folder/extras"
    # What `install` needs itself to build the project.
    "$PYTHON" -m pip download --quiet --only-binary :all: --constraint constraints.txt --dest "$folder" \
        'setuptools>=77' wheel
    # DeepSpeed is published as source alone; without its kernels, which are built where it runs, it is pure Python.
    DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$(grep '^deepspeed==' constraints.txt)"
    # --only-binary: a package that has no wheel for that platform is an error here, and not there.
    "$PYTHON" -m pip download --only-binary :all: --python-version "$version" --implementation cp \
        "${platforms[@]}" --find-links "$folder" --constraint constraints.txt --dest "$folder" \
        --requirement <(echo "$needed")
    echo "$(find "$folder" -name '*.whl' | wc -l) wheels for Python $version in $folder: $(du -sh "$folder" | cut -f1)"
}

requirements() { # of pyproject.toml, with those of some of its extras, which are divided by commas
    "$PYTHON" - "$1" <<- 'END'
	import re, sys, tomllib
	project = tomllib.load(open("pyproject.toml", "rb"))["project"]
	extras = project["optional-dependencies"]
	def of(names):
	    for name in filter(None, names.split(",")):
	        if name not in extras:
	            print(f"error: --extras: got {name}; expected: {', '.join(extras)}", file=sys.stderr)
	            sys.exit(2)
	        for line in extras[name]:
	            own = re.fullmatch(rf"{project['name']}\[(.*)\]", line)  # "all" is a list of the others
	            yield from of(own[1]) if own else [line]
	print("\n".join([*project["dependencies"], *of(sys.argv[1])]))
	END
}

install() {
    local folder=${1:?which folder?} venv=${2:-.venv} extras
    extras=$(cat "$folder/extras")
    [[ -x $venv/bin/python ]] || "$PYTHON" -m venv "$venv"
    "$venv/bin/python" -m pip install --no-index --find-links "$folder" --constraint constraints.txt \
        'setuptools>=77' wheel
    "$venv/bin/python" -m pip install --no-index --find-links "$folder" --constraint constraints.txt \
        --no-build-isolation --editable ".${extras:+[$extras]}"
}

case ${1-} in
    gather | install) "$@" ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 2 ;;
esac
