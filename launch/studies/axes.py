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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import LaunchError
from launch.studies.file import Study
from launch.studies.plan import COMMAND_LINE, SEEDED, check_heeded, flatten, load_settings

if TYPE_CHECKING:
    from configs.schema import Config

Settings = Sequence[tuple[str, Sequence[str]]]
"""As `launch.studies.plan.load_settings` takes them."""
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
        ConfigError: a value that its key cannot have, or an override that would change nothing.
        LaunchError: an axis without values, an unknown key of one, a value listed twice.
    """
    if not study.axes:
        raise LaunchError(f"{study.file}:axes: no axis is named; name at least one")
    base = [
        (f"{study.file}:overrides.", flatten(study.overrides)),
        (COMMAND_LINE, overrides),
        (f"{study.place(study.arms[0])}.", flatten({"merge": study.arms[0].merge})),
        (f"{study.file}:", flatten({"output": str(study.output)})),
    ]
    reference = _load(study, base)
    recipe = {override.partition("=")[0] for override in flatten({"merge": study.arms[0].merge})}
    check_heeded(study, overrides, [{*recipe, *SEEDED, "seed", "output", "calibration.output"}])
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
    study: Study, base: Settings, reference: Config, axis: str, entry: dict[str, Any]
) -> list[Point]:
    where = f"{study.file}:axes.{axis}"
    points = []
    for value, settings in _settings_of(entry):
        statistics = settings.pop("statistics", "measured")
        if statistics not in STATISTICS:
            raise LaunchError(f"{where}: statistics {statistics!r}; choose {', '.join(STATISTICS)}")
        unknown = sorted(set(settings) - {"merge", "calibration"})
        if unknown:
            raise LaunchError(
                f"{where}: {unknown[0]!r} is not varied here; a point changes merge, calibration "
                "or statistics"
            )
        place = f"{where}.points.{value}." if "points" in entry else f"{where}."
        config = _load(study, [*base, (place, flatten(settings))])
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


def _settings_of(entry: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """(value, what it changes) of each point; the entry's shape was checked when it was read."""
    if "setting" in entry:
        return [(value, _nest(entry["setting"], value)) for value in entry["values"]]
    return [(str(name), dict(settings or {})) for name, settings in entry["points"].items()]


def _own_reference(study: Study, reference: Config, axis: str, entry: dict[str, Any]) -> Point:
    """The reference's own value on an axis that does not list it."""
    value: Any = "reference"
    if "setting" in entry:
        value = asdict(reference)
        for key in entry["setting"].split("."):
            # the weight of a model that the reference does not name
            value = value.get(key, 1.0)
    return Point(axis, value, study.arms[0].name, {}, reference)


def _load(study: Study, settings: Settings) -> Config:
    config = load_settings(study.config, settings)
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
