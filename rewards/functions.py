"""Reward functions of your own: a Python file beside the settings, named in `reward_functions`.

    def brevity(trajectories, **columns):                       # my_rewards.py
        return [1.0 / (1 + len(t.answer or "")) for t in trajectories]

Called as TRL calls its reward functions: once a batch, with the episodes and with the columns of
their questions as lists in the same order, None where a question lacks one. Each value is a number,
or None where the function has nothing to say; times its weight it is added to the total of an
episode that can be scored. Range: what the function returns.

The file is run when a training starts, so it has to be a file of this machine: nothing is taken
from a hub or from an address.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

from rewards.compose import PARTS, SIGNS
from rewards.errors import RewardError
from rewards.trajectory import get

ADDED = ("efficiency", "overlong")
"""Parts that `algorithm` adds; a function may not take their names."""
NOT_PASSED = ("image",)
"""Columns that a function gets only if it names them: a picture is decoded when it is read."""

_STOPPED = (Exception, SystemExit)
"""Whatever the user's file or function ends with; `sys.exit` would end the run in silence."""


@dataclass(frozen=True)
class RewardFunction:
    """One function, and what it is worth."""

    name: str
    """of its part in metrics, trajectories and reports"""
    weight: float
    call: Callable[..., Any]
    place: str = ""
    """`file.py:function`, for messages"""


def load_functions(sections: Sequence[Any]) -> list[RewardFunction]:
    """The functions that the settings name.

    Args:
        sections: entries of `reward_functions`, each with `function` (`file.py:name`) and `weight`.

    Raises:
        RewardError: no such file or function, a file that does not run, a name that is taken.
    """
    functions: list[RewardFunction] = []
    modules: dict[Path, Any] = {}
    taken = {*PARTS, *SIGNS, *ADDED}
    for number, section in enumerate(sections):
        place = get(section, "function")
        file, name = split_place(place, number)
        path = _find_file(file, place)
        if path not in modules:
            modules[path] = _run_file(path, place)
        call = getattr(modules[path], name, None)
        if not callable(call):
            _fail(place, f"there is no function '{name}' in it", _nearest(name, modules[path]))
        if name in taken:
            _fail(place, f"there is a part '{name}' already", "give the function another name")
        taken.add(name)
        _check_signature(call, place)
        functions.append(RewardFunction(name, float(get(section, "weight")), call, place))
    return functions


def split_place(place: str, number: int = 0) -> tuple[str, str]:
    """(file, function) of `file.py:function`.

    Raises:
        RewardError: of another form, or no file of this machine.
    """
    file, colon, name = place.rpartition(":")
    if "://" in place or not colon or not file.endswith(".py") or not name.isidentifier():
        raise RewardError(
            f"reward_functions[{number}].function: '{place}' is not a function in a file of this "
            "machine; write my_rewards.py:brevity"
        )
    return file, name


def check_columns(
    functions: Sequence[RewardFunction], questions: Sequence[Mapping[str, Any]]
) -> None:
    """Checks that the questions have what the functions ask for by name.

    Raises:
        RewardError: a function needs a column that no question has.
    """
    columns = {column for question in questions for column in question}
    for function in functions:
        needed, _ = _parameters(function.call)
        for name, is_optional in needed.items():
            if name not in columns and not is_optional:
                near = difflib.get_close_matches(name, columns, n=1)
                fix = (
                    f"did you mean '{near[0]}'?"
                    if near
                    else f"there are {', '.join(sorted(columns))}"
                )
                _fail(function.place, f"no question has a column '{name}'", fix)


def add_functions(
    functions: Sequence[RewardFunction],
    trajectories: Sequence[Any],
    questions: Sequence[Mapping[str, Any]],
    scores: Sequence[dict[str, float | None]],
) -> None:
    """Adds every function's part to the scores, and its weight times it to the total, in place.

    An episode that cannot be scored (total None) keeps its total; its parts are there to be read.

    Args:
        functions: what `load_functions` returns.
        trajectories: N episodes.
        questions: their N questions.
        scores: their N scores, of `rewards.compose.score_each`.

    Raises:
        RewardError: a function fails, or returns what is no list of N numbers.
    """
    if not trajectories:  # a round of dynamic sampling without a row of this process
        return
    for function in functions:
        values = call_function(function, trajectories, questions)
        for parts, value in zip(scores, values, strict=True):
            parts[function.name] = value
            if value is not None and (total := parts["total"]) is not None:
                parts["total"] = total + function.weight * value


def call_function(
    function: RewardFunction,
    trajectories: Sequence[Any],
    questions: Sequence[Mapping[str, Any]],
) -> list[float | None]:
    """One value an episode, checked.

    Raises:
        RewardError: the function fails, or returns what is no list of numbers, one an episode.
    """
    needed, takes_all = _parameters(function.call)
    names = dict.fromkeys(name for question in questions for name in question)
    passed = [n for n in names if n in needed or (takes_all and n not in NOT_PASSED)]
    # a column that some questions lack may be missing in a whole batch, or in the evaluation
    passed += [n for n, is_optional in needed.items() if n not in names and not is_optional]
    columns = {name: [question.get(name) for question in questions] for name in passed}
    try:
        returned = function.call(list(trajectories), **columns)
    except _STOPPED as error:
        _fail(function.place, f"it stopped with {_words(error)}", "mend it; --debug shows more")
    try:
        values = list(returned)
    except TypeError:
        kind = type(returned).__name__
        _fail(function.place, f"it returned {kind}, not a list", "return one number an episode")
    except _STOPPED as error:  # a function with `yield` runs only now
        _fail(function.place, f"it stopped with {_words(error)}", "mend it; --debug shows more")
    if len(values) != len(trajectories):
        reason = f"it returned {len(values)} values for {len(trajectories)} episodes"
        _fail(function.place, reason, "return one number, or None, for each in order")
    return [_number(v, function, q) for v, q in zip(values, questions, strict=True)]


def _number(value: Any, function: RewardFunction, question: Mapping[str, Any]) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, Real)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if math.isfinite(number):
        return number
    shown = number if is_number else reprlib.repr(value)
    where = f"for question {question.get('id')} it returned {shown}"
    if not is_number:
        _fail(function.place, f"{where}, which is no number", "return plain numbers (x.tolist())")
    _fail(function.place, where, "return None where there is nothing to say")


def _find_file(file: str, place: str) -> Path:
    try:
        path = Path(file).expanduser().resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, the home of nobody
        is_file = False
    if not is_file:
        _fail(place, f"no such file (looked in {Path.cwd()})", "check the path")
    return path


def _run_file(path: Path, place: str) -> Any:
    """The file as a module; those beside it can be imported, after all that is installed."""
    name = f"reward_functions_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except _STOPPED as error:
        _fail(place, f"the file does not run: {_words(error)}", "mend it; --debug shows more")
    return module


def _check_signature(call: Callable[..., Any], place: str) -> None:
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if not parameters or parameters[0].kind not in positional:
        _fail(place, "it takes no episodes", "define it as def f(trajectories, **columns)")
    if any(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in parameters[1:]):
        _fail(place, "columns are passed by name", "define it as def f(trajectories, **columns)")


def _parameters(call: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """Columns that are named, True where they have a default; and whether it takes all others."""
    parameters = list(inspect.signature(call).parameters.values())[1:]
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p.default is not p.empty for p in parameters if p.kind in by_name}
    return named, takes_all


def _words(error: BaseException) -> str:
    """The error, and the line of the user's file that it came from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
    at = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return f"{type(error).__name__}: {error} (line {at})"


def _nearest(name: str, module: Any) -> str:
    names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{near[0]}'?" if near else f"it has {', '.join(names) or 'none'}"


def _fail(place: str, reason: str, fix: str) -> NoReturn:
    error = sys.exc_info()[1]
    raise RewardError(f"reward_functions: {place}: {reason}; {fix}") from error
