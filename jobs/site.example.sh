# shellcheck shell=bash
# What only you know of your cluster. Copy to jobs/site.sh and edit; the templates read that copy.

# Modules of the MPI and HDF5 that tools/setup.sh has built against.
# module purge
# module load gcc openmpi hdf5

# sbatch reads these, so the templates name no account and no partition.
# export SBATCH_ACCOUNT=my_project SBATCH_PARTITION=my_partition

# The one switch from CPUs to GPUs, for all templates: how many for each rank. sbatch reads it too.
# export SBATCH_GPUS_PER_TASK=1
if [ -n "${SLURM_JOB_ID:-}" ]; then # not on a login node, which has no GPU
    export JAX_PLATFORMS="${SBATCH_GPUS_PER_TASK:+cuda,}cpu"
fi

# How ranks are started. srun passes SLURM's signal on to all ranks by itself. Open MPI talks to
# srun by pmix, MPICH and Intel MPI by pmi2; `srun --mpi=list` says what your SLURM has.
export LAUNCH="srun --mpi=pmix --kill-on-bad-exit=1"
# Without either, mpirun: the signal then goes to the batch shell, which passes it on.
# export LAUNCH="mpirun" SBATCH_SIGNAL=B:USR1@120

# How often a run that is not finished may be queued again.
export MAX_RESTARTS=20
