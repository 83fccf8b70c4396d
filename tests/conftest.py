"""For all tests: like the program itself, they tell nobody what they run."""

import os

# read when the libraries are imported; `train.libraries` sets the same for the program
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
