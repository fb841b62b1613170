"""lm-eval's own task definitions, unmodified, over data that lies anywhere: local folders by absolute path, or the hub.

`plan_task` says what would be run and identifies the data without loading it; `load_task` makes lm-eval's objects.
Only two kinds of key are changed in a definition: where the data set is, and splits that it does not have.
"""

from __future__ import annotations

import difflib
import random
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.error import URLError

import lm_eval
import numpy as np
from datasets.exceptions import DatasetsError
from huggingface_hub import constants as hub_constants
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml

from evals.benchmarks import OFFICIAL_DOCUMENTS, check_mmlu
from evals.data import data_hash, locate
from evals.data_checksum import checksum_of, together
from megagpt.errors import EvalError

OWN_TASKS = Path(__file__).parent / "tasks"
LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"
HUB_TIMEOUT_SECONDS = 5.0
FEWSHOT_SEED = 1234
"""Seed of the few-shot examples' draw. Source: lm-eval 0.4.13, defaults.py, as are the two below."""
RANDOM_SEED, NUMPY_SEED = 0, 1234

_SPLIT_KEYS = ("training_split", "validation_split")


class TaskUnavailableError(EvalError):
    """A task's data or its sandbox cannot be reached: its row in the results says so, the other tasks go on."""


class RunsCodeError(TaskUnavailableError):
    """A task runs code that the model wrote, which is done for humaneval alone and by `megagpt eval run` alone."""


@dataclass(frozen=True)
class DataOrigin:
    """Where a task's rows come from."""

    origin: Literal["local", "hub", "package"]
    path_or_id: str
    sha256: str | None
    """Of the rows' files; None for the hub."""
    absent_splits: tuple[str, ...] = ()
    """Splits of the definition that the data does not have."""
    checksum: str = ""
    """From `evals.data_checksum`: whether the files are the copy that was checked."""


@dataclass(frozen=True)
class TaskPlan:
    """A task or group, resolved but not loaded."""

    name: str
    definitions: Mapping[str, dict[str, Any]]
    """Each leaf task -> the keys of its definition that are replaced."""
    index: Mapping[str, Entry]
    data: DataOrigin


@dataclass(frozen=True)
class LoadedTask:
    """What `lm_eval.evaluator.evaluate` takes."""

    name: str
    tasks: dict[str, Task]
    groups: dict[str, Group]
    data: DataOrigin


def plan_task(name: str, data_dir: Path | None, cache_dir: Path) -> TaskPlan:
    """Find a task's definition and its data.

    Args:
        name: a task, group or tag of lm-eval, or one of ours.
        data_dir: local benchmark data; where a data set is not below it, the hub is meant.
        cache_dir: public files and Arrow tables are prepared below it.

    Raises:
        EvalError: there is no task of that name.
        RunsCodeError: it runs generated code.
        TaskUnavailableError: its local data is refused.
    """
    index = _find_index(name)
    definitions = {leaf: load_yaml(index[leaf].yaml_path, resolve_func=False) for leaf in _leaves(index, name)}
    unsafe = sorted(leaf for leaf, definition in definitions.items() if definition.get("unsafe_code"))
    if unsafe:
        raise RunsCodeError(
            f"{', '.join(unsafe)} runs code that the model wrote; megagpt does that for humaneval alone, and only in "
            "`megagpt eval run --tasks humaneval --allow-code`"
        )
    own = index[name].yaml_path
    if own is not None and own.parent == OWN_TASKS:
        return _plan_own(name, index, definitions, cache_dir)
    hub_ids = sorted({str(definition.get("dataset_path")) for definition in definitions.values()})
    folders = {} if data_dir is None else _locate_all(hub_ids, data_dir, cache_dir)
    if folders and len(folders) < len(hub_ids):
        lacking = ", ".join(sorted(set(hub_ids) - set(folders)))
        raise TaskUnavailableError(f"{data_dir} has only a part of {name}'s data: {lacking} is not below it")
    return (
        plan_from_folders(name, folders, cache_dir, index) if folders else _plan_hub(name, index, hub_ids, definitions)
    )


def plan_from_folders(
    name: str, folders: Mapping[str, Path], cache_dir: Path, index: Mapping[str, Entry] | None = None
) -> TaskPlan:
    """Plan a task over hub-shaped folders that the caller names: hub id -> folder. Counts are the caller's affair."""
    index = index or _find_index(name)
    replaced: dict[str, dict[str, Any]] = {}
    absent: set[str] = set()
    configs: set[str] = set()
    for leaf in _leaves(index, name):
        definition = load_yaml(index[leaf].yaml_path, resolve_func=False)
        folder = folders[definition["dataset_path"]]
        config = str(definition.get("dataset_name") or "default")
        configs.add(config)
        missing = _absent_splits(leaf, definition, folder / config)
        absent |= set(missing.values())
        replaced[leaf] = {
            "dataset_path": str(folder.resolve()),
            "dataset_kwargs": {**(definition.get("dataset_kwargs") or {}), "cache_dir": str(cache_dir / "arrow")},
            **dict.fromkeys(missing),
        }
    digest = " ".join(data_hash(folder, configs) for folder in folders.values())
    where = ", ".join(str(folder) for folder in folders.values())
    checksum = together({checksum_of(folder, hub_id, configs) for hub_id, folder in folders.items()})
    origin = DataOrigin("local", where, digest, tuple(sorted(absent)), checksum)
    return TaskPlan(name, replaced, index, origin)


def load_task(plan: TaskPlan, n_shots: int | None = None, *, check_counts: bool = True) -> LoadedTask:
    """Load the rows and build lm-eval's objects.

    Args:
        plan: from `plan_task`.
        n_shots: few-shot examples; None for the definition's own. As in lm-eval, a definition that sets 0 keeps 0.
        check_counts: whether known benchmarks must have their official number of documents.

    Raises:
        TaskUnavailableError: the data cannot be reached or loaded, or is only a part of the benchmark.
    """
    if plan.data.origin == "hub" and (reason := hub_problem()) is not None:
        raise TaskUnavailableError(
            f"{plan.data.path_or_id}: not in the local data, and the hub cannot be reached ({reason}); "
            "name a folder that has it with --data, or set HF_HUB_OFFLINE=1 to use what the hub's cache holds"
        )
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    tasks, groups = _build(plan)
    for task in tasks.values():
        if n_shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=n_shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    loaded = LoadedTask(plan.name, tasks, groups, plan.data)
    if check_counts and plan.data.origin != "package":
        _check_counts(loaded)
    return loaded


def data_sets(names: tuple[str, ...]) -> dict[str, list[str | None]]:
    """The hub's data sets of tasks: id -> configs, None for the only one. Nothing is loaded.

    Raises:
        EvalError: there is no task of that name.
    """
    found: dict[str, list[str | None]] = {}
    for name in names:
        index = _find_index(name)
        if index[name].yaml_path is not None and index[name].yaml_path.parent == OWN_TASKS:
            continue
        for leaf in _leaves(index, name):
            definition = load_yaml(index[leaf].yaml_path, resolve_func=False)
            configs = found.setdefault(str(definition["dataset_path"]), [])
            if definition.get("dataset_name") not in configs:
                configs.append(definition.get("dataset_name"))
    return found


def task_definition(name: str) -> dict[str, Any]:
    """The keys of a task's YAML file; functions that it names stay names, and nothing is imported.

    Raises:
        EvalError: there is no task of that name, or it has no YAML file.
    """
    path = _find_index(name)[name].yaml_path
    if path is None:
        raise EvalError(f"task {name} has no YAML file in lm-eval {lm_eval.__version__}")
    return dict(load_yaml(path, resolve_func=False))


def hub_problem() -> str | None:
    """Why the hub cannot be reached, found out within seconds; None where it can, or where only its cache is asked."""
    if hub_constants.is_offline_mode():
        return None  # `datasets` then reads its cache or says at once that it holds nothing
    request = urllib.request.Request(hub_constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
            return None
    except (URLError, OSError) as error:
        return f"{hub_constants.ENDPOINT}: {error}"


def _find_index(name: str) -> Mapping[str, Entry]:
    """Definitions by name: ours, the folders of lm-eval that are named like the task, or (seconds) all of lm-eval's."""
    if name == "mt_bench":
        raise EvalError("mt_bench is no task of lm-eval's: a judge rates its answers, `megagpt eval mt-bench`")
    named_alike = [LM_EVAL_TASKS / name.split("_")[0], *(folder / name for folder in LM_EVAL_TASKS.iterdir())]
    folders = [OWN_TASKS, *(folder for folder in named_alike if folder.is_dir())]
    index: Mapping[str, Entry] = TaskManager(include_path=folders, include_defaults=False).task_index
    if name in index:
        return index
    index = TaskManager(include_path=[OWN_TASKS]).task_index
    if name not in index:
        near = difflib.get_close_matches(name, index, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise EvalError(f"there is no task '{name}' in lm-eval {lm_eval.__version__} or megagpt{hint}")
    return index


def _locate_all(hub_ids: list[str], data_dir: Path, cache_dir: Path) -> dict[str, Path]:
    """The data sets that are below the user's data folder."""
    try:
        found = {hub_id: locate(hub_id, data_dir, cache_dir) for hub_id in hub_ids}
    except EvalError as error:
        raise TaskUnavailableError(str(error)) from None
    return {hub_id: folder for hub_id, folder in found.items() if folder is not None}


def _leaves(index: Mapping[str, Entry], name: str) -> list[str]:
    """The tasks below a group or tag; the task itself."""
    entry = index[name]
    if entry.kind is Kind.TAG:
        return [leaf for member in sorted(entry.tags) for leaf in _leaves(index, member)]
    if entry.kind is Kind.GROUP:
        members = load_yaml(entry.yaml_path, resolve_func=False)["task"]
        if not all(isinstance(member, str) for member in members):
            raise TaskUnavailableError(
                f"group {name} defines tasks inside itself, which is not supported; name its tasks"
            )
        return [leaf for member in members for leaf in _leaves(index, member)]
    if entry.kind is Kind.PY_TASK or entry.yaml_path is None:
        raise TaskUnavailableError(f"task {name} is Python code of lm-eval and not a YAML definition; not supported")
    return [name]


def _absent_splits(leaf: str, definition: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Keys of the definition that name a split which the folder does not have -> that split."""
    if not folder.is_dir():
        return {}
    present = {path.name.split(".")[0].split("-")[0] for path in folder.iterdir()}
    needed = [definition.get("fewshot_split"), definition.get("test_split") or definition.get("validation_split")]
    lacking = sorted({str(split) for split in needed if split is not None} - present)
    if lacking:
        raise TaskUnavailableError(f"{folder}: task {leaf} needs the split {', '.join(lacking)}, which is not there")
    splits = {key: definition.get(key) for key in _SPLIT_KEYS}
    return {key: str(split) for key, split in splits.items() if split is not None and split not in present}


def _plan_own(
    name: str, index: Mapping[str, Entry], definitions: Mapping[str, dict[str, Any]], cache_dir: Path
) -> TaskPlan:
    replaced = {}
    for leaf, definition in definitions.items():
        files = {split: str(OWN_TASKS / file) for split, file in definition["dataset_kwargs"]["data_files"].items()}
        replaced[leaf] = {"dataset_kwargs": {"data_files": files, "cache_dir": str(cache_dir / "arrow")}}
    return TaskPlan(name, replaced, index, DataOrigin("package", f"evals/tasks/{name}", data_hash(OWN_TASKS, set())))


def _plan_hub(
    name: str, index: Mapping[str, Entry], hub_ids: list[str], definitions: Mapping[str, dict[str, Any]]
) -> TaskPlan:
    return TaskPlan(name, {leaf: {} for leaf in definitions}, index, DataOrigin("hub", ", ".join(hub_ids), None))


def _build(plan: TaskPlan) -> tuple[dict[str, Task], dict[str, Group]]:
    """lm-eval's factory over an index in which the leaves carry their replaced keys."""
    registry = dict(plan.index)
    try:
        for leaf, keys in plan.definitions.items():
            config = {**load_yaml(plan.index[leaf].yaml_path, resolve_func=True), **keys}
            registry[leaf] = Entry(name=leaf, kind=Kind.TASK, yaml_path=None, cfg=config)
        built = TaskFactory().build(registry[plan.name], registry=registry)
    except (OSError, DatasetsError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, ImportError) and error.name is not None:
            package = error.name.partition(".")[0]
            raise TaskUnavailableError(
                f"{plan.name}: lm-eval's definition needs the Python package {package}, which cannot be imported here "
                f"({error}); install it: pip install {package.replace('_', '-')}"
            ) from error
        # Offline and unreachable hub, missing data set, missing split.
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TaskUnavailableError(f"{plan.data.path_or_id}: {type(error).__name__}: {first_line}") from error
    if isinstance(built, Group):
        groups = {group.name: group for group in (built, *built.get_all_groups())}
        return {task.task_name: task for task in built.get_all_tasks()}, groups
    leaves = built if isinstance(built, list) else [built]
    return {task.task_name: task for task in leaves}, {}


def _check_counts(loaded: LoadedTask) -> None:
    counts = {name: len(task.eval_docs) for name, task in loaded.tasks.items()}
    if loaded.name == "mmlu":
        try:
            check_mmlu(counts, loaded.data.path_or_id)
        except EvalError as error:
            raise TaskUnavailableError(str(error)) from None
    for name, count in counts.items():
        expected = OFFICIAL_DOCUMENTS.get(name, count)
        if count != expected:
            raise TaskUnavailableError(
                f"{loaded.data.path_or_id}: {name} has {count} documents, the official one has {expected}: "
                "a part of a benchmark is not that benchmark"
            )
