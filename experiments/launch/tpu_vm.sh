#!/bin/bash
# An experiment on every host of a TPU VM slice, over ssh:
#
#     TPU=my-slice ZONE=us-west4-a experiments/launch/tpu_vm.sh
#     TPU=... ZONE=... experiments/launch/tpu_vm.sh experiments/ppo.py --model ... --run-dir ...
#     TPU=... ZONE=... experiments/launch/tpu_vm.sh stop      # saves and ends; the first command goes on from there
#
# Each host has the repository and its environment at the same place and mounts the same storage (Filestore, or a bucket
# with gcsfuse). The processes end with the connection, so run this in tmux on a machine that stays.
set -u

: "${TPU:?}" "${ZONE:?}"
REPOSITORY=${REPOSITORY:-/shared/grpo_jax}
PYTHON=${PYTHON:-/shared/venv/bin/python}
# The token of `hf auth login` is kept there too.
HF_HOME=${HF_HOME:-/shared/huggingface}
COMMAND=(
    experiments/grpo.py --model Qwen/Qwen2.5-7B --dataset openai/gsm8k
    --mesh.fsdp 16 --run-dir /shared/runs/grpo-7b
)
(($#)) && COMMAND=("$@")
# The status after a SIGTERM, once the run is saved (EX_TEMPFAIL); the same command goes on from there.
PREEMPTED=75
# The status if the processes did not find each other (EX_UNAVAILABLE), since one of them came late, or never will: tried
# again, but not for ever.
NOT_CONNECTED=69
MOST_TRIALS=3

on_hosts() { # WORKERS COMMAND
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker="$1" --command="$2"
}

if [[ ${COMMAND[0]} == stop ]]; then
    # SIGINT: the run is saved as after SIGTERM, but has another status, so the loop below ends. One host tells the others.
    # The oldest process: those that it has forked, such as the workers of a reward, have the same command line.
    on_hosts 0 "pkill -INT --oldest -f '[-]-distributed.auto true'"
    exit
fi

command="cd ${REPOSITORY@Q} && HF_HOME=${HF_HOME@Q} exec ${PYTHON@Q} ${COMMAND[*]@Q} --distributed.auto true"
trials=0
while true; do
    status=0
    on_hosts all "$command" || status=$?
    state=$(gcloud compute tpus tpu-vm describe "$TPU" --zone="$ZONE" --format='value(state)')
    # After a maintenance event the slice is READY again; after a preemption it is not and must be created anew.
    if [[ $state == READY ]] && ((status == PREEMPTED)); then
        trials=0
        echo "saved after SIGTERM; started again"
    elif [[ $state == READY ]] && ((status == NOT_CONNECTED && ++trials < MOST_TRIALS)); then
        echo "the processes did not find each other, $trials of $MOST_TRIALS trials; started again"
    else
        echo "ended with status $status; the slice is $state"
        exit "$status"
    fi
done
