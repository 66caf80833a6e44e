"""Names by which vLLM finds the plug-in, and the plug-in its heads."""

GROUP, NAME = "vllm.general_plugins", "duo_id"  # of the entry point
VARIABLE = "DUO_ID_HEADS"  # the environment variable, which all of vLLM's processes inherit
