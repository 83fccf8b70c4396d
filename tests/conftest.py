"""For all tests: like the program itself, they load quickly and tell nobody what they run."""

import gc
import os

gc.set_threshold(10_000, 10, 10)  # as `train.libraries.load_quickly`

# read when the libraries are imported; `train.libraries` sets the same for the program
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
