#!/usr/bin/env bash
# Train on Slurm until the run is finished, from the root of the checkout:
#
#     sbatch deploy/slurm.sh --config mine.toml
#
# The job asks to be queued again when the run was stopped (75: the time limit is near, a preemption, a stop file), and a
# few times when it failed. It ends when the run is finished (0), refused (2: the configuration is wrong, or another
# start trains it), or failures repeat.
# Settings from the environment (sbatch --export=ALL,NAME=VALUE): NNODES for an elastic run, such as 3:4, together with
# `sbatch --no-kill`; RDZV_PORT; MAX_FAILURES in a row (3); STATE_DIR, where this job keeps its two small files.

#SBATCH --job-name=titan-yulan
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Seconds before the time limit: longer than a step, a validation and a save together.
#SBATCH --signal=B:USR1@600
# Fill in and remove one of the two #:
##SBATCH --partition=
##SBATCH --account=
##SBATCH --constraint=
##SBATCH --exclude=
##SBATCH --mail-type=FAIL,END,REQUEUE
##SBATCH --mail-user=

set -uo pipefail
# Slurm runs a copy of this file, so its own place says nothing.
cd "${SLURM_SUBMIT_DIR:?this file is for sbatch; elsewhere use ./run_train.sh}" || exit 2
if [ ! -x ./run_train.sh ]; then
    echo "ERROR: $PWD has no run_train.sh; call sbatch in the root of the checkout" >&2
    exit 2
fi

state="${STATE_DIR:-slurm-state}/$SLURM_JOB_ID"
mkdir -p "$state" || exit 2
export CODE_FILE="$state/code"
rm -f "$CODE_FILE"

first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export RDZV_ENDPOINT="$first:${RDZV_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
export NNODES="${NNODES:-$SLURM_JOB_NUM_NODES}"
# Since Slurm 22.05 srun does not take it over from the job, and a task would get one core.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# On every node. The first one's exit code is the run's: others may leave an elastic run that goes on.
# shellcheck disable=SC2016
node='
export NODE_RANK="$SLURM_NODEID"
./run_train.sh "$@" &
pid=$!
trap "told=1; kill -USR1 $pid 2>/dev/null" USR1 TERM
told=1 # a signal ends wait, not what it waits for, whose true code the next wait tells
while [ -n "$told" ]; do told=; wait "$pid"; code=$?; done
[ "$NODE_RANK" != 0 ] || echo "$code" >"$CODE_FILE"
exit "$code"'
srun --kill-on-bad-exit=0 bash -c "$node" node "$@" &
srun=$!
told=1
trap 'told=1; echo "stopping: a signal came"; kill -USR1 "$srun" 2>/dev/null' USR1 TERM
while [ -n "$told" ]; do # a signal ends `wait`, not srun, whose true code the next `wait` tells
    told=
    wait "$srun"
    code=$?
done
[ ! -s "$CODE_FILE" ] || code="$(cat "$CODE_FILE")"

failures="$(cat "$state/failures" 2>/dev/null || echo 0)"
case "$code" in
    0)
        echo "finished"
        rm -f "$CODE_FILE" "$state/failures" && rmdir "$state"
        exit 0
        ;;
    75) failures=0 ;;
    2)
        echo "ERROR: refused, for the reason above; not queued again" >&2
        exit 2
        ;;
    *)
        failures=$((failures + 1))
        if [ "$failures" -ge "${MAX_FAILURES:-3}" ]; then
            echo "ERROR: failed $failures times in a row (last exit code $code); not queued again" >&2
            rm -f "$state/failures"
            exit "$code"
        fi
        ;;
esac
echo "$failures" >"$state/failures"
echo "exit code $code: queued again"
scontrol requeue "$SLURM_JOB_ID" && exit 0
echo "ERROR: Slurm did not queue the job again; the same sbatch command goes on" >&2
exit "$code"
