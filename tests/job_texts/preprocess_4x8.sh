#!/usr/bin/env bash
# bge-icl submit: preprocess of recipes/bge_en_icl_full.yaml model.name=/shared/mistral data.root=/shared/rows data.store=/shared/store run.output_dir=/shared/runs/full (commit 0123456)
# It runs the copy of the code beside it: later edits of the checkout do not reach it.
#SBATCH --job-name=full-preprocess
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --partition=long
#SBATCH --account=team
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --chdir=/shared/runs/full/jobs/20300101-000000-0123456/code
#SBATCH --output=/shared/runs/full/attempts/full-preprocess-%j.log

export BGE_ICL_RUN=/shared/runs/full
export BGE_ICL_MAX_STUCK=3
export BGE_ICL_EXCLUDE=0
set -- /shared/runs/full/jobs/20300101-000000-0123456/recipe.yaml

if [ ! -f slurm/protocol.sh ]; then echo "error: $PWD holds no slurm/; sbatch from the repository's folder" >&2; exit 2; fi
source slurm/protocol.sh  # first: it heeds signals
source slurm/env.sh
set -uo pipefail  # what modules and conda run does not bear -u
TASKS=(--ntasks="$SLURM_NTASKS")
MPI=${BGE_ICL_MPI:-pmi2}      # EDIT: what the site's MPI speaks; the mpich wheel of the extra `mpi` speaks pmi2

begin "${1:?name a recipe}" "${@:2}"
check_nodes preprocess "$@"
if [ "$SLURM_NTASKS" -gt 1 ]; then TASKS+=(--mpi="$MPI"); fi
run_task python pipeline/preprocess.py --config "$@"
