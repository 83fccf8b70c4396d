#!/bin/sh
# One file, two languages. As a shell script it starts itself under the DeepSpeed launcher; as a
# Python program (what the launcher runs in every process) it trains:
#   deepspeed launch/train.sh --config configs/demo.yaml output=runs/x seed=1
#   bash launch/train.sh --config configs/demo.yaml output=runs/x seed=1
''''exec env "PATH=$(dirname "$0")/../.venv/bin:$PATH" deepspeed "$0" "$@" #'''
import sys
from pathlib import Path

# the launcher puts launch/ on the path; the packages lie beside it
here = Path(__file__).resolve().parent
sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry or ".") != here)]

from train.run import train  # noqa: E402

if __name__ == "__main__":
    sys.exit(train())
