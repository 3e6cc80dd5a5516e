#!/usr/bin/env bash
# bge-icl submit: train of recipes/reranker_gemma2.yaml model.name=/shared/gemma data.root=/shared/rows data.store=/shared/store run.output_dir=/shared/runs/reranker (commit 0123456)
# It runs the copy of the code beside it: later edits of the checkout do not reach it.
#SBATCH --job-name=reranker-train
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --chdir=/shared/runs/reranker/jobs/20300101-000000-0123456/code
#SBATCH --output=/shared/runs/reranker/attempts/reranker-train-%j.log

export BGE_ICL_RUN=/shared/runs/reranker
export BGE_ICL_MAX_STUCK=3
export BGE_ICL_EXCLUDE=0
export BGE_ICL_ENTRY=pipeline/train_reranker.py
set -- /shared/runs/reranker/jobs/20300101-000000-0123456/recipe.yaml

if [ ! -f slurm/protocol.sh ]; then echo "error: $PWD holds no slurm/; sbatch from the repository's folder" >&2; exit 2; fi
source slurm/protocol.sh  # first: it heeds signals
source slurm/env.sh
set -uo pipefail  # what modules and conda run does not bear -u
TASKS=(--ntasks="$SLURM_NTASKS")

begin "${1:?name a recipe}" "${@:2}"
check_nodes train "$@"
if [ -n "$BGE_ICL_NODE_STORE" ]; then
  if [[ $BGE_ICL_NODE_STORE != /* ]]; then finish 2 "failed: BGE_ICL_NODE_STORE=$BGE_ICL_NODE_STORE is no absolute path"; fi
  (step --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --wait=0 -- python pipeline/check_nodes.py --copy-store "$BGE_ICL_NODE_STORE" --config "$@") ||
    come_back_unless_stuck "the token store could not be copied to $BGE_ICL_NODE_STORE on every node"
  set -- "$@" "data.store=$(cat "$ATTEMPT/node_store")"
fi
run_ranks python "${BGE_ICL_ENTRY:-pipeline/train.py}" --config "$@"
decide
