"""Load a frozen backbone and its tokenizer, and find its blocks; the only file that knows transformers' internals."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sparse_ft.backbone.model_folder import MINILM_SHA256, find_folder, hash_weights, read_architecture
from sparse_ft.errors import BackboneError, unknown_name
from sparse_ft.paths import user_path

# Files that hold a vocabulary; transformers builds an empty one where there is none.
_VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
_RARE = "ꙮ 𓂀 𒐫"
"""Letters that few vocabularies have."""
_SHORTEST = 8
"""Fewest tokens that a backbone must read."""


@dataclass(frozen=True)
class Family:
    """The path to the blocks of an architecture, and its limits."""

    blocks: str
    """Attribute path of the block stack inside the model."""
    causal: bool = False
    """Whether a token sees only the tokens to its left."""
    routes_rows: bool = True
    """Whether every expert layer gets one row per text; DeBERTa also projects its relative positions, once a batch."""
    caches_trunk: bool = True
    """Whether a pass can start from the states that enter a block; large DeBERTas convolve after the first block."""


# Keys are the `config.model_type` of transformers.
FAMILIES: dict[str, Family] = {
    "bert": Family("encoder.layer"),
    "roberta": Family("encoder.layer"),
    "electra": Family("encoder.layer"),
    "deberta-v2": Family("encoder.layer", routes_rows=False, caches_trunk=False),
    "distilbert": Family("transformer.layer"),
    "modernbert": Family("layers"),
    "gpt2": Family("h", causal=True),
    "gpt_neox": Family("layers", causal=True),
    "llama": Family("layers", causal=True),
    "qwen2": Family("layers", causal=True),
}


@dataclass
class Backbone:
    """A frozen pretrained transformer and its tokenizer."""

    name: str
    """``minilm``, a hub id or the absolute path of a folder."""
    revision: str | None
    """Commit, tag or branch on the hub."""
    folder: Path
    """Folder of its files on this machine."""
    weights_sha256: str
    model: nn.Module
    tokenizer: Any
    family: Family
    linears: dict[str, nn.Module]
    """Full module name to ``nn.Linear`` or ``Conv1D``, for every linear in the blocks, in the order of the model."""
    blocks: nn.ModuleList
    pad_id: int
    """Token id of the padding, which is always masked."""

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.blocks)

    @property
    def config(self) -> Any:
        """The transformers config of the model."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.config.hidden_size)

    @property
    def max_length(self) -> int:
        """Most tokens of a row, special tokens included."""
        positions = int(self.config.max_position_embeddings)
        # RoBERTa counts positions from padding_idx + 1.
        offset = self.pad_id + 1 if self.config.model_type == "roberta" else 0
        return min(positions - offset, int(self.tokenizer.model_max_length))

    @property
    def drops_case(self) -> bool:
        """Whether the tokenizer turns capitals into small letters, as uncased models do."""
        capital, small = (self.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in ("A", "a"))
        return bool(capital == small)

    def select_linears(self, *, first_block: int, targets: list[str] | None = None) -> list[str]:
        """List the names of the linears in the blocks from ``first_block`` up.

        Args:
            first_block: 0-based index of the lowest block, at most ``num_blocks - 1``.
            targets: Last parts of the names to select, e.g. ``["query", "value"]``; None selects all.

        Returns:
            Full module names, in the order of the model.

        Raises:
            BackboneError: If the block does not exist or a target matches nothing.
        """
        if not 0 <= first_block < self.num_blocks:
            raise BackboneError(
                f"experts.first_block is {first_block}, but {self.name!r} has {self.num_blocks} blocks. "
                f"Choose 0 to {self.num_blocks - 1}."
            )
        endings = sorted({name.rpartition(".")[2] for name in self.linears})
        for target in targets or []:
            if target not in endings:
                raise BackboneError(unknown_name("experts.targets entry", target, endings))
        return [
            name
            for name in self.linears
            if self.block_of(name) >= first_block and (not targets or name.rpartition(".")[2] in targets)
        ]

    def block_of(self, name: str) -> int:
        """Return the 0-based index of the block that contains a linear."""
        return int(name.removeprefix(f"{self.family.blocks}.").partition(".")[0])


def fresh_tokenizer(tokenizer: Any) -> Any:
    """Copy a tokenizer without the truncation and padding of its last call, which would be saved with it."""
    copied = copy.deepcopy(tokenizer)
    copied.backend_tokenizer.no_truncation()
    copied.backend_tokenizer.no_padding()
    return copied


def _is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a linear map: ``nn.Linear``, or GPT-2's ``Conv1D`` whose weight is [in, out]."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def load_backbone(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    expected_sha256: str | None = None,
    tokenizer_folder: Path | None = None,
) -> Backbone:
    """Load a backbone, frozen and in evaluation mode.

    Args:
        name: ``minilm``, a folder that ``save_pretrained`` wrote, or a hub id.
        revision: Commit, tag or branch on the hub.
        dtype: Data type of the frozen weights.
        expected_sha256: Hash of the weights that a checkpoint was trained on.
        tokenizer_folder: Folder of another tokenizer than the backbone's.

    Raises:
        BackboneError: If it cannot be found or read, its architecture is not supported, weights are missing from the
            file, or the hash differs.
    """
    folder = find_folder(name, revision)
    family = _family(read_architecture(folder), name)
    sha256 = hash_weights(folder, name)
    _check_hash(sha256, folder, name, expected=expected_sha256)
    model = _load_model(folder, name, dtype)
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    prefix = f"{family.blocks}."
    num_ids = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    tokenizer = _load_tokenizer(tokenizer_folder or folder, name, num_ids=num_ids)
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    pad_id = next((token_id for token_id in candidates if token_id is not None and token_id < num_ids), 0)
    is_path = name != "minilm" and user_path(name).is_dir()
    backbone = Backbone(
        name=str(user_path(name).resolve()) if is_path else name,
        revision=revision,
        folder=folder,
        weights_sha256=sha256,
        model=model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        family=family,
        linears={prefix + name: module for name, module in blocks.named_modules() if _is_linear(module)},
        blocks=blocks,
        pad_id=pad_id,
    )
    _check_lengths(backbone)
    return backbone


def _family(config: dict[str, Any], name: str) -> Family:
    model_type = str(config.get("model_type"))
    if model_type == "albert":
        reason = "is an ALBERT, whose blocks share one set of weights, so an expert cannot belong to a block"
    elif model_type not in FAMILIES:
        reason = f"has the architecture {model_type!r}, whose blocks this version cannot find"
    else:
        return FAMILIES[model_type]
    raise BackboneError(f"Backbone {name!r} {reason}. Supported: {', '.join(FAMILIES)}.")


def _check_lengths(backbone: Backbone) -> None:
    """Refuse a backbone whose config or tokenizer leaves no room for a text."""
    try:
        length = backbone.max_length
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise BackboneError(f"Backbone {backbone.name!r} does not say how many tokens it reads: {error}.") from error
    if length < _SHORTEST:
        raise BackboneError(
            f"Backbone {backbone.name!r} reads {length} tokens of a text, expected at least {_SHORTEST}. Correct "
            "max_position_embeddings in config.json, or model_max_length in tokenizer_config.json."
        )


def _check_hash(sha256: str, folder: Path, name: str, *, expected: str | None) -> None:
    published = MINILM_SHA256 if name == "minilm" else None
    for wanted, whose in ((published, "the published one"), (expected, "that of the checkpoint's backbone")):
        if wanted is not None and sha256 != wanted:
            raise BackboneError(
                f"The weights of backbone {name!r} in {str(folder)!r} have sha256 {sha256}, which is not {whose}: "
                f"{wanted}. Install or name the same weights that the experts were trained on."
            )


def _load_model(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = AutoModel.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # a truncated file, a wrong shape … each raises another type
        raise BackboneError(
            f"Backbone {name!r} in {str(folder)!r} cannot be read: {' '.join(str(error).split())}"
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_bars:  # a switch of the user's
            transformers_logging.enable_progress_bar()
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise BackboneError(
            f"The weights of backbone {name!r} lack {len(missing)} tensors, e.g. {missing[0]!r}; they would be random. "
            "The file is incomplete or belongs to another architecture than config.json says."
        )
    vars(model.config).pop("auto_map", None)  # names code, and would be saved with an export
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # its output is unused, and many files lack its weights
    return model


def _load_tokenizer(folder: Path, name: str, *, num_ids: int) -> Any:
    """Load a tokenizer without running code of the folder; its ids must be rows of the ``num_ids`` embeddings."""
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in _VOCABULARIES):
        raise BackboneError(
            f"The tokenizer of backbone {name!r} is not in {str(folder)!r}. Expected {' or '.join(_VOCABULARIES)}. "
            "Save the tokenizer there, too, with save_pretrained."
        )
    try:
        # add_prefix_space: byte-level vocabularies refuse lists of words without it; others ignore it.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, add_prefix_space=True
        )
    except Exception as error:  # each tokenizer class raises other types
        reason = " ".join(str(error).split())
        raise BackboneError(
            f"The tokenizer of backbone {name!r} in {str(folder)!r} cannot be read: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise BackboneError(
            f"The tokenizer of backbone {name!r} has no fast version, which is required. Save its tokenizer.json."
        )
    tokenizer.init_kwargs.pop("auto_map", None)  # names code, and would be saved with the tokenizer
    _put_space_before_words(tokenizer)
    _check_vocabulary(tokenizer, name, num_ids=num_ids)
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # we cut or window
    return tokenizer


def _check_vocabulary(tokenizer: Any, name: str, *, num_ids: int) -> None:
    """Refuse a tokenizer that fails on some texts: it lacks an id for unknown pieces, or has ids without embedding."""
    try:
        tokenizer.backend_tokenizer.encode(_RARE)
    except Exception as error:  # the tokenizers library raises a bare Exception
        raise BackboneError(
            f"The tokenizer of backbone {name!r} cannot encode characters that its vocabulary lacks: {error}. Save it "
            "with its token for unknown pieces, e.g. [UNK]."
        ) from error
    padding = {tokenizer.pad_token}  # is masked, so another id takes its place
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    highest = max((number for token, number in vocabulary.items() if token not in padding), default=-1)
    if highest >= num_ids:
        raise BackboneError(
            f"The tokenizer of backbone {name!r} gives ids up to {highest}, but the model has {num_ids} embeddings. "
            "It belongs to another model."
        )


def _put_space_before_words(tokenizer: Any) -> None:
    """Encode the words of a list with a space before each, as in a text; the generic class ignores add_prefix_space."""
    step = tokenizer.backend_tokenizer.pre_tokenizer
    for part in step if type(step).__name__ == "Sequence" else [step]:
        if getattr(part, "add_prefix_space", None) is False:
            part.add_prefix_space = True


def set_training_attention(backbone: Backbone, device: torch.device) -> None:
    """Select the attention that trains fastest: in bf16 on a CPU, a step with sdpa is up to 1.7 times slower."""
    if device.type == "cpu" and next(backbone.model.parameters()).dtype == torch.bfloat16:
        set_attention(backbone, "eager")


def set_attention(backbone: Backbone, implementation: Literal["eager", "sdpa"]) -> None:
    """Select how attention is computed: with batched matrix products, or with torch's fused function."""
    if backbone.config._attn_implementation != implementation:
        backbone.model.set_attn_implementation(implementation)  # type: ignore[operator]
