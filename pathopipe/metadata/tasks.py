"""Tasks: the catalogue fields to predict, read from a file, and a table's cells as numbers."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import yaml
from numpy.typing import NDArray

from pathopipe.cohort import LabelTable, is_missing
from pathopipe.cohort.table import quote, refuse
from pathopipe.errors import UsageError
from pathopipe.mil.targets import Kind as TargetKind
from pathopipe.mil.targets import TargetSpec, encode_targets
from pathopipe.registry import nearest

__all__ = ["Kind", "TaskSpec", "encode", "read_tasks", "settle"]

Kind = Literal["multi-class", "multi-label", "ordinal", "continuous"]

_KINDS: Final[tuple[str, ...]] = get_args(Kind)
_KEYS: Final = ("name", "column", "kind", "classes", "weight", "codes", "rename", "deny")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")
_KEY_COLUMNS: Final = ("slide_id", "patient_id")
# A class of one patient can't be both learnt and tested.
_LEAST_PATIENTS_OF_CLASS: Final = 2
_SHOWN_SLIDES: Final = 3
_SHOWN_CELLS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """One field of the catalogue."""

    name: str
    column: str
    """The column of the manifest that records it."""
    kind: Kind
    classes: tuple[str, ...] = ()
    """Low to high where ordinal; empty: all that the column holds, in alphabetical order (multi-class, multi-label)."""
    weight: float = 1.0
    """Of its loss among those of the other tasks."""
    codes: Mapping[str, str] = field(default_factory=dict)
    """Class to the code of a terminology: ``SNOMED CT 86273004``."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Cell, in small letters, to class; ``""``: such a cell states nothing."""
    deny_columns: tuple[str, ...] = ()
    """Columns that state the label; they are no input of any task."""
    deny_text: tuple[str, ...] = ()
    """Regular expressions; report sentences in which one is found are taken out."""

    @property
    def target(self) -> TargetSpec:
        """The same as ``mil`` knows it; two classes are binary, the second is the positive.

        Raises:
            UsageError: The classes are not settled yet.
        """
        kind: TargetKind
        match self.kind:
            case "continuous":
                return TargetSpec(name=self.name, kind="regression", columns=(self.column,))
            case "multi-label":
                kind = "multilabel"
            case "ordinal":
                kind = "ordinal"
            case _:
                kind = "binary" if len(self.classes) == 2 else "multiclass"
        if not self.classes:
            raise UsageError(f"task '{self.name}' names no classes; give them in the task file")
        return TargetSpec(name=self.name, kind=kind, columns=(self.column,), classes=self.classes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "TaskSpec":
        """The reverse of :meth:`to_json`."""
        plain: dict[str, Any] = {key: tuple(of) if isinstance(of, list) else of for key, of in record.items()}
        return cls(**plain)


# --- the task file -----------------------------------------------------------------------------------------------


def read_tasks(path: Path) -> tuple[TaskSpec, ...]:
    """Read a task file: YAML with a list ``tasks``; ``configs/metadata_tasks.yaml`` shows all there is.

    Every scalar is taken as the text that stands there: ``01`` and ``no`` are names of classes, not numbers or truth
    values.

    Raises:
        UsageError: The file can't be read; a key or kind is unknown (the nearest is named), a name stands there twice,
            classes are missing or double, or a regular expression is none. One error lists every problem.
    """
    loaded = _load(path)
    if not isinstance(loaded, dict) or set(loaded) != {"tasks"} or not isinstance(loaded["tasks"], list):
        raise UsageError(f"{path.name}: a task file is one list under the key 'tasks'")
    problems: list[str] = []
    tasks = []
    for number, record in enumerate(loaded["tasks"], 1):
        if not isinstance(record, dict):
            problems.append(f"task {number}: not a mapping; write '- name: ...' and its settings below")
            continue
        where = f"task '{record['name']}'" if isinstance(record.get("name"), str) else f"task {number}"
        found = len(problems)
        task = _read_task(record, where, problems)
        if len(problems) == found:
            tasks.append(task)
    for name, count in Counter(task.name for task in tasks).items():
        if count > 1:
            problems.append(f"task '{name}' stands there {count} times; name each once")
    if problems:
        refuse(path.name, problems)
    if not tasks:
        raise UsageError(f"{path.name}: no task in it; write one entry a field of the catalogue")
    return tuple(tasks)


def _load(path: Path) -> Any:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the task file can't be read ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name}: not valid YAML ({' '.join(str(error).split())})") from None
    return None if node is None else _plain(node, path.name, set())


def _plain(node: yaml.Node, where: str, seen: set[int]) -> Any:
    """Lists, mappings and texts; refuses keys that stand there twice, tags and references."""
    line = f"{where} line {node.start_mark.line + 1}"
    if id(node) in seen or not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise UsageError(f"{line}: references and tags have no place in a task file; write the value out")
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, where, seen) for item in node.value]
    mapping: dict[str, Any] = {}
    for key, value in node.value:
        name = _plain(key, where, seen)
        if not isinstance(name, str):
            raise UsageError(f"{line}: a key must be a word")
        if name in mapping:
            raise UsageError(f"{where} line {key.start_mark.line + 1}: '{name}' stands there twice; keep one")
        mapping[name] = _plain(value, where, seen)
    return mapping


def _read_task(record: Mapping[str, Any], where: str, problems: list[str]) -> TaskSpec:
    def say(text: str) -> None:
        problems.append(f"{where}: {text}")

    for key in record:
        if key not in _KEYS:
            say(f"unknown key '{key}'; {nearest(key, _KEYS)}")
    name = _text(record, "name", "", say)
    if not name:
        say("no 'name'; give one of letters, digits, '.', '_' or '-'")
    elif not _NAME.fullmatch(name):
        say("a name is of small letters, digits, '.', '_' or '-', and names files and columns")
    column = _text(record, "column", name, say)
    if column in _KEY_COLUMNS:
        say(f"column '{column}' names the slide or the patient, so nothing can be learnt of it")
    kind = _text(record, "kind", "", say)
    if kind not in _KINDS:
        say(f"unknown kind '{kind}'; {nearest(kind, _KINDS)}" if kind else f"no 'kind'; known: {', '.join(_KINDS)}")
    classes = _texts(record, "classes", say)
    codes, rename = _mapping(record, "codes", say), _mapping(record, "rename", say)
    rename = {cell.casefold(): "" if is_missing(of) else of for cell, of in rename.items()}
    _check_classes(kind, classes, say)
    for key, names in (("codes", codes), ("rename", [of for of in rename.values() if of])):
        for of in names:
            if kind == "continuous":
                say(f"'{key}' is for classes, and a continuous task has none")
                break
            if classes and of not in classes:
                say(f"{key}: no class {quote(of)}; {nearest(of, classes)}")
    deny = record.get("deny", {})
    if not isinstance(deny, dict):
        say("'deny' has two lists, 'columns' and 'text'")
        deny = {}
    for key in deny:
        if key not in ("columns", "text"):
            say(f"unknown key 'deny.{key}'; {nearest(key, ('columns', 'text'))}")
    patterns = _texts(deny, "text", say)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            say(f"deny.text: {quote(pattern)} is no regular expression ({error})")
    return TaskSpec(
        name=name,
        column=column,
        kind=kind,  # type: ignore[arg-type]
        classes=classes,
        weight=_weight(record, say),
        codes=codes,
        rename=rename,
        deny_columns=_texts(deny, "columns", say),
        deny_text=patterns,
    )


def _check_classes(kind: str, classes: Sequence[str], say: Any) -> None:
    for of, count in Counter(name.casefold() for name in classes).items():
        if count > 1:
            say(f"class {quote(of)} stands there {count} times; name each once")
    for of in classes:
        if is_missing(of):
            say(f"a class {quote(of)} would read as a missing cell; name it otherwise and say so under 'rename'")
        if ";" in of and kind == "multi-label":
            say(f"class {quote(of)}: ';' parts the labels of a cell")
    if kind == "continuous" and classes:
        say("a continuous task has no classes")
    if kind == "ordinal" and not classes:
        say("an ordinal task names its classes, low to high")
    if kind in ("multi-class", "ordinal") and len(classes) == 1:
        say(f"one class only ({classes[0]}), so there is nothing to tell apart; name two or more")


def _text(record: Mapping[str, Any], key: str, default: str, say: Any) -> str:
    value = record.get(key, default)
    if not isinstance(value, str):
        say(f"'{key}' is one word or phrase")
        return default
    return value.strip()


def _texts(record: Mapping[str, Any], key: str, say: Any) -> tuple[str, ...]:
    value = record.get(key, [])
    if not isinstance(value, list) or not all(isinstance(part, str) and part.strip() for part in value):
        say(f"'{key}' is a list of words or phrases")
        return ()
    return tuple(part.strip() for part in value)


def _mapping(record: Mapping[str, Any], key: str, say: Any) -> dict[str, str]:
    value = record.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(of, str) for of in value.values()):
        say(f"'{key}' is a mapping, one line each")
        return {}
    return {name.strip(): of.strip() for name, of in value.items()}


def _weight(record: Mapping[str, Any], say: Any) -> float:
    value = record.get("weight", "1")
    weight = _number(value) if isinstance(value, str) else None
    if weight is None or weight <= 0:
        say(f"weight {value!r} is no number above 0")
        return 1.0
    return weight


# --- cells -------------------------------------------------------------------------------------------------------


def settle(task: TaskSpec, table: LabelTable) -> tuple[TaskSpec, str]:
    """Name the classes of a task that leaves them to its column, in alphabetical order.

    Values of a single patient become cells that state nothing: they can't be both learnt and tested.

    Returns:
        The task, and a sentence on what was left out (``""``: nothing).

    Raises:
        UsageError: There is no such column.
    """
    if task.classes or task.kind == "continuous":
        return task, ""
    patients: dict[str, set[str]] = {}
    spelt: dict[str, str] = {}
    for cell, patient in zip(table.column(task.column), table.patient_ids, strict=True):
        for label in _labels(task, cell):
            patients.setdefault(spelt.setdefault(label.casefold(), label), set()).add(patient)
    order = sorted(patients, key=str.casefold)
    rare = [of for of in order if len(patients[of]) < _LEAST_PATIENTS_OF_CLASS]
    settled = replace(
        task,
        classes=tuple(of for of in order if of not in rare),
        rename={**task.rename, **dict.fromkeys((of.casefold() for of in rare), "")},
    )
    note = f"task '{task.name}': {len(rare)} values of a single patient left out ({_some(rare)})" if rare else ""
    return settled, note


def encode(task: TaskSpec, table: LabelTable) -> NDArray[np.float64]:
    """Labels as numbers, NaN where missing: (n, labels) 0 or 1 where multi-label, else (n, 1) class number or value.

    Upper and lower case make no difference between classes.

    Raises:
        UsageError: No such column, or cells that are no class of the task or no number, with slides and the nearest
            class.
    """
    cells = table.column(task.column)
    known = {of.casefold(): of for of in task.classes}
    read: list[str] = []
    odd: dict[str, list[str]] = {}
    for cell, slide_id in zip(cells, table.slide_ids, strict=True):
        labels = _labels(task, cell)
        named = [known.get(label.casefold(), "") for label in labels]
        if task.kind == "continuous":
            named = [label if _number(label) is not None else "" for label in labels]
        for label, of in zip(labels, named, strict=True):
            if not of:
                odd.setdefault(label, []).append(slide_id)
        read.append(";".join(named))
    if odd:
        _refuse_cells(task, table.source, odd)
    # What mil reads are cells under its own names, with nothing but classes in them.
    column = LabelTable.of_slides(table.slide_ids)
    return encode_targets([task.target], replace(column, columns={task.column: tuple(read)}))


def _labels(task: TaskSpec, cell: str) -> list[str]:
    """What a cell states, after renaming; nothing where it is missing."""
    whole = cell.strip().casefold() in task.rename
    parts = [part.strip() for part in (cell.split(";") if task.kind == "multi-label" and not whole else [cell])]
    renamed = [task.rename.get(part.casefold(), part) for part in parts]
    return [label for label in renamed if not is_missing(label)]


def _refuse_cells(task: TaskSpec, source: str, odd: Mapping[str, Sequence[str]]) -> None:
    lines = []
    for label, slides in odd.items():
        if task.kind == "continuous":
            mend = "is no number; correct it, or leave it empty"
        else:
            mend = (
                f"is no class of task '{task.name}'; {nearest(label, task.classes)} Correct it, or add it to 'classes'"
            )
            mend += " or 'rename' of the task file"
        lines.append(f"{quote(label)} {mend} ({_some_slides(slides)})")
    more = f"; and {len(lines) - _SHOWN_CELLS} more values" if len(lines) > _SHOWN_CELLS else ""
    raise UsageError(f"{source} column '{task.column}': {'; '.join(lines[:_SHOWN_CELLS])}{more}")


def _some_slides(slides: Sequence[str]) -> str:
    noun = "slide" if len(slides) == 1 else f"{len(slides)} slides:"
    return f"{noun} {_some(slides)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN_SLIDES} more" if len(names) > _SHOWN_SLIDES else ""
    return ", ".join(names[:_SHOWN_SLIDES]) + more


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
