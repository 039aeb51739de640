"""A model's folder, or Hub id: where it is, what it is called, what lies beside its weights, and what a copy needs."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from d2moe_vllm.families import MODELING_FILE
from d2moe_vllm.format.config import INDEX_FILE, MANIFEST_FILE, RECIPE_FILE, STATS_FILE, CheckpointError
from d2moe_vllm.format.files import WHOLE_FILE, read_weight_map
from offline.errors import InputError
from offline.io.folders import sync_folder
from offline.io.shards import sync_file

OURS = {"config.json", "README.md", MANIFEST_FILE, RECIPE_FILE, STATS_FILE, INDEX_FILE, MODELING_FILE}
"""What every checkpoint gets anew."""
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".ckpt", ".pkl", ".ot", ".npz",
    ".tflite", ".distcp",
)  # fmt: skip
ARCHIVES = (".tar", ".tgz", ".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".rar")
UNFINISHED = (".part", ".partial", ".incomplete", ".tmp", ".lock", ".crdownload", ".aria2", ".swp", "~")
OTHERS = ("adapter_config.json", "hf_quant_config.json", "quant_config.json", "quantize_config.json")
"""Read by transformers or vLLM, and untrue beside weights of ours."""
UNASKED = "custom_generate"
"""A folder whose code transformers runs without being told."""
LARGEST = 100_000_000
"""Bytes of a file that belongs to a model and is no weight; tokenizers have up to 35 MB."""
LFS = b"version https://git-lfs"
REPOSITORY = re.compile(r"[\w.\-]+/[\w.\-]+")


@dataclass(frozen=True)
class Located:
    """Where SRC is. name: of its repository if it comes from one, else of the folder; revision: a commit, if known."""

    folder: Path
    name: str
    revision: str | None


def is_repository(name: str) -> bool:
    """Whether a model's name is a Hub id; a folder's name has no slash."""
    return bool(REPOSITORY.fullmatch(name))


def locate(source: str, revision: str | None = None) -> Located:
    """The folder of SRC, and what to call it. Raises InputError where it is neither a folder nor a Hub id that can be
    had, and where a file of it is only the pointer to one."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision:
            raise InputError(f"--revision {revision} makes no sense for the local folder {source}")
        folder = folder.resolve()
        _check_pointers(folder)
        return _named(folder)
    if not is_repository(source) or folder.exists():
        raise InputError(f"{source} is neither a folder nor a Hub id (owner/name)")
    folder = _fetch(source, revision)
    return Located(folder, source, folder.name)


def _named(folder: Path) -> Located:
    """A folder's path is nobody's business in a published checkpoint; its name is what a card can say. A snapshot in
    the Hub's cache is called after its repository."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return Located(folder, repository.removeprefix("models--").replace("--", "/"), folder.name)
    return Located(folder, folder.name, None)


def _check_pointers(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        if path.is_file() and 0 < path.stat().st_size < 1024 and path.read_bytes().startswith(LFS):
            raise InputError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in {folder}")


def _fetch(source: str, revision: str | None) -> Path:
    """All that a copy needs, and of the weights the files that are read: repositories hold them in several forms."""
    from huggingface_hub import snapshot_download

    def fetch(at: str | None, wanted: list[str] | None = None, unwanted: list[str] | None = None) -> Path:
        return Path(snapshot_download(source, revision=at, allow_patterns=wanted, ignore_patterns=unwanted))

    try:
        unwanted = [f"*{end}" for end in (*WEIGHTS, *ARCHIVES, *UNFINISHED)]
        folder = fetch(revision, unwanted=[*unwanted, ".*", "*/.*", f"{UNASKED}/*"])
        commit = folder.name
        fetch(commit, [WHOLE_FILE])
        if not (folder / WHOLE_FILE).exists() and (folder / INDEX_FILE).exists():
            fetch(commit, sorted(set(read_weight_map(folder).values())))
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises a dozen types: offline, gated, unknown name, disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"no folder {source} here, and the Hub model {source} cannot be had: {reason}; "
            "check the name, the network and `hf auth login`"
        ) from None
    if not (folder / WHOLE_FILE).exists() and not (folder / INDEX_FILE).exists():
        raise InputError(f"{source}: {_instead(_listed(source, commit))}")
    return folder


def _listed(source: str, commit: str) -> list[str]:
    """Names in a repository, none where the Hub does not say."""
    from huggingface_hub import HfApi

    try:
        return HfApi().list_repo_files(source, revision=commit)
    except Exception:  # as above
        return []


def check_weights(folder: Path) -> str | None:
    """What to say of a folder whose weights are there twice. Raises InputError where they are not there in a form that
    is read, naming what is."""
    whole, index = (folder / WHOLE_FILE).exists(), (folder / INDEX_FILE).exists()
    if not whole and not index:
        raise InputError(f"{folder}: {_instead([path.name for path in folder.iterdir()])}")
    if whole and index:
        return f"{folder} has both {WHOLE_FILE} and {INDEX_FILE}: {WHOLE_FILE} is read, as transformers does"
    return None


def _instead(names: Collection[str]) -> str:
    """What there is in place of weights in safetensors, and the remedy."""

    def first(*ends: str) -> str | None:
        return next((name for name in sorted(names) if name.endswith(ends)), None)

    none = f"no weights: neither {WHOLE_FILE} nor {INDEX_FILE}"
    if "adapter_config.json" in names:
        return (
            f"{none}, but adapter_config.json: an adapter; merge it into its base model (peft: merge_and_unload) first"
        )
    if shard := next((name for name in sorted(names) if re.search(r"-of-\d+\.safetensors$", name)), None):
        return f"{none}, but {shard}: {INDEX_FILE}, which says what is in which file, is missing; copy it too"
    if other := first(".safetensors"):
        return f"{none}, but {other}, a form that transformers does not read; give the model as transformers saves it"
    if pickled := first(".bin", ".pt", ".pth"):
        return (
            f"{none}, but {pickled}, a pickle, which is code; convert it: AutoModelForCausalLM.from_pretrained(SRC, "
            "dtype='auto').save_pretrained(NEW)"
        )
    if other := first(".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".npz"):
        return f"{none}, but {other}, a form for other programs; give the original model"
    if names and "config.json" not in names:
        return f"{none}, nor config.json; SRC must be a Hugging Face model folder"
    return f"{none}, no safetensors weights here; copy or download them"


@dataclass(frozen=True)
class Companions:
    """Files that belong to a model beside its weights, by their paths in its folder.

    carried: a copy gets them; left_out: it does not, and why.
    """

    carried: tuple[str, ...]
    left_out: dict[str, str]

    def summary(self) -> str | None:
        """One line on what is left out."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        told = [f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({reason})"
                for reason, names in reasons.items()]  # fmt: skip
        return "; ".join(told) or None

    def copy(self, folder: Path, out: Path) -> None:
        """All that is carried, from `folder` into `out`, to the disk."""
        for name in self.carried:
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target)
            sync_file(target)
        for place in {(out / name).parent for name in self.carried}:
            sync_folder(place)


def find_companions(folder: Path, weights: Collection[str]) -> Companions:
    """Every file beside and below config.json, but those of OURS, `weights`, which are read, and hidden ones.

    Left out, with the reason: weights in other forms, what describes them, archives, unfinished downloads, code that
    would run unasked, and what is no file, or too large to be anything but data.
    """
    carried, left_out = [], {}
    for name, path in sorted(_walk(folder)):
        if name in OURS or name in weights:
            continue
        if reason := _unwanted(name, path):
            left_out[name] = reason
        else:
            carried.append(name)
    return Companions(tuple(carried), left_out)


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        here = Path(place)
        # Folders that are links are not gone into, as they may lead anywhere.
        links: Iterable[str] = (name for name in folders if (here / name).is_symlink())
        for name in (*files, *links):
            if not name.startswith("."):
                yield (here / name).relative_to(folder).as_posix(), here / name


def _unwanted(name: str, path: Path) -> str | None:
    """Why a copy is not to have a file."""
    lower = name.lower()
    try:
        status = path.stat()
    except OSError:
        return "a link that leads nowhere"
    if not stat.S_ISREG(status.st_mode):
        return "a link to a folder" if stat.S_ISDIR(status.st_mode) else "no file"
    if lower.endswith(UNFINISHED):
        return "unfinished"
    if lower.endswith(ARCHIVES):
        return "an archive"
    if lower.endswith((*WEIGHTS, ".index.json")):
        return "other weights"
    if PurePosixPath(name).name in OTHERS:
        return "describes other weights"
    if PurePosixPath(name).parts[0] == UNASKED:
        return "code that transformers runs unasked"
    if lower.endswith((".pyc", ".pyo")):
        return "compiled code"
    if status.st_size > LARGEST:
        return f"larger than {LARGEST // 1_000_000} MB"
    return None
