"""The study of generators: sweeps, a 2 x 2 ablation, final sizes, the paper."""
