"""A committee: trained networks that answer together, by the mean of their probabilities.

Ciresan, Meier, Gambardella and Schmidhuber (2011, https://arxiv.org/abs/1103.4487) average what their networks put out.
Here the outputs are the logits of a cross-entropy, whose scale differs between networks. So their softmax is averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from meprop.errors import DataError
from meprop.tasks.images import ImageTask
from meprop.training import checkpoint, tasks, tracking
from meprop.training.settings import checked, hints
from meprop.training.tasks import TaskEntry


@dataclass(frozen=True)
class Errors:
    """Shares of the images that are told wrong, in percent."""

    members: list[float]
    """Of each member alone."""
    mean: float
    """Of the members."""
    committee: float
    """Of all members together."""
    ratio: float | None
    """The committee's error / the mean. None where no member errs."""


def errors(probabilities_MNC: Tensor, labels_N: Tensor) -> Errors:
    """Return the errors of M members, and that of their mean.

    Args:
        probabilities_MNC: What each member gives each class of each image. Of equal ones the lower class is the answer.
        labels_N: The class of each image.
    """

    def error(probabilities_NC: Tensor) -> float:
        return 100 * (probabilities_NC.argmax(1) != labels_N).sum().item() / len(labels_N)

    members = [error(each) for each in probabilities_MNC]
    mean, committee = fmean(members), error(probabilities_MNC.mean(0))
    return Errors(members, mean, committee, committee / mean if mean else None)


@dataclass(frozen=True)
class Member:
    """What a trained network says of the test images, which it reads in its own way."""

    folder: Path
    """Of its run."""
    settings: dict[str, Any]
    """Of its run, by option name, with its seed and the digest of its data."""
    probabilities: Tensor
    """Of the classes, ``[N, C]``, float64."""
    labels: Tensor
    """Of the images, ``[N]``."""
    data: str
    """A digest of the test images and labels, as their files have them."""


def read_member(folder: Path, data_dir: Path | None = None) -> Member:
    """Build the network that a run of `meprop train` has left, and let it look at the test images, on the CPU.

    Args:
        folder: Of the run.
        data_dir: Folder of the data. None: the one that the run was given.

    Raises:
        DataError: A file of the run is damaged, or the data are not there.
        ValueError: The folder has no finished run of such a task, or the data are not those of the run.
    """
    path, record = folder / tracking.CHECKPOINT, folder / tracking.RESULT
    for each in (path, record):
        if not each.exists():
            raise ValueError(f"{folder} has no {each.name}: give folders of meprop train, whose runs are finished")
    result = tracking.read_result(record, tracking.Result)
    entry = _entry(folder, result.task)
    if not result.runs:
        raise ValueError(f"{folder} has a run that is not finished: go on with it by meprop train --resume")
    content = checkpoint.read(path)
    settings, allowed = content["settings"], hints(entry.config, but=("data_dir",))
    of_task = checked({name: settings[name] for name in allowed if name in settings}, allowed, f"{path}: ")
    given = result.config["task"]["data_dir"]
    try:
        task = entry.build(entry.config(data_dir=data_dir or (given and Path(given)), **of_task))
    except DataError as error:
        raise DataError(f"the data of {folder}: {error} Or give their folder with --data-dir.") from error
    assert isinstance(task, ImageTask)  # see `_entry`
    if task.fingerprint != settings["data"]:
        raise ValueError(f"{folder} is a run on other data than those that are read now: give theirs with --data-dir")
    model = task.build_model()
    try:
        model.load_state_dict(content["state"]["model"])
    except (LookupError, RuntimeError, TypeError) as error:
        raise DataError(f"{path} does not fit this version of meprop ({error})") from error
    with torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16-mixed"):
        outputs, labels = zip(*task.outputs(model, "test"), strict=True)
    return Member(folder, settings, torch.cat(outputs).double().softmax(1), torch.cat(labels), task.data.test_digest)


def _entry(folder: Path, name: str) -> TaskEntry:
    """Return the task of a run, if it is one that tells images apart."""
    entries = {
        name: entry
        for name, entry in tasks.table().items()
        if isinstance(entry.build, type) and issubclass(entry.build, ImageTask)
    }
    if name not in entries:
        raise ValueError(f"{folder} is a run of the task {name}: a committee has runs of {' and '.join(entries)}")
    return entries[name]


def errors_of(members: Sequence[Member]) -> Errors:
    """Return the errors of members, and of all together, on the test images.

    Raises:
        ValueError: There are fewer than two, or their test images differ.
    """
    if len(members) < 2:
        raise ValueError(f"a committee has two members or more, got {len(members)}")
    first = members[0]
    for each in members[1:]:
        if each.data != first.data or each.probabilities.shape != first.probabilities.shape:
            raise ValueError(f"{each.folder} is a run on other data than {first.folder}: give runs on the same data")
    return errors(torch.stack([each.probabilities for each in members]), first.labels)
