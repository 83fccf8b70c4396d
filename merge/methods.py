"""The merge methods: for each its source, its formula, and the rule that the kernels follow.

A method is a pure function of its settings. It returns a `Rule`: three steps that decide every
entry of a tensor on its own, once a few numbers over the whole tensor are known.

    keep      which entries of a task vector delta_k = theta_k - theta_B stay
    elect     which sign wins where kept entries disagree; the losers are dropped
    combine   what is done with the survivors:   theta_M = theta_B + update

The numbers over the whole tensor (thresholds, scales) come from `selection`, the entries from
`kernels`. Two methods need whole matrices and are in `dense`; `layer_swap` copies, and is resolved
in the plan. `merge_tensor` in `tensor` applies any of the others to one tensor in memory.

What all share, where papers differ or are silent:

* `weights` scale the task vectors in the final sum and nowhere else. Which entries are kept and
  which sign wins does not depend on them, so a weight can be tuned without changing the masks.
* Density is exact: k = floor(density * n + 1/2) entries of n, fewer only when fewer entries are not
  zero. A zero delta is never kept. Equal scores at the threshold (the rule, not the exception, for
  bf16 weights after light training) go to the lowest row-major index.
* Only kept entries vote on a sign. Where the votes cancel, the sign of the sum of kept deltas wins,
  and where that is zero too, plus: a rule that favours no task. This matters: between bf16 weights
  that differ by one step in either direction, half of the conflicts cancel exactly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

NORMALIZATIONS = ("none", "mean", "rank")
COMBINATIONS = ("sum", "mean")
SALIENCIES = ("diagonal", "inverse")
BUDGETS = ("tensor", "layer", "global")


@dataclass(frozen=True)
class MethodSettings:
    """What a method needs beside tensors."""

    weights: Mapping[str, float]
    """Task -> lambda_k, scale of its task vector."""
    density: float = 0.5
    """Share of entries that each task vector keeps, 0 to 1 (task arithmetic keeps all)."""
    normalization: str = "none"
    """How saliencies of different tasks are made comparable before they vote: none, mean, rank."""
    combine: str = "sum"
    """How OBM adds what survived: sum, or mean over the tasks that survive at an entry."""
    saliency: str = "diagonal"
    """Estimate of the loss change of dropping an entry: diagonal, or inverse; see `obm`."""
    budget: str = "tensor"
    """What the density is a share of: each tensor, each decoder layer, or the whole model."""
    seed: int = 0
    """Seed of the methods that draw: dare, dare_ties, della."""
    window: float = 0.1
    """DELLA: the keep probability runs from density - window to density + window."""
    outliers: float = 0.01
    """Breadcrumbs: share of the largest entries that is dropped first."""
    threshold: float = 1e-5
    """RAM, SAR: an entry counts as changed where |delta| is above."""
    boost: float = 0.1
    """RAM+: r, gain of what only one task changed."""
    boost_limit: float = 0.2
    """RAM+: alpha, highest ratio of shared to unique entries that the gain uses."""
    shrink: float = 0.9
    """RegMean: factor on the off-diagonal entries of the Gram matrices."""
    steps: int = 300
    """WUDI: steps of Adam."""
    learning_rate: float = 1e-5
    """WUDI: learning rate of Adam."""
    layers: str = ""
    """Layer swap: decoder layers taken from the agent, such as `14-27` or `0,2,4-7`."""
    tensor_name: str = field(default="")
    """Canonical name of the tensor; with `seed` and the task it fixes a random stream."""


@dataclass(frozen=True)
class Rule:
    """What the kernels do at each entry."""

    keep: str
    """all: every changed entry. top: the largest scores. band: the largest scores but for the very
    largest. variance: entries where tasks vary most, the same for all. random: each with
    probability `density`. magprune: more likely the higher its rank in the row. above: |delta|
    above a threshold."""
    score: str = "magnitude"
    """magnitude: |delta|. saliency: v[j] * delta^2 with a vector v a linear input. What `top` ranks
    and `elect="saliency"` votes with."""
    rescale: bool = False
    """Divide what is kept by its probability of being kept."""
    elect: str = "none"
    """none: no election. sum: sign of the sum of kept deltas. saliency: sign of the sum of
    normalised saliencies, each with the sign of its delta."""
    combine: str = "sum"
    """With survivors x_k and weights lambda_k. sum: sum of lambda_k x_k. mean: that over their
    number. average: that over the sum of their lambda_k; also where x_k is zero if all are kept.
    ratio: sum of lambda_k f_k x_k over sum of lambda_k f_k, with f_k the statistic of the task."""
    boost: bool = False
    """RAM+: scale what only one task keeps."""
    energy: bool = False
    """SCE: multiply lambda_k by the share that task k has in the squares of kept deltas."""
    arbitrate: bool = False
    """SAR: before, settle conflicts by sensitivity; after, multiply lambda_k by what restores the
    norm. See `sar`."""


RuleOf = Callable[[MethodSettings], Rule]


def linear(settings: MethodSettings) -> Rule:
    """Averages the checkpoints: theta_M = sum_k lambda_k theta_k / sum_k lambda_k.

    Source: Wortsman et al., "Model soups", arXiv 2203.05482; written with task vectors here, which
    is the same where the weights' sum is not zero.
    """
    return Rule(keep="all", combine="average")


def task_arithmetic(settings: MethodSettings) -> Rule:
    """Adds the weighted task vectors: theta_M = theta_B + sum_k lambda_k delta_k.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089. An entry where
    the task vectors disagree counts as won by the side whose sign the update has.
    """
    return Rule(keep="all")


def ties(settings: MethodSettings) -> Rule:
    """Trims by magnitude, elects a sign by summed magnitude, takes the disjoint mean.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv
    2306.01708: trim each delta_k to its largest entries; sigma = sign(sum_k trimmed delta_k);
    theta_M = theta_B + lambda * mean of the trimmed entries that are not zero and agree with sigma.

    Two things differ from the authors' program. Trimming keeps exactly k entries where theirs keeps
    everything at the threshold. Each task may have its own lambda_k: the mean runs over
    lambda_k * delta_k, which for equal weights is the paper's formula.
    """
    return Rule(keep="top", elect="sum", combine="mean")


def dare(settings: MethodSettings) -> Rule:
    """Drops entries at random, rescales the rest, and adds as task arithmetic does.

    Source: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models
    as a Free Lunch", arXiv 2311.03099: delta_k * m / p with m ~ Bernoulli(p), p the share kept.

    The choice is Bernoulli as in the paper, so the realised density varies a little around p. The
    random stream depends on the seed, the task, the tensor's name and the entry's index alone.
    """
    return Rule(keep="random", rescale=True)


def dare_ties(settings: MethodSettings) -> Rule:
    """DARE's choice, then TIES' election; survivors are summed.

    Source: DARE (arXiv 2311.03099, section on TIES with DARE) and the `dare_ties` of public merge
    tools, which sum and do not average. The election is by the sum of rescaled kept deltas.
    """
    return Rule(keep="random", rescale=True, elect="sum")


def della(settings: MethodSettings) -> Rule:
    """Drops small entries of a row more often than large ones, rescales, elects, takes the mean.

    Source: Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through
    Magnitude-Based Sampling", arXiv 2406.11617. In each row the entries are ranked by |delta|,
    0 to n - 1; p_i = density - window + 2 * window * rank_i / (n - 1); kept with probability p_i
    and divided by it; then TIES' election and disjoint mean. Equal magnitudes rank by their index.
    """
    return Rule(keep="magprune", rescale=True, elect="sum", combine="mean")


def breadcrumbs(settings: MethodSettings) -> Rule:
    """Drops outliers and small entries, then adds as task arithmetic does.

    Source: Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
    Masks", arXiv 2312.06795: a tensor at a time, the `outliers` share of largest |delta| is
    dropped, the next `density` share is kept.
    """
    return Rule(keep="band")


def sce(settings: MethodSettings) -> Rule:
    """Selects by variance over tasks, weighs tasks by their squares, erases the minority sign.

    Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990. Select: the
    `density` share of entries whose variance over the task vectors is largest, the same mask for
    all. Calculate: eta_k = share of task k in the summed squares of selected deltas. Erase: entries
    against the sign of the sum. theta_M = theta_B + sum_k eta_k delta_k / sum_k eta_k over
    survivors, with eta_k multiplied by `weights`.
    """
    return Rule(keep="variance", elect="sum", combine="average", energy=True)


def ram(settings: MethodSettings) -> Rule:
    """Keeps what one task alone changed, averages what several changed.

    Source: "Reinforced Agent Merging", arXiv 2601.13572: changed means |delta| > `threshold`.
    """
    return Rule(keep="above", combine="mean")


def ram_plus(settings: MethodSettings) -> Rule:
    """RAM, with what one task alone changed scaled up where much of that task is shared.

    Source: arXiv 2601.13572, the tensor-local form: unique entries of task k are multiplied by
    1 + r * min(shared_k / unique_k, alpha) with counts over the tensor; r is `boost`, alpha
    `boost_limit`.
    """
    return Rule(keep="above", combine="mean", boost=True)


def obm(settings: MethodSettings) -> Rule:
    """Optimal Brain Merging: keeps what is costly to drop, lets the cost decide on the sign.

    Source: Wang et al., arXiv 2603.01416 (OBM), with the diagonal Hessian of its predecessor OBIM,
    arXiv 2502.12217. With layer inputs X the layer-wise squared error has the Hessian
    H = 2 E[x x^T], so dropping one entry of a task vector costs

        s_k[i, j] = 1/2 * H_jj * delta_k[i, j]^2 = h_k[j] * delta_k[i, j]^2      (diagonal)
        s_k[i, j] = delta_k[i, j]^2 / [(E[x x^T] + damping)^-1]_jj                 (inverse)
        kept_k    = the top share p of s_k, zero deltas excluded                   (density)
        sigma     = sign(sum_k s_k * sign(delta_k)) over kept entries              (consensus)
        theta_M   = theta_B + sum_k lambda_k * delta_k * [kept_k and sign(delta_k) = sigma]

    `inverse` is the cost when the other entries of the row make up for the dropped one (Optimal
    Brain Surgeon, as in SparseGPT, arXiv 2301.00774).

    Not stated by the paper, hence settings: p; lambda_k; whether saliencies of tasks whose deltas
    differ in size are normalised before they vote (`selection.vote_scales`; keeping is per task,
    and does not change); `sum`, or `mean` over the tasks that survive at an entry.
    """
    return Rule(keep="top", score="saliency", elect="saliency", combine=settings.combine)


def regmean_diagonal(settings: MethodSettings) -> Rule:
    """RegMean with diagonal Gram matrices: each input channel is averaged by its second moments.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv
    2212.09849, with all off-diagonal entries shrunk to zero:
    theta_M[:, j] = sum_k lambda_k h_k[j] theta_k[:, j] / sum_k lambda_k h_k[j].
    """
    return Rule(keep="all", score="saliency", combine="ratio")


def fisher(settings: MethodSettings) -> Rule:
    """Averages the checkpoints weighted by their diagonal Fisher information.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832:
    theta_M = sum_k lambda_k F_k theta_k / sum_k lambda_k F_k, entry by entry, with F_k the mean
    squared gradient of the log-likelihood. Where all F_k are zero, the lambda-weighted average.
    """
    return Rule(keep="all", score="entry", combine="ratio")


def sar(settings: MethodSettings) -> Rule:
    """SAR-Merging: sensitivity settles conflicts, magnitude trims, a factor restores the norm.

    Source: "SAR-Merging", arXiv 2606.18521, of which the abstract and no formula is public. It
    "resolves conflicts in overlapping update regions via Fisher Information-based sensitivity
    arbitration, followed by magnitude-aware sparsification and rescaling". Our reading:

        M_k     = |delta_k| > threshold                                          (support)
        winner  = sign(delta_w), w = argmax_k F_k delta_k^2, where signs in the supports differ
        tau_k   = delta_k * [M_k and no conflict, or sign(delta_k) = winner]     (arbitration)
        kept_k  = the `density` share of entries of largest |tau_k|              (sparsification)
        f_k     = ||tau_k|| / ||tau_k * kept_k||, over the tensor                (rescaling)
        theta_M = theta_B + sum_k lambda_k f_k tau_k kept_k

    with F_k[i] the mean squared gradient of log p of model k's own answers. What one task alone
    changed meets no conflict, and stays whole while it is not more than the density allows. Ours,
    not the paper's: `normalization` of F delta^2 before it decides; `combine`, what happens where
    supports overlap and agree; ties (`sar.settle_conflicts`); that f_k makes up for trimming, not
    for lost conflicts. docs/sar.md argues each.
    """
    return Rule(keep="top", combine=settings.combine, arbitrate=True)


@dataclass(frozen=True)
class Method:
    """One way of merging a tensor."""

    name: str
    rule: RuleOf | None
    """None for the methods of `dense`, and for layer_swap, which the plan turns into copies."""
    needs: str | None = None
    """Kind of statistics: None, vector (one number a linear input), fisher, gram."""
    linear_only: bool = False
    """Whether it merges linear projections only."""
    is_sparse: bool = False
    """Whether `density` has a meaning for it."""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("obm", obm, needs="vector", linear_only=True, is_sparse=True),
        Method("linear", linear),
        Method("task_arithmetic", task_arithmetic),
        Method("ties", ties, is_sparse=True),
        Method("dare", dare, is_sparse=True),
        Method("dare_ties", dare_ties, is_sparse=True),
        Method("della", della, is_sparse=True),
        Method("breadcrumbs", breadcrumbs, is_sparse=True),
        Method("sce", sce, is_sparse=True),
        Method("ram", ram),
        Method("ram_plus", ram_plus),
        Method("layer_swap", None),
        Method("fisher", fisher, needs="fisher"),
        Method("sar", sar, needs="fisher", is_sparse=True),
        Method("regmean_diagonal", regmean_diagonal, needs="vector", linear_only=True),
        Method("regmean", None, needs="gram", linear_only=True),
        Method("wudi", None, linear_only=True),
    )
}
