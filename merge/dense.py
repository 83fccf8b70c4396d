"""The two methods that look at whole matrices: RegMean with full Gram matrices, and WUDI.

They hold several matrices of a tensor's size at once and need far more time than the others;
`obm merge --dry-run` says how much memory. Arithmetic is fp64 for RegMean, fp32 for WUDI.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import numpy as np
from threadpoolctl import threadpool_limits

from merge.kernels import Counts
from merge.methods import MethodSettings

# Adam's constants, as every library has them.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
DAMPING = 1e-6
"""Share of the mean diagonal that is added to a Gram matrix, so that it can be inverted."""


def one_thread_a_product() -> AbstractContextManager[object]:
    """Inside, a matrix product has one thread of the process's BLAS.

    How a product is shared out among threads shows in its last bits, so a merge would depend on
    the cores and on OMP_NUM_THREADS. Nothing is lost: tensors are merged side by side.
    """
    return threadpool_limits(1, user_api="blas")


def regmean_update(
    deltas: Mapping[str, np.ndarray], grams: Mapping[str, np.ndarray], settings: MethodSettings
) -> np.ndarray:
    """RegMean: the matrix whose outputs are, in the mean square, nearest to all parents' outputs.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv
    2212.09849: W_M = (sum_k W_k G_k)(sum_k G_k)^-1 with G_k = E[x x^T], off-diagonal entries
    multiplied by `shrink`. Here with lambda_k before G_k, and for task vectors, which is the same.

    Args:
        deltas: Task -> fp32 [out, in].
        grams: Task -> fp32 [in, in].
        settings: `weights`, `shrink`.

    Returns:
        fp32 [out, in].
    """
    first = next(iter(deltas.values()))
    n_inputs = first.shape[1]
    total = np.zeros((n_inputs, n_inputs))
    weighted = np.zeros(first.shape)
    for task, delta in deltas.items():
        gram = grams[task].astype(np.float64) * settings.shrink
        np.fill_diagonal(gram, np.diagonal(grams[task]))
        gram *= settings.weights[task]
        total += gram
        weighted += delta.astype(np.float64) @ gram
    damping = DAMPING * float(np.mean(np.diagonal(total)))
    if damping == 0:  # nothing was ever active: no output to be near to
        shares = [settings.weights[task] for task in deltas]
        average = sum(share * delta for share, delta in zip(shares, deltas.values(), strict=True))
        return np.asarray(average / (sum(shares) or 1.0), np.float32)
    total[np.diag_indices(n_inputs)] += damping
    # X G = W for symmetric G is G X^T = W^T
    return np.linalg.solve(total, weighted.T).T.astype(np.float32)


def wudi_update(deltas: Mapping[str, np.ndarray], settings: MethodSettings) -> np.ndarray:
    """WUDI: a task vector that disturbs each parent's own directions least, found by Adam.

    Source: Cheng et al., "Whoever Started the Interference Should End It", arXiv 2503.08099: from
    tau = sum_k tau_k on, `steps` steps of Adam on

        sum_k ||(tau - tau_k) tau_k^T||_F^2 / ||tau_k||_F^2

    with tau_k = lambda_k delta_k. Its gradient is 2 (tau A - B) with A = sum_k tau_k^T tau_k / n_k
    and B = sum_k tau_k tau_k^T tau_k / n_k, so a step is one matrix product.

    Args:
        deltas: Task -> fp32 [out, in].
        settings: `weights`, `steps`, `learning_rate`.

    Returns:
        fp32 [out, in].
    """
    vectors = [delta * np.float32(settings.weights[task]) for task, delta in deltas.items()]
    tau: np.ndarray = np.asarray(np.sum(vectors, axis=0, dtype=np.float32))
    norms = [float(np.square(vector, dtype=np.float64).sum()) for vector in vectors]
    present = [(v, np.float32(n)) for v, n in zip(vectors, norms, strict=True) if n > 0]
    if len(present) < 2:
        return tau  # nothing interferes; rounding alone would make Adam move
    curvature = np.sum([vector.T @ vector / norm for vector, norm in present], axis=0)
    target = np.sum([vector @ (vector.T @ vector) / norm for vector, norm in present], axis=0)
    first, second = np.zeros_like(tau), np.zeros_like(tau)
    for step in range(1, settings.steps + 1):
        gradient = 2 * (tau @ curvature - target)
        first = np.float32(BETA_1) * first + np.float32(1 - BETA_1) * gradient
        second = np.float32(BETA_2) * second + np.float32(1 - BETA_2) * np.square(gradient)
        size = np.sqrt(second / np.float32(1 - BETA_2**step)) + np.float32(EPSILON)
        rate = np.float32(settings.learning_rate / (1 - BETA_1**step))
        tau = tau - rate * first / size
    return tau.astype(np.float32)


def merge_matrix(
    method: str,
    base: np.ndarray,
    parents: Mapping[str, np.ndarray],
    statistics: Mapping[str, np.ndarray],
    settings: MethodSettings,
) -> tuple[np.ndarray, Counts]:
    """Merges a matrix by `regmean` or `wudi`.

    Args:
        method: regmean or wudi.
        base: fp32 [out, in], theta_B.
        parents: Task -> fp32 [out, in], theta_k.
        statistics: Task -> fp32 [in, in] for regmean.
        settings: See the two functions above.

    Returns:
        theta_M in fp32, and counts: all changed entries are kept, and a conflict is won by the side
        whose sign the update has.
    """
    with np.errstate(all="ignore"):  # what is not finite is reported by `not_finite`
        deltas = {task: parent.astype(np.float32) - base for task, parent in parents.items()}
        if method == "regmean":
            update = regmean_update(deltas, statistics, settings)
        else:
            update = wudi_update(deltas, settings)
        merged = (base + update).astype(np.float32)
        # fp32 may miss a parent's own value by a bit; see kernels
        own = [(parents[task], base + delta) for task, delta in deltas.items()]
        for parent, value in reversed(own):
            merged = np.where(merged == value, parent, merged)
    stacked = np.stack(list(deltas.values()))
    conflict = (stacked > 0).any(0) & (stacked < 0).any(0)
    won = conflict & (np.sign(stacked) == np.sign(update)) & (stacked != 0)
    axes = tuple(range(1, stacked.ndim))
    bad = int(not np.isfinite(base).all())
    for k, parent in enumerate(parents.values()):
        bad |= int(not np.isfinite(parent).all()) << (1 + k)
    bad |= int(not np.isfinite(merged).all()) << (1 + len(parents))
    return merged, Counts(
        kept=(stacked != 0).sum(axes),
        conflicts=int(conflict.sum()),
        conflicts_won=won.sum(axes),
        alone=np.zeros(len(stacked), np.int64),
        kept_square=np.zeros(len(stacked)),
        delta_square=np.square(stacked, dtype=np.float64).sum(axes),
        update_square=float(np.square(update, dtype=np.float64).sum()),
        not_finite=bad,
    )
