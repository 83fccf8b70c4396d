"""Held-out evaluation of a policy: the floor in four parts, by question kind and by seen entity.

The counting lives below, in `train.evaluation`, because training evaluates as it goes; this is the
place from which the comparison and the command line take it.

    metrics, trajectories = evaluate(build_engine(config, model, processor), questions)
"""

from train.evaluation import FOUR_PARTS, evaluate, outcome, summarize

__all__ = ["FOUR_PARTS", "evaluate", "outcome", "summarize"]
