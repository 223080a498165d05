"""Train as a recipe says: `alexnet train RECIPE [--group.key=value …] [--resume]`, or `python -m train.main …`; under torchrun,
`torchrun --nproc-per-node 2 --no-python alexnet train RECIPE`, one tower per process, and with --max-restarts 3 a run resumes by
itself after a process has failed. Exit codes: train/exit_codes.py (torchrun's own is 1 for any but 0; its report has them).
"""
from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command(decodes=True)

import shutil
import textwrap
from typing import Sequence

from train.cli import Parser
from train.exit_codes import DONE, exit_code, with_torchrun_report


def parser(prog: str = "python -m train.main") -> Parser:
    """What `--help` shows; `train.recipe.parse` reads the words, as any key of a recipe is an option."""
    top = Parser(prog=prog, usage=f"{prog} RECIPE [--group.key=value …] [--resume]", description="Train a network as a recipe "
                 "says, and test it.", example=f"""\
  {prog} demo --train.epochs=3
  {prog} mine.yaml --data.index=photos.index --machine.name=first
  {prog} mine.yaml --machine.name=first --resume
  torchrun --nproc-per-node 2 --no-python alexnet train demo    (a tower each)

exit codes: 0 trained and tested, 2 a mistake, 3 the loss or a gradient was
not finite, 4 the machine failed, 75 stopped (SIGTERM, Ctrl-C,
machine.stop_after) and saved: --resume continues, 130 interrupted before it.

All keys of a recipe: --help-config, or docs/configuration.md""")
    top.add_argument("recipe", metavar="RECIPE", nargs="?", help="name of a recipe that comes with this program, or a YAML file")
    top.add_argument("--group.key", metavar="VALUE", help="set a value of the recipe, such as --optimizer.lr=0.02")
    top.add_argument("--resume", action="store_true", help="resume from the newest good checkpoint of the run folder, which is "
                     "machine.runs/machine.name (runs/RECIPE)")
    top.add_argument("--list", action="store_true", help="list the recipes that come with this program")
    top.add_argument("--print-config", action="store_true", help="print the whole recipe, as it would be trained")
    top.add_argument("--help-config", action="store_true", help="every key of a recipe: type, default, meaning")
    return top


def recipes() -> str:
    """A table of the recipes that come with this program."""
    from train.recipe import RECIPES
    lines = [(path.stem, path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").rstrip(".,"))
             for path in sorted(RECIPES.glob("*.yaml"))]
    width = max(len(name) for name, _ in lines)
    left = max(shutil.get_terminal_size().columns, 60) - width - 2
    return "\n".join(f"{name:{width}}  {textwrap.shorten(about, left, placeholder=' …')}" for name, about in lines)


def main(argv: Sequence[str], prog: str = "python -m train.main") -> int:
    def work() -> int:
        if {"-h", "--help"}.intersection(argv):
            parser(prog).print_help()
            return DONE
        if "--help-config" in argv:
            from train.recipe import keys
            print(keys.as_text(min(shutil.get_terminal_size().columns, 110)))
            return DONE
        if "--list" in argv or not argv:
            print(recipes())
            if argv:
                return DONE
        from train.recipe import parse

        request = parse(argv)
        config, machine = request.config, request.config.machine
        config.data.check_index()
        from train.parallel.topology import process_group  # a command line is refused before torch and DALI are imported
        from train.run import run

        with process_group(towers=config.model.towers, parallel=config.parallel, device=machine.device,
                           timeout_s=machine.timeout_s, silence_s=machine.silence_s) as topology:
            return run(request, topology)

    def command(words: Sequence[str]) -> int:
        return exit_code(work, "lower train.batch, machine.test_batch or machine.prefetch")
    return with_torchrun_report(command)(argv)


if __name__ == "__main__":
    run_command(main)
