"""A script for the Python of kvpress's environment, in which duo_id is imported from the folder around this file.

Nothing else of the environment that duo_id is installed in can be imported: it holds another transformers.
"""

import logging
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

if __name__ == "__main__":
    spec = spec_from_file_location("duo_id", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)])
    assert spec is not None
    assert spec.loader is not None
    for library in ("torchao", "torch.utils._pytree"):  # as in `duo_id.common.cli`: of kernels that are not used
        logging.getLogger(library).setLevel(logging.ERROR)
    sys.modules["duo_id"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["duo_id"])
    try:
        from duo_id.peers.run import main
    except ModuleNotFoundError as error:
        print(f"error: environment={sys.prefix} has no {error.name}: install=true installs it", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1]))
