"""Token eviction by kvpress on the questions of an evaluation: `python -m duo_id.peers RUN`."""
