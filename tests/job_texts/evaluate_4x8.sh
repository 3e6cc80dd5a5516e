#!/usr/bin/env bash
# bge-icl submit: evaluate of recipes/bge_en_icl_full.yaml model.name=/shared/mistral data.root=/shared/rows data.store=/shared/store run.output_dir=/shared/runs/full (commit 0123456)
# It runs the copy of the code beside it: later edits of the checkout do not reach it.
#SBATCH --job-name=full-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=h100:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --partition=long
#SBATCH --account=team
#SBATCH --array=0-0
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --chdir=/shared/runs/full/jobs/20300101-000000-0123456/code
#SBATCH --output=/shared/runs/full/attempts/full-evaluate-%A-%a.log

export BGE_ICL_RUN=/shared/runs/full
export BGE_ICL_MAX_STUCK=3
export BGE_ICL_EXCLUDE=0
set -- /shared/runs/full /shared/words

if [ ! -f slurm/protocol.sh ]; then echo "error: $PWD holds no slurm/; sbatch from the repository's folder" >&2; exit 2; fi
source slurm/protocol.sh  # first: it heeds signals
source slurm/env.sh
set -uo pipefail  # what modules and conda run does not bear -u
TASKS=(--ntasks=1)
RUN_FOLDER=${1:?name a run folder, and tasks}
shift
index=$((${SLURM_ARRAY_TASK_ID:-0} + 1))
if [ $index -gt $# ]; then echo "error: array task $((index - 1)), but there are $# tasks to score" >&2; exit 2; fi

begin --run "$RUN_FOLDER"
check_nodes evaluate "$RUN_FOLDER/settings.yaml" "run.output_dir=$RUN_FOLDER"
# shellcheck disable=SC2086  # options are several words
run_task python pipeline/evaluate_embedder.py --run "$RUN_FOLDER" --task "${!index}" ${BGE_ICL_EVALUATE:-}
