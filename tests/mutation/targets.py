"""What is mutated, and which tests have to notice: the numbers that results stand on.

One entry a topic. A mutant that survives is either a hole in the tests, or changes nothing that can
be seen; the latter stands in `EQUIVALENT` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NUMPY_KERNELS = {"OBM_KERNELS": "numpy"}
"""The plain kernels are mutated, not numba's: `test_kernels` demands the same bits of both."""
PLAIN_PYTHON = {"NUMBA_DISABLE_JIT": "1"}
"""Compiled code is kept on disk under the name of its file: a mutant must never get there."""

PLAIN = ("--noconftest",)
"""Tests that need no fixture do not load torch."""
BY_HAND = ("tests/merge/test_methods.py", *PLAIN, "-k", "not reference and not random")
"""The methods by hand and at their limits; the slow reference would find more, in more time."""

NO_PROPERTIES = (
    "-k",
    "not (bounded or is_total or symmetric or takes_back or matches_it or scores_it or atlas)",
)
"""Without the properties that take hundreds of examples."""


@dataclass(frozen=True)
class Target:
    """Functions of one topic, and the tests that answer for them."""

    topic: str
    functions: tuple[str, ...]
    """`module:name` or `module:Class.name`."""
    tests: tuple[str, ...]
    """Arguments of pytest."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that are set before anything is imported."""
    n_mutants: int = 6
    """At most so many a function, drawn by seed, every kind of error in turn."""


TARGETS = (
    Target(
        "OBM's saliency, SCE's variance",
        ("merge.kernels_numpy:_scores", "merge.kernels_numpy:_variance"),
        BY_HAND,
        NUMPY_KERNELS,
    ),
    Target(
        "sign election",
        ("merge.kernels_numpy:_elect",),
        BY_HAND,
        NUMPY_KERNELS,
    ),
    Target(
        "masks of a density",
        (
            "merge.selection:share_of", "merge.selection:find_bins", "merge.selection:find_cut",
            "merge.kernels_numpy:_keep", "merge.kernels_numpy:_above",
        ),
        ("tests/merge/test_selection.py", *BY_HAND),
        NUMPY_KERNELS,
    ),
    Target(
        "sums and means of task vectors (TIES, averages, RegMean, Fisher)",
        (
            "merge.kernels_numpy:_combine", "merge.kernels_numpy:_ratio",
            "merge.kernels_numpy:apply",
        ),
        BY_HAND,
        NUMPY_KERNELS,
    ),
    Target(
        "random choices (DARE, DELLA)",
        ("merge.kernels_numpy:uniform", "merge.kernels_numpy:_row_probabilities"),
        ("tests/merge/test_methods.py", "tests/merge/test_kernels.py", *PLAIN, "-k",
         "random or dare or della"),
        NUMPY_KERNELS,
    ),
    Target(
        "saliencies made comparable",
        ("merge.selection:vote_scales", "merge.selection:vote_ranks"),
        ("tests/merge/test_selection.py", *BY_HAND),
        NUMPY_KERNELS,
    ),
    Target(
        "RAM+'s boost, SCE's energies",
        ("merge.tensor:_weigh_kept",),
        BY_HAND,
        NUMPY_KERNELS,
    ),
    Target(
        "WUDI and RegMean",
        ("merge.dense:wudi_update", "merge.dense:regmean_update"),
        ("tests/merge/test_dense.py", *PLAIN, "-k", "regmean or wudi"),
        NUMPY_KERNELS,
    ),
    Target(
        "SAR",
        ("merge.sar:settle_conflicts", "merge.sar:norm_factors"),
        ("tests/merge/test_sar.py", *PLAIN),
        NUMPY_KERNELS,
    ),
    Target(
        "second moments",
        (
            "merge.inputs:InputSums._make_hook", "merge.inputs:InputSums._add_gram",
            "merge.inputs:token_mask", "merge.sums:SumWriter.write", "merge.sums:inverse_diagonal",
        ),
        (
            "tests/merge/test_calibration.py", "tests/merge/test_streaming.py", "-k",
            "moments or mask or nan or inverse or dead or damping or file_holds or cannot_be_cal",
        ),
    ),
    Target(
        "Fisher information",
        ("merge.fisher:collect_fisher", "merge.fisher:sequence_log_likelihoods",
         "merge.fisher:scored_tokens"),
        ("tests/merge/test_fisher.py",),
    ),
    Target(
        "advantages of a group",
        ("train.objectives:group_advantages",),
        ("tests/train/test_conflict.py", "-k", "advantages"),
    ),
    Target(
        "groups without signal, bonus for thrift, punishment of length, hop credit",
        ("train.credit:groups_without_signal", "train.credit:efficiency_bonuses",
         "train.credit:overlong_penalty", "train.credit:hop_advantages"),
        ("tests/train/test_credit.py", *PLAIN),
    ),
    Target(
        "groups over processes: replaced, and credited",
        ("train.groups:Groups.sample", "train.groups:Groups.add_bonuses",
         "train.groups:Groups.with_hop_credit", "train.groups:first_hits"),
        ("tests/train/test_groups.py", *PLAIN),
    ),
    Target(
        "which tokens carry loss",
        (
            "train.trajectories:Trajectory.completion_mask",
            "train.trajectories:Trajectory.completion_logprobs",
            "train.trajectories:Trajectory.fatal_turn",
            "train.trajectories:Trajectory.mask_before_fatal",
            "train.trajectories:turn_advantages", "train.trajectories:first_masked_turn",
            "train.trajectories:_turn_begins",
        ),
        ("tests/train/test_records.py", "tests/train/test_recorded_tokens.py", "-k",
         "trajectory or fatal or advantage or line"),
    ),
    Target(
        "normal form of an answer",
        ("rewards.normalize:normalize_answer", "rewards.normalize:_plain_ascii",
         "rewards.normalize:_visible", "rewards.normalize:_without_accents",
         "rewards.normalize:_without_punctuation", "rewards.normalize:_joins"),
        ("tests/rewards/test_normalize.py", "tests/rewards/test_cost.py", "-k",
         "normal or ascii"),
    ),
    Target(
        "exact match, containment, F1",
        (
            "rewards.answer:extract_answer", "rewards.answer:exact_match",
            "rewards.answer:correctness", "rewards.answer:_copies", "rewards.checks:token_f1",
            "rewards.checks:careful_f1", "rewards.guesses:offers_more",
        ),
        ("tests/rewards/test_answer_kinds.py", "tests/rewards/test_rewards.py", *NO_PROPERTIES),
    ),
    Target(
        "SQuAD's F1",
        ("rewards.squad:squad_f1",),
        ("tests/rewards/test_official.py", "-k", "subem"),
    ),
    Target(
        "answers with a kind",
        (
            "rewards.numeric:number_matches", "rewards.numeric:overlap", "rewards.numeric:_agree",
            "rewards.numeric:_near", "rewards.numeric:_matches", "rewards.dates:date_matches",
            "rewards.checks:list_matches", "rewards.checks:_read_items",
            "rewards.checks:is_mostly_number",
        ),
        ("tests/rewards/test_answer_kinds.py", *NO_PROPERTIES),
    ),
    Target(
        "reward of an episode",
        ("rewards.compose:score", "rewards.compose:_accuracy", "rewards.search:search_penalty",
         "rewards.search:redundancy", "rewards.search:economy", "rewards.functions:add_functions"),
        ("tests/rewards/test_rewards.py", "tests/rewards/test_lunches.py",
         "tests/rewards/test_functions.py", "tests/rewards/test_judge.py"),
    ),
    Target(
        "BM25",
        ("environments.sparse:top_passages", "environments.sparse:best_touched",
         "environments.sparse:kth_whole", "environments.sparse:whole_score",
         "environments.sparse:find_passage", "environments.sparse:_finish",
         "environments.sparse:_make_shard"),
        ("tests/environments/test_sparse.py", "-k", "equal or bm25s or ties or skipping or any"),
        PLAIN_PYTHON,
    ),
    Target(
        "fusion, nearest vectors, recall",
        ("environments.fusion:fuse", "environments.vectors:_keep_best",
         "environments.vectors:_similarity", "environments.atlas.recall:recall"),
        ("tests/environments/test_dense.py", "tests/atlas/test_atlas_world.py", "-k",
         "fus or exact or l1 or many or recall_by_hand"),
    ),
    Target(
        "intervals over seeds",
        ("compare.intervals:student_t", "compare.intervals:interval",
         "compare.intervals:expanded_percentiles", "compare.intervals:welch_half_width"),
        ("tests/compare/test_intervals.py", "-k", "not per_cent and not not_there"),
    ),
    Target(
        "differences between arms",
        ("compare.intervals:paired_difference", "compare.intervals:unpaired_difference",
         "compare.intervals:share_above", "compare.intervals:sign_flip_p",
         "compare.intervals:shared_out_p", "compare.intervals:Difference.mirrored"),
        ("tests/compare/test_intervals.py", "-k", "not per_cent and not not_there"),
    ),
    Target(
        "floor, ceiling, steps to target",
        ("compare.curves:smooth", "compare.curves:ceiling_index", "compare.curves:area_under_curve",
         "compare.curves:index_at_target", "compare.curves:value_at_cost",
         "compare.curves:collapses", "compare.curves:largest_drop"),
        ("tests/compare/test_curves.py",),
    ),
    Target(
        "device seconds to target",
        ("compare.cost:training_device_s", "compare.cost:_not_above_later_steps",
         "compare.cost:Cost.total_s", "compare.measures:_costs_to_target",
         "compare.measures:stability_of"),
        ("tests/compare/test_cost.py", "tests/compare/test_summary.py", "-k",
         "cost or seconds or wall or stability or budget"),
    ),
    Target(
        "log-probs in the loss",
        ("train.scoring:_head", "train.scoring:_in_tiles", "train.scoring:_read_bucket",
         "train.scoring:score_rows"),
        ("tests/train/test_scoring.py",),
    ),
    Target(
        "log-probs in the rollout",
        ("train.batch:TokenBatch.sample",),
        ("tests/train/test_rollout.py", "-k", "plain_forward or scripted or may"),
    ),
    Target(
        "pairs of steps for DPO",
        ("train.sport_tune:PairCollator.__call__",),
        ("tests/train/test_sport_tune.py", "-k", "batch or scores"),
    ),
    Target(
        "M-RoPE positions",
        ("train.vision:mrope_positions",),
        ("tests/train/test_vision.py",),
        n_mutants=16,
    ),
    Target(
        "cosines, overlaps, energies of updates",
        ("merge.geometry:sum_entries", "merge.geometry:Magnitudes.effective",
         "merge.geometry:model_figures", "merge.geometry:pair_figures",
         "merge.geometry:average_figures"),
        ("tests/merge/test_geometry.py", *PLAIN, "-k",
         "hand or average or effective or sums or bf16 or shares"),
    ),
    Target(
        "spectra of updates",
        ("merge.spectrum:leading_spectrum", "merge.spectrum:_decompose",
         "merge.spectrum:multiply_transposed", "merge.spectrum:subspace_energy"),
        ("tests/merge/test_spectrum.py", *PLAIN),
    ),
    Target(
        "anchor to the start",
        ("train.anchor:SaliencyAnchor", "train.anchor:_second_moments"),
        ("tests/train/test_algorithms.py", "-k", "anchor"),
    ),
)  # fmt: skip

MEMORY = "a graph is kept longer than needed: more memory, the same numbers"
EDGE = "nothing lies exactly at the tolerance for rounding errors"
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "merge.kernels_numpy:_variance",
        "_ordered_sum(np.square(deltas - mean)) / count"
        " -> _ordered_sum(np.square(deltas - mean)) * count",
    ): "variances are only compared with each other, and keep their order",
    (
        "merge.kernels_numpy:_elect",
        "deltas < 0 -> deltas <= 0",
    ): "a delta of zero has a saliency of zero, whose vote has no sign",
    (
        "merge.selection:vote_scales",
        "counts > 0 -> counts >= 0",
    ): "a bin without entries adds nothing to the sum",
    (
        "merge.tensor:_weigh_kept",
        "total.kept_square.sum() > 0 -> total.kept_square.sum() >= 0",
    ): "where nothing is kept no weight is used",
    (
        "merge.fisher:collect_fisher",
        "row + 1 < len(likelihoods) -> row + 1 <= len(likelihoods)",
    ): MEMORY,
    ("merge.fisher:collect_fisher", "row + 1 -> row - 1"): MEMORY,
    (
        "train.credit:efficiency_bonuses",
        "max(1, len(members)) -> max(2, len(members))",
    ): "a member alone differs from nobody: nought over any number",
    (
        "environments.sparse:top_passages",
        "highest * (1 + SLACK) < least -> highest * (1 + SLACK) <= least",
    ): "the bound has a slack that is a thousand times any rounding",
    (
        "environments.sparse:best_touched",
        "score <= best_scores[n - 1] -> score < best_scores[n - 1]",
    ): "another passage of the same score leads; any of them makes a bound",
    (
        "train.scoring:_head",
        "len(hidden) * head.out_features > MAX_LOGITS"
        " -> len(hidden) * head.out_features >= MAX_LOGITS",
    ): "at the limit both ways compute the same",
    (
        "train.scoring:_head",
        "(head(hidden).float() / temperature).log_softmax(-1)"
        " -> (head(hidden).float() / temperature).log_softmax(+1)",
    ): "of two axes the last is the second",
    (
        "train.scoring:_head",
        "with_entropy and torch.is_grad_enabled() -> with_entropy or torch.is_grad_enabled()",
    ): MEMORY,
    (
        "train.batch:TokenBatch.sample",
        "self.forced.shape[1] - 1 -> self.forced.shape[1] - 2",
    ): "a turn ends before it has as many tokens",
    (
        "merge.spectrum:leading_spectrum",
        "min(shape) <= exact -> min(shape) < exact",
    ): "at the limit either way will do",
    (
        "merge.spectrum:leading_spectrum",
        "min(rank + OVERSAMPLE, *shape) -> max(rank + OVERSAMPLE, *shape)",
    ): "more directions than needed: more work, a smaller error",
    (
        "merge.spectrum:_decompose",
        "matrix.shape[0] <= matrix.shape[1] -> matrix.shape[0] < matrix.shape[1]",
    ): "a square matrix may be taken either way",
    (
        "merge.spectrum:_decompose",
        "np.where(values > 0, values, 1.0) -> np.where(values > 0, values, 2.0)",
    ): "where it counts, nought is divided by it",
    (
        "environments.vectors:_keep_best",
        "np.partition(scores, -k, axis=1) -> np.partition(scores, +k, axis=1)",
    ): "numpy's selection by vector instructions leaves no higher score at that place; a lower one "
    "keeps more, which the sort cuts",
    (
        "environments.vectors:_keep_best",
        "4 * k -> 5 * k",
    ): "only from which length on the same is found in another way",
    (
        "compare.intervals:student_t",
        "degrees <= len(_STUDENT_T) -> degrees < len(_STUDENT_T)",
    ): "the expansion gives the last entry of the table to 0.00005",
    (
        "compare.intervals:paired_difference",
        "np.abs(sample) < ROUNDING -> np.abs(sample) <= ROUNDING",
    ): EDGE,
    ("compare.intervals:share_above", "means > ROUNDING -> means >= ROUNDING"): EDGE,
    (
        "compare.intervals:share_above",
        "np.abs(means) <= ROUNDING -> np.abs(means) < ROUNDING",
    ): EDGE,
    (
        "compare.intervals:sign_flip_p",
        "sums >= abs(float(differences.sum())) - ROUNDING"
        " -> sums > abs(float(differences.sum())) - ROUNDING",
    ): EDGE,
    (
        "compare.intervals:shared_out_p",
        "differences >= observed - ROUNDING -> differences > observed - ROUNDING",
    ): EDGE,
    (
        "compare.intervals:shared_out_p",
        "math.comb(len(pool), n) <= ALL_PERMUTATIONS -> math.comb(len(pool), n) < ALL_PERMUTATIONS",
    ): "no number of ways to share out seeds is 65,536",
    (
        "compare.curves:index_at_target",
        "value >= target - 1e-09 -> value > target - 1e-09",
    ): EDGE,
}
"""(function, change) -> why no test could tell; an entry that no longer fits is an error."""
