"""Program of test_launch: a training in which process 1 stops for ever, or dies, in a reward.

deepspeed --num_gpus 2 broken_process.py sleep|die --config FILE key=value ...
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train.grpo
from train.run import train as run_command

score = train.grpo.score


def break_down(*arguments):
    if os.environ["RANK"] == "1" and HOW == "sleep":
        time.sleep(3600)
    if os.environ["RANK"] == "1" and HOW == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return score(*arguments)


if __name__ == "__main__":
    HOW = next(word for word in sys.argv[1:] if word in ("sleep", "die"))
    train.grpo.score = break_down
    sys.exit(run_command([word for word in sys.argv[1:] if word != HOW]))
