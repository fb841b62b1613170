"""Where the tasks of a stage run: processes of this machine, a Ray cluster, or Slurm job arrays."""
