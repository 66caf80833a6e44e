"""The console script `duo-id COMMAND ...`, which is `python -m duo_id.COMMAND ...`; alone it lists the commands."""

import runpy
import sys
from difflib import get_close_matches

from duo_id.common.version import __version__

COMMANDS = {
    "train": ("duo_id.train", "find the heads of a model that must see the whole context"),
    "evaluate": ("duo_id.evaluate", "score head patterns on held-out long-context tasks"),
    "peers": ("duo_id.peers", "the same tasks under kvpress's token eviction"),
    "report": ("duo_id.report", "a page and tables of runs"),
    "convert": ("duo_id.convert", "other tools' files of head patterns, read and written"),
    "benchmark": ("duo_id.benchmark", "time and memory of deployed masks and of training steps"),
    "data": ("duo_id.data", "write the samples of a task to disk"),
    "lm-eval": ("duo_id.lm_eval", "tasks of lm-evaluation-harness under a head mask"),
}


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("duo-id COMMAND [...]    duo-id COMMAND --help shows what a command takes\n")
        print("\n".join(f"  {command:<10} {about}" for command, (_, about) in COMMANDS.items()))
        return
    if name == "--version":
        print(f"duo_id {__version__}")
        return
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, 1)
        meant = f", did you mean {close[0]}?" if close else ""
        print(f"error: {name}: there is no such command, choose one of {', '.join(COMMANDS)}{meant}", file=sys.stderr)
        sys.exit(2)
    module = COMMANDS[name][0]
    sys.argv[:2] = [f"duo-id {name}"]
    sys.modules.pop(f"{module}.__main__", None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
