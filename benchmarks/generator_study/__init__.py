"""A study of distilling a protein generator: `python -m benchmarks.generator_study --help`."""
