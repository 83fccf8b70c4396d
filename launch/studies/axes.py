"""Axes of an ablation: one setting, or a few named ones, changed around a reference recipe.

    axes:
      density: {setting: merge.density, values: [0.1, 0.25, 0.5]}
      saliency:
        points:
          diagonal: {}                             # {} = the reference
          inverse: {merge: {saliency: inverse}}
          magnitude: {statistics: ones}            # no second moments: all inputs count the same

A point that changes nothing is the reference; an axis that has none gets it. A file that is named
as calibration data may lie beside the study file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import LaunchError
from launch.studies.file import Study
from launch.studies.plan import flatten

if TYPE_CHECKING:
    from configs.schema import Config

STATISTICS = ("measured", "ones")
"""What a merge reads: what calibration has found, or ones in its place."""
NOT_OF_THE_SAMPLE = ("kinds", "output", "seed")
"""Keys of `calibration:` by which no two sets of statistics are told apart here."""


@dataclass(frozen=True)
class Point:
    """One setting of an axis."""

    axis: str
    value: Any
    """as in the study file, for table and picture"""
    arm: str
    """name of what is measured; the reference's where nothing is changed"""
    settings: dict[str, Any]
    """what is changed, nested"""
    config: Config
    statistics: str = "measured"

    @property
    def words(self) -> str:
        """What is changed, in words."""
        from compare.tuning import setting_text

        if self.statistics == "ones":
            return "statistics ones"
        changed = dict(override.split("=", 1) for override in flatten(self.settings))
        short = {key.removeprefix("merge."): text.strip('"') for key, text in changed.items()}
        return setting_text(short) if short else "the reference"


def read_axes(study: Study, overrides: list[str]) -> dict[str, list[Point]]:
    """Every axis with its points, settings loaded and checked; the reference is among them.

    Args:
        study: its one arm is the reference.
        overrides: `key=value`, laid over the study's own.

    Raises:
        ConfigError: a value that its key cannot have.
        LaunchError: an axis without values, an unknown key of one, a value listed twice.
    """
    base = [*flatten(study.overrides), *overrides, *flatten({"merge": study.arms[0].merge})]
    base.append(f'output="{study.output}"')
    reference = _load(study, base, {})
    if not study.axes:
        raise LaunchError(f"{study.name}:axes: no axis is named; name at least one")
    return {
        axis: _read_axis(study, base, reference, axis, entry) for axis, entry in study.axes.items()
    }


def reference_point(axes: Mapping[str, list[Point]]) -> Point:
    """The recipe around which everything is varied."""
    first = next(iter(axes.values()))
    return next(point for point in first if is_reference(point))


def is_reference(point: Point) -> bool:
    """Whether nothing is changed at this point."""
    return not point.settings and point.statistics == "measured"


def all_points(axes: Mapping[str, list[Point]]) -> list[Point]:
    """Each measured thing once, the reference first."""
    first = reference_point(axes)
    found = {first.arm: first}
    for points in axes.values():
        for point in points:
            found.setdefault(point.arm, point)
    return list(found.values())


def sample_key(point: Point) -> str:
    """What tells the point's calibration from another's; ones are made from the measured ones."""
    section = asdict(point.config.calibration)
    return repr({key: value for key, value in section.items() if key not in NOT_OF_THE_SAMPLE})


def _read_axis(
    study: Study, base: list[str], reference: Config, axis: str, entry: Any
) -> list[Point]:
    where = f"{study.name}:axes.{axis}"
    points = []
    for value, settings in _settings_of(entry, where):
        statistics = settings.pop("statistics", "measured")
        if statistics not in STATISTICS:
            raise LaunchError(f"{where}: statistics {statistics!r}; choose {', '.join(STATISTICS)}")
        unknown = sorted(set(settings) - {"merge", "calibration"})
        if unknown:
            raise LaunchError(
                f"{where}: {unknown[0]!r} is not varied here; a point changes merge, calibration "
                "or statistics"
            )
        config = _load(study, base, settings)
        is_same = statistics == "measured" and _decides(config) == _decides(reference)
        arm = study.arms[0].name if is_same else f"{axis} {value}"
        settings = {} if is_same else settings
        points.append(Point(axis, value, arm, settings, config, statistics))
    values = [point.value for point in points]
    repeated = [value for value in values if values.count(value) > 1]
    if repeated or sum(is_reference(point) for point in points) > 1:
        twice = repr(repeated[0]) if repeated else "the reference"
        raise LaunchError(f"{where}: {twice} appears twice; list each value once")
    if not any(is_reference(point) for point in points):
        points.append(_own_reference(study, reference, axis, entry))
        if all(isinstance(point.value, int | float) for point in points):
            points.sort(key=lambda point: float(point.value))
    return points


def _settings_of(entry: Any, where: str) -> list[tuple[Any, dict[str, Any]]]:
    """(value, what it changes) of each point."""
    is_mapping = isinstance(entry, dict)
    if is_mapping and set(entry) == {"setting", "values"} and isinstance(entry["values"], list):
        return [(value, _nest(str(entry["setting"]), value)) for value in entry["values"]]
    if is_mapping and set(entry) == {"points"} and isinstance(entry["points"], dict):
        return [(str(name), dict(settings or {})) for name, settings in entry["points"].items()]
    raise LaunchError(
        f"{where}: write {{setting: KEY, values: [...]}}, or {{points: {{NAME: ...}}}}"
    )


def _own_reference(study: Study, reference: Config, axis: str, entry: dict[str, Any]) -> Point:
    """The reference's own value on an axis that does not list it."""
    value: Any = "reference"
    if "setting" in entry:
        value = asdict(reference)
        for key in str(entry["setting"]).split("."):
            value = value[key]
    return Point(axis, value, study.arms[0].name, {}, reference)


def _load(study: Study, base: list[str], settings: dict[str, Any]) -> Config:
    from configs.schema import load_config

    config = load_config(study.config, [*base, *flatten(settings)])
    for data in (config.calibration.vlm_data, config.calibration.agent_data):
        if data["source"] and (study.folder / data["source"]).is_file():
            data["source"] = str(study.folder / data["source"])
    return config


def _decides(config: Config) -> Any:
    """What a merge is decided by."""
    return asdict(config.merge), asdict(config.calibration)


def _nest(key: str, value: Any) -> dict[str, Any]:
    """`_nest("merge.density", 0.5)` is `{"merge": {"density": 0.5}}`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def statistics_folder(study: Study, seed: int, name: str) -> Path:
    """Where one set of statistics of a seed lies."""
    return study.output / "calibration" / f"s{seed}" / name
