"""`python -m duo_id.lm_eval ...`: lm-eval's own command line, with `--model duo_id`."""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

import sys

from duo_id.common import cli
from duo_id.common.errors import UserError
from duo_id.common.stopping import describe_interrupt, status_of, stoppable


@stoppable()
def main() -> None:
    """Register the model class and hand over to lm-eval.

    lm-eval 0.4 looks up model classes only in its own registry, neither in entry points nor under `--include_path`, so
    ours must be registered before it parses the command line.
    """
    try:
        from lm_eval.__main__ import cli_evaluate

        from duo_id.lm_eval.model import register
    except ImportError as error:
        cli.console.print(
            f"error: lm-eval cannot be imported ({error}): pip install 'duo_id[lm-eval]'", markup=False, soft_wrap=True
        )
        sys.exit(2)
    register()
    try:
        cli_evaluate()
    except UserError as error:
        cli.console.print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt as error:
        cli.console.print(describe_interrupt(error))
        sys.exit(status_of(error))


if __name__ == "__main__":
    main()
