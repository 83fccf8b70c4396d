"""Runs several programs in the processes of one launch: starting them costs more than they do.

deepspeed --num_gpus 2 one_after_another.py '[["launch/train.sh", "--config", ...], ...]'

Each runs as by itself: with its own arguments, as the main program. What accelerate and
transformers keep of a run for the whole process is forgotten in between. The first one that ends
with another code than 0 ends all.
"""

import json
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def meet_before_training() -> None:
    """Where processes meet for the first time in a training of its own, they meet each time here.

    Without it the second process writes its sign of life into a folder that the first one has not
    yet looked at.
    """
    import torch.distributed as dist

    import train.run

    build = train.run.build_grpo_config

    def build_together(*arguments, **settings):
        if dist.is_initialized():
            dist.barrier()
        return build(*arguments, **settings)

    train.run.build_grpo_config = build_together


def forget() -> None:
    """The next program finds a process group, and nothing else of the one before."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()


def main() -> None:
    meet_before_training()
    path = list(sys.path)
    for script, *arguments in json.loads(sys.argv[-1]):
        sys.path[:] = path
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                print(f"{script} {' '.join(arguments)} ends with {end.code}", file=sys.stderr)
                raise
        forget()
    from train.settings import leave_group_at_exit

    leave_group_at_exit()


if __name__ == "__main__":
    main()
