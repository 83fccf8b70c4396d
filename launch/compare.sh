#!/bin/sh
# The comparison of every run in a folder:
#   bash launch/compare.sh runs/demo/runs
set -eu
folder=${1:?usage: bash launch/compare.sh FOLDER_OF_RUNS [options of obm compare]}
shift
obm compare "$folder"/* --output "$folder/../report" --overwrite "$@"
