"""`python -m duo_id.lm_eval ...`: lm-eval's own command line, with `--model duo_id`."""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

import sys

from duo_id.common import cli
from duo_id.common.errors import UserError, one_line
from duo_id.common.stopping import describe_interrupt, status_of, stoppable

ADVICE = {
    ImportError: "pip install 'duo_id[lm-eval]', or the package that the task needs",
    ConnectionError: "a data set can be read from a local copy, see docs/benchmarks.md",
}


HELP = """duo-id lm-eval --model duo_id --model_args heads=RUN,sparsity=0.5 --tasks TASK [...]

  RUN: a run folder or a shipped pattern, with the model that its heads were found on (docs/benchmarks.md).
  All else is lm-eval's own: duo-id lm-eval run --help, and ls tasks."""


@stoppable()
def main() -> None:
    """Register the model class and hand over to lm-eval.

    lm-eval 0.4 looks up model classes only in its own registry, neither in entry points nor under `--include_path`, so
    ours must be registered before it parses the command line.
    """
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(HELP)
        return
    try:
        from lm_eval.__main__ import cli_evaluate

        from duo_id.lm_eval.model import register

        register()
        cli_evaluate()
    except (UserError, ImportError, ConnectionError) as error:
        advice = (text for kind, text in ADVICE.items() if isinstance(error, kind))
        cli.console.print(": ".join(("error", one_line(error, 1000), *advice)), markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt as error:
        cli.console.print(describe_interrupt(error))
        sys.exit(status_of(error))


if __name__ == "__main__":
    main()
