"""`python -m duo_id.data`, for a source tree: `python data_gen/write.py out=DIR n=1000 data=key_value`."""

from duo_id.common import stopping

if __name__ == "__main__":
    stopping.die_quietly()

from duo_id.common import cli
from duo_id.data.__main__ import generate

if __name__ == "__main__":
    cli.run("data_gen", generate)
