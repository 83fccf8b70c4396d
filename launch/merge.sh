#!/bin/sh
# The recipe of one merge: second moments of both parents, then the merge.
#   bash launch/merge.sh --config configs/demo.yaml merge.density=0.3
set -eu
obm calibrate --overwrite "$@"
obm merge --overwrite "$@"
