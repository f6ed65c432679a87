import tyro

from benchmarks.generator_study import study
from distil_rank.core.errors import one_line_errors

if __name__ == "__main__":
    with one_line_errors("benchmarks.generator_study"):
        study.run(tyro.cli(study.Config, description=study.__doc__))
