"""The command line: `distil-rank COMMAND ...`, the same as `python -m distil_rank COMMAND ...`."""

import importlib
import sys

from distil_rank.core.errors import one_line_errors

# command -> module with a frozen dataclass `Config` (its fields are the flags) and `run(config)`; and one line of help.
# A module is imported only when its command is called, so `--help` answers at once.
COMMANDS: dict[str, tuple[str, str]] = {
    "compress head": ("distil_rank.compress.command_head", "make a layer or a head smaller, with a certificate"),
    "compress model": ("distil_rank.compress.command_model", "make a whole protein language model smaller"),
    "embed": ("distil_rank.proteins.embeddings", "embed the proteins of a FASTA with an ESM-2 model"),
    "moments": ("distil_rank.proteins.moments", "count, mean and covariance of embeddings"),
    "nested fit": ("distil_rank.nested.fit", "fit a nested embedding of a model family (Reverse Distillation)"),
    "nested embed": ("distil_rank.nested.embed", "embed proteins with a chain, cut at any dimension"),
    "nested probe": ("distil_rank.nested.probe", "what a chain is worth on mutational scans, against its baselines"),
    "pretrain": ("distil_rank.proteins.pretrain", "train a small protein language model of the ESM-2 architecture"),
    "generator train": ("distil_rank.generators.train", "distil a generator into a smaller GPT-2"),
    "generator evaluate": ("distil_rank.generators.evaluate", "held-out likelihood, calibration, writing and speed"),
    "generator generate": ("distil_rank.generators.generate", "write new proteins as FASTA"),
    "generator finetune": ("distil_rank.generators.finetune", "continue training on a family"),
    "generator sweep": ("distil_rank.generators.sweep", "temperature, alpha and learning rate on a grid"),
    "generator publish": ("distil_rank.generators.publish", "card, weights and evaluation to the Hugging Face hub"),
    "generator study": ("distil_rank.generators.study", "sweeps, the 2 x 2 ablation, final sizes: the whole paper"),
    "generator pretrain": ("distil_rank.generators.pretrain", "train a small teacher on proteins"),
    "report": ("distil_rank.redraw", "redraw the figures and tables of results/ from their JSON"),
}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    for length in (2, 1):
        command = " ".join(arguments[:length])
        if command in COMMANDS:
            import tyro

            module = importlib.import_module(COMMANDS[command][0])
            program = f"distil-rank {command}"
            with one_line_errors(program):
                module.run(tyro.cli(module.Config, prog=program, description=module.__doc__, args=arguments[length:]))
            return
    width = max(map(len, COMMANDS), default=0)
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    usage = f"usage: distil-rank COMMAND [--help] ...\n\n{listing}\n\n`distil-rank COMMAND --help` shows every flag."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return
    prefix = [line for line in listing.splitlines() if line.split()[0] == arguments[0]]
    if prefix and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print("\n".join(["commands:", *prefix]))
        return
    sys.stderr.write(f"distil-rank: error: unknown command {' '.join(arguments[:2])!r}\n\n{usage}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    main()
