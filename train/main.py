"""Train as a recipe says:

    python -m train.main --config train/recipes/X.yaml [--group.key=value …] [--resume] [--print_config]
    torchrun --nproc-per-node 2 -m train.main …          one tower per process
    torchrun --max-restarts 3 …                          resumes by itself after a process has failed

Exit codes (torchrun's own is 1 for any of them but 0; its report shows them):
    0   trained and tested
    2   a mistake in recipe, command line, index or run folder; nothing was done
    3   the loss or a gradient was not finite; the update was not made
    4   the machine failed: disk, memory, GPU, an archive, another process, all checkpoints damaged; or no progress
    75  stopped by SIGTERM, Ctrl-C or machine.stop_after, and saved: resume with --resume
    130 interrupted by Ctrl-C before training began; a second Ctrl-C kills at once
"""
from train.exit_codes import run_command, start_command

if __name__ == "__main__":
    start_command(decodes=True)

from typing import Sequence

from train.exit_codes import exit_code, with_torchrun_report
from train.recipe import parse


def main(argv: Sequence[str]) -> int:
    def work() -> int:
        request = parse(argv)
        from train.parallel.topology import process_group  # parsing a command line needs neither torch nor DALI
        from train.run import run

        config, machine = request.config, request.config.machine
        with process_group(towers=config.model.towers, parallel=config.parallel, device=machine.device,
                           timeout_s=machine.timeout_s, silence_s=machine.silence_s) as topology:
            return run(request, topology)
    return exit_code(work, "lower train.batch, machine.test_batch or machine.prefetch")


if __name__ == "__main__":
    run_command(with_torchrun_report(main))
