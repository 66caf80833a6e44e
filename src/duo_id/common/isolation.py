"""What a library function must leave as it found it: random generators, signal handlers, environment, loggers."""

import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

VARIABLES = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG")  # that Lightning sets
LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_lock = threading.RLock()  # these belong to the process: two threads take turns


@contextmanager
def isolated() -> Iterator[None]:
    """Restore all of it after the block, however that ends, and keep Lightning from talking of itself in it."""
    with _lock, torch.random.fork_rng(), warnings.catch_warnings():
        generators = random.getstate(), np.random.get_state()
        environment = {name: os.environ.get(name) for name in VARIABLES}
        levels = {name: logging.getLogger(name).level for name in LOGGERS}
        in_main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in SIGNALS if in_main}
        deterministic = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        try:
            warnings.filterwarnings("ignore", module="lightning")
            for name in LOGGERS:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            random.setstate(generators[0])
            np.random.set_state(generators[1])
            torch.use_deterministic_algorithms(deterministic[0])
            torch.backends.cudnn.benchmark = deterministic[1]
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for name, value in environment.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
