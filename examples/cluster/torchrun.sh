#!/usr/bin/env bash
# Train on several nodes without a scheduler: run this very line on each of them. They meet at HEAD, one of their names.
#
#   HEAD=node-1 NODES=2 GPUS=8 bash examples/cluster/torchrun.sh
#
# SIGTERM to torchrun on any node (kill, Ctrl-C, a preempted machine) saves the run at the end of a batch, on all nodes
# together; the same line goes on from there. torchrun kills what has not ended 30 seconds later.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

exec bash examples/cluster/go_on.sh "${RUNS:-runs/torchrun}" \
    torchrun --nnodes "${NODES:-2}" --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name one of the nodes}:${PORT:-29500}" --rdzv-id "${JOB:-tenzoo}" \
    -m tenzoo fit --config "${CONFIG:-configs/tr_resnet20_cifar10.yaml}" --config configs/methods/sam.yaml \
    --trainer.accelerator "${ACCELERATOR:-gpu}" --trainer.strategy ddp \
    --trainer.devices "${GPUS:-8}" --trainer.num_nodes "${NODES:-2}" "$@"
