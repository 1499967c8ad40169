"""Starting runs: their ranks, the jobs of a sweep here or in SLURM, and what came of them."""
