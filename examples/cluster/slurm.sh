#!/usr/bin/env bash
# Train on two nodes with eight GPUs each, for as many time limits as it takes:  sbatch examples/cluster/slurm.sh
#
# 90 seconds before the limit Slurm sends SIGUSR1 to the tasks (not to this shell: no «B:»). They end their batch, save
# the run, ask for a requeue and exit; the requeued job, which keeps its number, goes on from there. The same happens on
# SIGTERM, with which Slurm preempts a job: it then requeues the job by itself. 90 seconds must be enough for the longest
# batch and for one checkpoint.
#SBATCH --job-name=tenzoo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=4
#SBATCH --mem-per-cpu=4G
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

# With an image: srun apptainer exec --nv --pwd /workspace --bind "$PWD/runs:/workspace/runs" tenzoo.sif python -m tenzoo …
srun python -m tenzoo fit --config configs/tr_resnet20_cifar10.yaml --config configs/methods/sam.yaml \
    --trainer.accelerator gpu --trainer.strategy ddp \
    --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES"
