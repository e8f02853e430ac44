"""The thresholds that `python -m mps_flash_attn check --tune` measured on this machine: a file of JSON in the user's
cache folder, which replace_sdpa() reads. Its name and its contents say for which GPU, macOS, PyTorch and libmfa."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import apple
from .library import library

FEW = 8  # up to this many queries, PyTorch has another kernel on mps than for more

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_COMMAND = "python -m mps_flash_attn check --tune"


class Key(NamedTuple):
    """A kind of calls: without a mask and without gradients, query and value of the same head dimension."""

    dtype: torch.dtype
    head_dim: int
    few: bool  # up to FEW queries
    is_causal: bool


Thresholds = dict[Key, float]  # the least work, in multiply-adds of the forward pass, that libmfa runs; inf: none


def cache_folder() -> Path | None:
    """The folder in which libmfa keeps compiled kernels, by the same rule; None if the environment names none."""
    folder = os.environ.get("MFA_CACHE")
    if folder:
        return Path(folder)
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if folder.startswith("/"):
        return Path(folder, "libmfa")
    folder = os.environ.get("HOME")
    if not folder:
        return None
    return Path(folder, "Library/Caches/libmfa" if sys.platform == "darwin" else ".cache/libmfa")


def identity() -> dict[str, str]:
    """What the measured times depend on, by name."""
    return {
        "gpu": apple.gpu_name(),
        "macos": apple.macos_version(),
        "torch": torch.__version__,
        "libmfa": library().version,
    }


def path() -> Path | None:
    """The file of this machine; None if there is no folder for it, or no GPU."""
    folder, found = cache_folder(), identity()
    if folder is None or not found["gpu"]:
        return None
    words = [f"{name}-{value}" for name, value in found.items()]
    return folder / re.sub(r"[^\w.-]+", "-", f"thresholds-{'-'.join(words)}.json")


def writable_path() -> Path:
    """The file of this machine, in a folder that exists. ValueError if it could not be written."""
    file = path()
    if file is None:
        raise ValueError("there is no folder for the thresholds; set MFA_CACHE to one, or HOME")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _draft(file).touch()
        _draft(file).unlink()
    except OSError as error:
        raise ValueError(f"the thresholds cannot be written to {file.parent}: {error.strerror}") from None
    return file


def _draft(file: Path) -> Path:
    return file.with_name(f"{file.name}.{os.getpid()}")


def save(found: Mapping[Key, float], measured: list[dict[str, Any]]) -> Path:
    """Writes the thresholds, and beside them the times that they come from; returns the file. ValueError or OSError if
    it cannot be written."""
    file = writable_path()
    rows = [
        {"dtype": _NAMES[key.dtype], "head_dim": key.head_dim, "few": key.few, "causal": key.is_causal}
        | {"work": None if math.isinf(work) else work}
        for key, work in found.items()
    ]
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps({"for": identity(), "date": date, "thresholds": rows, "measured": measured}, indent=1)
    draft = _draft(file)  # so that no other process reads a part of it
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(file)
    return file


def load() -> Thresholds:
    """The thresholds of this machine; {} if none were measured. A file that is broken, or was measured elsewhere, is
    ignored with a warning."""
    file = path()
    if file is None or not os.path.lexists(file):
        return {}
    if not os.path.isfile(file):  # a FIFO would be waited for
        return _ignored(file, "it is not a file that can be read")
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        if contents["for"] != identity():
            return _ignored(file, f"it holds for {contents['for']}, and this is {identity()}")
        return dict(map(_threshold, contents["thresholds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return _ignored(file, f"it cannot be read ({type(error).__name__}: {error})")


def _threshold(row: Mapping[str, Any]) -> tuple[Key, float]:
    key = Key(_DTYPES[row["dtype"]], row["head_dim"], row["few"], row["causal"])
    work = math.inf if row["work"] is None else row["work"]
    kinds = [type(value) for value in key[1:]]
    if kinds != [int, bool, bool] or type(work) not in (int, float) or not work >= 0:
        raise ValueError(f"a threshold is {dict(row)}")
    return key, work


def _ignored(file: Path, why: str) -> Thresholds:
    warnings.warn(f"the thresholds in {file} are ignored: {why}; `{_COMMAND}` writes them anew", stacklevel=3)
    return {}
