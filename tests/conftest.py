"""For all tests: like the program itself, they load quickly and tell nobody what they run."""

import gc
import os

gc.set_threshold(10_000, 10, 10)  # as `train.libraries.load_quickly`

# read when the libraries are imported; `train.libraries` sets the same for the program
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def pytest_collection_modifyitems(items):
    """Files that start processes or train come first: at the end nobody waits for a long one."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
