"""Bytes between accelerators in a training step, and their seconds; symbols in `train.plan`.

A collective over N processes moves S (N - 1) / N bytes into each accelerator (ring; Thakur et al.,
IJHPCA 2005): an all-gather or a reduce-scatter of S bytes once, an all-reduce twice. Within a node
the links carry it. Between nodes each byte enters a node once and goes on over its links, so that
the slower one of an accelerator's links and all the node's adapters together decides.
"""

from __future__ import annotations

from train.plan import BUCKET_PARAMETERS, HOP_S, LINK_SHARE, Machine, Plan


def bus_bandwidth(n: int, machine: Machine) -> float:
    """Bytes a second that a collective over n accelerators reaches into each of them."""
    between = machine.network * machine.node
    return LINK_SHARE * (machine.link if n <= machine.node else min(machine.link, between))


def collective_seconds(n_bytes: float, n_calls: float, n: int, machine: Machine) -> float:
    """S (N - 1) / N over the bus, and N - 1 hops for each call.

    Args:
        n_bytes: S of all calls together: what is gathered, or what is reduced.
        n_calls: collectives that it takes.
        n: accelerators.
        machine: of them.
    """
    if n == 1:
        return 0.0
    return n_bytes * (n - 1) / n / bus_bandwidth(n, machine) + n_calls * (n - 1) * HOP_S


def exchange_bytes(plan: Plan) -> float:
    """Bytes of the loss' collectives in an optimizer step.

    Gradients: e n_t reduced and scattered, in every micro-batch from ZeRO-2 on; reduced for all,
    which moves twice as much, once a step under ZeRO-0 and 1. ZeRO-3 gathers the weights besides,
    for forward and backward of every micro-batch.
    """
    e = float(plan.weight_bytes)
    if plan.zero < 2:
        return 2.0 * e * plan.n_trained
    weights = 2.0 * e * plan.n_stored if plan.zero >= 3 else 0.0
    return plan.accumulation * (e * plan.n_trained + weights)


def exchange_calls(plan: Plan) -> float:
    """Collectives of them: one a layer and kind under ZeRO-3, else one a bucket of gradients."""
    if plan.zero >= 3:
        layers = plan.shape.layers + (plan.shape.vision.layers if plan.shape.vision else 0)
        return 3.0 * layers * plan.accumulation
    times = plan.accumulation if plan.zero == 2 else 2
    return times * float(-(-plan.n_trained // BUCKET_PARAMETERS))


def gather_bytes(plan: Plan) -> float:
    """ZeRO-3 makes the weights whole for each rollout: e n bytes."""
    return plan.rollouts * plan.weight_bytes * plan.n_stored if plan.zero >= 3 else 0.0


def update_gather_bytes(plan: Plan) -> float:
    """ZeRO-1 and 2 gather the new weights after the update: e n_t bytes."""
    return float(plan.weight_bytes) * plan.n_trained if plan.zero in (1, 2) else 0.0


def step_bytes(plan: Plan) -> float:
    """Bytes into each accelerator in an optimizer step, all collectives together."""
    if plan.n_processes == 1:
        return 0.0
    away = (plan.n_processes - 1) / plan.n_processes
    return away * (exchange_bytes(plan) + gather_bytes(plan) + update_gather_bytes(plan))


def exchange_seconds(plan: Plan, machine: Machine) -> float:
    """Gradients, and under ZeRO-3 weights, in the loss."""
    n_bytes, n_calls = exchange_bytes(plan), exchange_calls(plan)
    return collective_seconds(n_bytes, n_calls, plan.n_processes, machine)


def gather_seconds(plan: Plan, machine: Machine) -> float:
    """Weights made whole for rollouts."""
    n_calls = plan.rollouts * plan.shape.layers if plan.zero >= 3 else 0
    return collective_seconds(gather_bytes(plan), n_calls, plan.n_processes, machine)
