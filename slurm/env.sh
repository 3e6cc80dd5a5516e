# The environment of every job, sourced by the job scripts: what differs between sites is here. Lines marked EDIT are for
# you; the rest keeps what the submitting shell happens to hold away from the ranks.

# Ranks take their places from SLURM_*; a RANK or MASTER_ADDR of the submitting shell would split the job into runs of one.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT PYTHONHOME OMP_NUM_THREADS
for name in $(compgen -e | grep -E '^(NCCL|GLOO|TORCH_NCCL|TORCHELASTIC)_' || true); do unset "$name"; done
# What modules set below stays. sbatch --export=NONE leaves this behind, and then srun's tasks have no PATH.
unset SLURM_EXPORT_ENV

# The code of this folder and no other; nothing beside the script that is run.
export PYTHONPATH="$PWD:$PWD/kernels" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
# Without links: what compiles at run time compiles anew where the path of its includes is another.
if [ -d .venv ]; then export PATH="$(cd .venv && pwd -P)/bin:$PATH"; fi

# EDIT: how python is found on compute nodes: modules and a virtual environment, or a container (below).
# module purge; module load cuda/12.8
# source /path/to/venv/bin/activate

# EDIT: a container. One of: options of srun (pyxis), or a command before every python (apptainer). The job script itself
# stays outside, where scontrol is.
BGE_ICL_CONTAINER=${BGE_ICL_CONTAINER:-}  # --container-image=/images/bge.sqsh --container-mounts=/data:/data
BGE_ICL_WRAP=${BGE_ICL_WRAP:-}            # apptainer exec --nv --bind /data /images/bge.sif

# EDIT: where hub names of models were fetched to (bge-icl fetch needs none of it: its recipe names folders).
# export HF_HOME=/data/huggingface
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1  # compute nodes mostly have no network

# EDIT: the interface between nodes, where the fastest is not found by itself.
# BGE_ICL_INTERFACE=ib0

# EDIT: a folder on each node's own disk, to which the token store is copied before training (empty: it is read in place).
BGE_ICL_NODE_STORE=${BGE_ICL_NODE_STORE:-}

export TOKENIZERS_PARALLELISM=false
export NCCL_DEBUG=WARN TORCH_NCCL_ASYNC_ERROR_HANDLING=1
if [ -n "${BGE_ICL_INTERFACE:-}" ]; then
  export NCCL_SOCKET_IFNAME=$BGE_ICL_INTERFACE GLOO_SOCKET_IFNAME=$BGE_ICL_INTERFACE
fi
# One thread a core that the task was given; srun takes --cpus-per-task from the job only when told.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# What compiles at run time compiles once a node.
export TRITON_CACHE_DIR="${SLURM_TMPDIR:-/tmp}/bge-icl-$(id -u)/triton"
export TORCH_EXTENSIONS_DIR="${BGE_ICL_EXTENSIONS_DIR:-${SLURM_TMPDIR:-/tmp}/bge-icl-$(id -u)/extensions}"
