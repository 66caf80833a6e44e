"""What the processes of `tests.support.processes` are forked with beside modules: Hydra's plug-ins, found, and conf/,
read, which would take each of them a third of a second.
"""

from duo_id.common.composing import compose
from tests.support.compositions import remembered_compositions

with remembered_compositions():
    compose("train", ["model=tiny", "data=passkey"])
