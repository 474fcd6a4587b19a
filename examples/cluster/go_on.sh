#!/usr/bin/env bash
# Start a training run, or go on with it from its newest checkpoint: what a restarted node, pod or shell calls.
#
#   go_on.sh RUNS COMMAND…      RUNS: the run's default_root_dir, on a file system that all nodes share
#
# Slurm needs no such thing: a requeued job finds its own checkpoint (see slurm.sh).
set -euo pipefail

runs=${1:?usage: go_on.sh RUNS COMMAND…}
shift
newest=
for file in "$runs"/{,*/}*/checkpoints/{preempted,last}.ckpt; do
    if [[ -f $file && (-z $newest || $file -nt $newest) ]]; then
        newest=$file
    fi
done
# exec, so that the signal that ends a pod or a job reaches the command itself.
exec "$@" --trainer.default_root_dir "$runs" ${newest:+--ckpt_path "$newest"}
