"""The command line: `distil-rank COMMAND ...`, the same as `python -m distil_rank COMMAND ...`."""

import importlib
import sys

from distil_rank.core.errors import one_line_errors

# command -> its module, which holds a frozen dataclass `Config` (its fields are the flags) and
# `run(config)`; and one line of help. A module is imported only when its command is called, so
# `--help` answers at once.
COMMANDS: dict[str, tuple[str, str]] = {
    command: (f"distil_rank.{module}", text)
    for command, module, text in (
        ("embed", "proteins.command_embed", "embed the proteins of a FASTA with an ESM-2 model"),
        ("moments", "proteins.command_moments", "count, mean and covariance of embeddings"),
        ("export", "proteins.command_export", "vectors of a store as .npz, .h5 or .parquet"),
        ("score", "proteins.command_score", "score mutations of a protein, without training"),
        ("pretrain", "proteins.command_pretrain", "train a small model of the ESM-2 architecture"),
        ("compress head", "compress.command_head", "make a layer or a head smaller, certified"),
        ("compress model", "compress.command_model", "make a whole model smaller, certified"),
        ("nested fit", "nested.command_fit", "fit a nested embedding of a model family"),
        ("nested embed", "nested.command_embed", "embed proteins with a chain, at any dimension"),
        ("nested probe", "nested.command_probe", "what a chain is worth on mutational scans"),
        ("generator prepare", "generators.command_prepare", "split and tokenize proteins once"),
        ("generator train", "generators.command_train", "distill a generator into a smaller GPT-2"),
        ("generator evaluate", "generators.command_evaluate", "likelihood, calibration and speed"),
        ("generator generate", "generators.command_generate", "write new proteins as FASTA"),
        ("generator finetune", "generators.command_finetune", "continue training on a family"),
        ("generator publish", "generators.command_publish", "send a generator to a model hub"),
        ("generator pretrain", "generators.command_pretrain", "train a small teacher on proteins"),
        ("report", "command_report", "redraw the figures of a results folder from their JSON"),
    )
}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    for length in (2, 1):
        command = " ".join(arguments[:length])
        if command in COMMANDS:
            import tyro

            module = importlib.import_module(COMMANDS[command][0])
            program, text, flags = f"distil-rank {command}", module.__doc__, arguments[length:]
            with one_line_errors(program):
                module.run(tyro.cli(module.Config, prog=program, description=text, args=flags))
            return
    width = max(map(len, COMMANDS), default=0)
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    more = "`distil-rank COMMAND --help` shows every flag."
    usage = f"usage: distil-rank COMMAND [--help] ...\n\n{listing}\n\n{more}"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return
    prefix = [line for line in listing.splitlines() if line.split()[0] == arguments[0]]
    if prefix and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print("\n".join(["commands:", *prefix]))
        return
    sys.stderr.write(
        f"distil-rank: error: unknown command {' '.join(arguments[:2])!r}\n\n{usage}\n"
    )
    raise SystemExit(2)


if __name__ == "__main__":
    main()
