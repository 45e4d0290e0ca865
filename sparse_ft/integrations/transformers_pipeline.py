"""A checkpoint behind ``transformers.pipeline``; importing this module registers it under the name ``sparse-ft``.

``pipeline("sparse-ft", model="runs/all")`` reads the ``config.json`` of the checkpoint, which holds a model type.
``pipeline("sparse-ft", model=sparse_ft.load("runs/all"))`` needs no ``config.json``.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

from sparse_ft.checkpoint.checkpoint import MODEL_TYPE
from sparse_ft.prediction.loaded_model import CHUNK, LoadedModel, load
from sparse_ft.prediction.requests import RequestLike, rows_of

TASK = "sparse-ft"


class CheckpointConfig(PreTrainedConfig):
    """The ``config.json`` of a checkpoint, for transformers."""

    model_type = MODEL_TYPE


class CheckpointModel:
    """The class that ``transformers.pipeline`` calls to load a model from a path."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> LoadedModel:
        """Load a checkpoint; ``model_kwargs={"backbone": …}`` says where the backbone is, other options are ignored."""
        return load(path, backbone=options.get("backbone"))


class SparseFTPipeline:
    """Answers tasks for texts; every answer is a line of ``predict --json`` as a dict.

    It does not inherit from transformers' ``Pipeline``, which pads and batches itself; the model batches by length.

    Args:
        model: A loaded model; ``transformers.pipeline`` loads it from a path.
        task: Name under which the pipeline is registered.
        device: Index of a CUDA device, -1 for the CPU, or a name. None leaves a loaded model where it is, and puts a
            model from a path on the first accelerator.
        dtype: Ignored: the checkpoint decides the precision.
        tasks: As for ``LoadedModel.predict``; a call may override them.
        batch_size: Texts that are read before they are answered; a call may override it.
    """

    # transformers.pipeline reads here what to load besides the model.
    _load_tokenizer = False
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __init__(
        self,
        model: LoadedModel,
        *,
        task: str = TASK,
        device: int | str | torch.device | None = None,
        dtype: Any = None,
        tasks: Sequence[str] | str | None = None,
        batch_size: int = CHUNK,
    ) -> None:
        self.model, self.task, self.tasks, self.batch_size = model, task, tasks, batch_size
        if device is not None:
            model.to(("cpu" if device < 0 else f"cuda:{device}") if isinstance(device, int) else str(device))

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.checkpoint.model.parameters()).device

    def __call__(
        self,
        inputs: RequestLike | Iterable[RequestLike],
        *,
        tasks: Sequence[str] | str | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Answer one text, a list, or an iterable of texts.

        Args:
            inputs: A text, a pair as a tuple, or a request as a dict; or a list, a generator or a data set of these.
            tasks: As for ``LoadedModel.predict``.
            batch_size: Texts that are read before they are answered.

        Returns:
            One answer, a list, or a generator that reads no more than ``batch_size`` texts ahead.
        """
        wanted = self.tasks if tasks is None else tasks
        if isinstance(inputs, str | tuple | Mapping):
            return self.model.predict([inputs], wanted)[0].to_dict()
        answers = self._answers(inputs, wanted, size=batch_size or self.batch_size)
        return list(answers) if isinstance(inputs, list) else answers

    def _answers(
        self, texts: Iterable[RequestLike], tasks: Sequence[str] | str | None, *, size: int
    ) -> Iterator[dict[str, Any]]:
        iterator = iter(rows_of(texts))
        while chunk := list(itertools.islice(iterator, size)):
            yield from (answer.to_dict() for answer in self.model.predict(chunk, tasks))


AutoConfig.register(MODEL_TYPE, CheckpointConfig, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, SparseFTPipeline, pt_model=(CheckpointModel,))
