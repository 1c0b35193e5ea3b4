#!/bin/bash
# An experiment on TPU slices of a GKE cluster that xpk made (pip install xpk):
#
#     PROJECT=... ZONE=... CLUSTER=... IMAGE=... experiments/launch/xpk.sh
#     ... experiments/launch/xpk.sh experiments/ppo.py --model ... --run-dir ...
#
# FLAGS="--dry-run --output-manifest-file=jobset.yaml" shows the JobSet without a cluster.
set -eu

: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}"
# This repository and its environment, in the image's working directory.
: "${IMAGE:?}"
WORKLOAD=${WORKLOAD:-grpo-7b}
TPU_TYPE=${TPU_TYPE:-v5litepod-16}
# The name of storage that all hosts share, from `xpk storage attach`, and where it is mounted.
STORAGE=${STORAGE:-shared}
SHARED=${SHARED:-/shared}
COMMAND=(
    experiments/grpo.py --model Qwen/Qwen2.5-7B --dataset openai/gsm8k
    --mesh.fsdp 16 --run-dir "$SHARED/runs/grpo-7b"
)
(($#)) && COMMAND=("$@")
read -ra flags <<<"${FLAGS:-}"

# exec: xpk runs the command in a subshell and sends SIGTERM to that alone.
# 75 is the status after a SIGTERM, once the run is saved; 69 is that of processes which did not find each other. xpk
# counts both as restarts, so there are many; it does not restart after 1 and 2, an error of the run.
# Secrets: --env-file=FILE with HF_TOKEN and WANDB_API_KEY alone on a line takes them from the environment.
exec xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
    --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices=1 \
    --docker-image="$IMAGE" --storage="$STORAGE" \
    --env="HF_HOME=$SHARED/huggingface" --env="JAX_COMPILATION_CACHE_DIR=$SHARED/jax" \
    --restart-on-exit-codes=69,75 --max-restarts=100 --termination-grace-period-seconds=180 \
    --command="exec python ${COMMAND[*]@Q} --distributed.auto true" "${flags[@]}"
