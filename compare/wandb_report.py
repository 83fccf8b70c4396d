"""A comparison as a report in W&B: the verdict, the tables, and panels over the runs themselves.

    obm compare runs/a-s0 runs/b-s0 --wandb-report my-team/my-project

Needs the extra `reports` (`wandb_workspaces`) and a login. The text is what NAME.md says; panels
draw the runs of the project that were logged there, grouped by their arm. It is tested against a
stand-in for the package and built with the package itself, but was never sent to the service.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from compare.errors import CompareError

PANELS = {
    "eval/accuracy": "Held-out accuracy",
    "train/reward": "Training reward",
    "eval/search_rate_text": "Text searches",
    "eval/search_rate_image": "Image searches",
}
"""Metric -> title."""
MAX_TITLE = 128


def load_reports() -> ModuleType:
    """The module that makes reports, with a login at hand.

    Raises:
        CompareError: the package is not installed, or nobody is logged in.
    """
    try:
        module = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise CompareError(
            "--wandb-report needs the package wandb_workspaces; "
            'pip install "obm-warmstart[reports]", or leave the option out'
        ) from error
    from train.callbacks import has_wandb_login

    if not has_wandb_login():
        raise CompareError("--wandb-report: not logged in; run `wandb login`, or leave it out")
    return module


def send_report(markdown: str, *, project: str, title: str) -> str:
    """Send the report.

    Args:
        markdown: content of the report's md file.
        project: PROJECT, or ENTITY/PROJECT.
        title: heading, cut to what W&B takes.

    Returns:
        Its address.

    Raises:
        CompareError: see `load_reports`; or the service refused it.
    """
    reports = load_reports()
    entity, _, name = project.rpartition("/")
    where = {"project": name, **({"entity": entity} if entity else {})}
    try:
        report = reports.Report(
            title=title[:MAX_TITLE], blocks=make_blocks(reports, markdown, where), width="fluid",
            **where,
        )  # fmt: skip
        report.save()
    except Exception as error:
        # errors of the package, of its requests and of its checks have no common class
        raise CompareError(
            f"--wandb-report {project}: W&B did not take the report ({error}); "
            "the files are written"
        ) from error
    return str(report.url)


def make_blocks(reports: ModuleType, markdown: str, where: Mapping[str, str]) -> list[Any]:
    """The parts of the report: the text without its heading and picture, then panels of the runs.

    Args:
        reports: of `load_reports`.
        markdown: content of the report's md file.
        where: project and, where it is named, entity.
    """
    lines = [line for line in markdown.splitlines() if not line.startswith(("# ", "!["))]
    panels = [
        reports.LinePlot(title=heading, x="Step", y=[metric], groupby_rangefunc="stderr")
        for metric, heading in PANELS.items()
    ]
    runs = reports.Runset(name="runs, by arm", groupby=["config.arm"], **where)
    return [
        reports.MarkdownBlock("\n".join(lines).strip()),
        reports.PanelGrid(runsets=[runs], panels=panels),
    ]
