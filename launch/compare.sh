#!/bin/sh
# The comparison of every run in a folder:
#   bash launch/compare.sh runs/demo/runs
set -eu
fail() { echo "error: $1" >&2; exit 2; }
[ $# -gt 0 ] || fail "no folder of runs; usage: bash launch/compare.sh FOLDER_OF_RUNS [options of obm compare]"
folder=$1
[ -d "$folder" ] || fail "$folder: no such folder; name the one that holds the run folders"
[ -n "$(ls "$folder")" ] || fail "$folder: holds no runs; name the folder that holds the run folders"
shift
obm compare "$folder"/* --output "$folder/../report" --overwrite "$@"
