#!/bin/bash
# What every node of a run runs, once: by scripts/slurm/train.sbatch, or by hand on each node:
#   HEAD=node0 NODES=2 NODE=0 bash scripts/slurm/train_node.sh experiment=microcinema_sd15 output_dir=/shared/run resume_from_checkpoint=latest
#   HEAD=node0 NODES=2 NODE=1 bash scripts/slurm/train_node.sh ... the same
set -euo pipefail
CONFIG=${CONFIG:-configs/accelerate/ddp.yaml} # or fsdp.yaml, zero2.yaml, zero3.yaml
PROCESSES=${PROCESSES:-8}                      # on one node: its GPUs
DEEPSPEED=()
[ ! -f "${CONFIG%.yaml}.json" ] || DEEPSPEED=(--deepspeed_config_file "${CONFIG%.yaml}.json")

# The launcher would die of the signal that its processes listen to, and they with it. What is ignored here stays ignored in it.
trap '' USR1
exec accelerate launch --config_file "$CONFIG" "${DEEPSPEED[@]}" \
    --num_machines "$NODES" --machine_rank "${NODE:-$SLURM_NODEID}" --num_processes $((NODES * PROCESSES)) \
    --main_process_ip "$HEAD" --main_process_port "${PORT:-29500}" \
    -m microcinema train "$@"
