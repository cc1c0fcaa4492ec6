#!/bin/bash
#SBATCH --job-name=memshard-lample2019
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --account=my-account
#SBATCH --constraint=v100-32g
#SBATCH --output=runs/lample2019/log/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@180
#SBATCH --requeue

set -uo pipefail
source .venv/bin/activate
export OMP_NUM_THREADS=5
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# What the last start said of its end.
rm -f runs/lample2019/heartbeat/rank*.json

# 180 s before the time limit the shell gets SIGUSR2; the ranks then save, all at the same
# step, and leave with exit code 75.
trap 'scancel --signal=USR2 "$SLURM_JOB_ID"' USR2
trap : TERM  # SLURM signals the ranks itself
srun --kill-on-bad-exit=1 --cpus-per-task=$SLURM_CPUS_PER_TASK python -m memshard train lample2019 --run runs/lample2019 &
step=$!
wait $step
code=$?
while kill -0 $step 2>/dev/null; do  # a trap ends wait, not the step
    wait $step
    code=$?
done

# Stopped early: back into the queue, unless SLURM is already ending the job (scancel, or a requeue
# of its own).
if { [ $code = 75 ] || grep -qs '"ended": "stopped"' runs/lample2019/heartbeat/rank0.json; } && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
fi
exit $code
