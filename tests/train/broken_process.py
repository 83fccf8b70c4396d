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
import train.run

score_each = train.grpo.score_each


class Watchdog(train.run.Watchdog):
    """Patient while a loaded machine starts the run; `break_down` makes it strict."""

    started: list["Watchdog"] = []

    def __enter__(self):
        self.started.append(self)
        self.poll_s = 1.0  # what a process last showed is never older than its three seconds
        return super().__enter__()


def break_down(*arguments):
    Watchdog.started[0].timeout_s = 3.0
    if os.environ["RANK"] == "1" and HOW == "sleep":
        time.sleep(3600)
    if os.environ["RANK"] == "1" and HOW == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return score_each(*arguments)


if __name__ == "__main__":
    HOW = next(word for word in sys.argv[1:] if word in ("sleep", "die"))
    train.grpo.score_each = break_down
    train.run.Watchdog = Watchdog
    sys.exit(train.run.train([word for word in sys.argv[1:] if word != HOW]))
