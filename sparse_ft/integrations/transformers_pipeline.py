"""A checkpoint behind ``transformers.pipeline``; importing this module registers it under the name ``sparse-ft``.

``pipeline("sparse-ft", model="runs/all")`` reads the ``config.json`` of the checkpoint, which only says what it is;
``pipeline("sparse-ft", model=sparse_ft.load("runs/all"))`` needs none.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.pipelines import PIPELINE_REGISTRY

from sparse_ft.checkpoint.checkpoint import MODEL_TYPE
from sparse_ft.prediction.loaded_model import CHUNK, LoadedModel, load
from sparse_ft.prediction.requests import RequestLike

TASK = "sparse-ft"


class CheckpointConfig(PreTrainedConfig):
    """What ``config.json`` of a checkpoint tells transformers."""

    model_type = MODEL_TYPE


class CheckpointModel:
    """What ``transformers.pipeline`` calls to load a model from a path."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> LoadedModel:
        """Load a checkpoint; of transformers' options, ``model_kwargs={"backbone": …}`` says where the backbone is."""
        return load(path, backbone=options.get("backbone"))


class SparseFTPipeline:
    """Answers tasks for texts; every answer is a line of ``predict --json`` as a dict.

    It stands beside transformers' ``Pipeline``, not below it: that one pads and batches what a tokenizer gave, and our
    model does so itself, by length.

    Args:
        model: A loaded model; ``transformers.pipeline`` passes what it read from a path.
        task: The name it is registered under.
        device: A number of a CUDA device, -1 for the CPU, or a name; None leaves a loaded model where it is, and puts
            one that is read from a path on the first accelerator.
        dtype: Not heeded: the model computes as the checkpoint says.
        tasks: As for ``LoadedModel.predict``; may be given with a call, too.
        batch_size: Texts that are read before they are answered; may be given with a call, too.
    """

    # transformers.pipeline asks what it shall load besides the model.
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
        """Where the model is."""
        return next(self.model.checkpoint.model.parameters()).device

    def __call__(
        self,
        inputs: RequestLike | Iterable[RequestLike],
        *,
        tasks: Sequence[str] | str | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Answer one text, a list, or whatever yields texts.

        Args:
            inputs: A text, a pair as a tuple, or an object with tasks of its own; a list, a generator or a
                data set of such.
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
        iterator = iter(texts)
        while chunk := list(itertools.islice(iterator, size)):
            yield from (answer.to_dict() for answer in self.model.predict(chunk, tasks))


AutoConfig.register(MODEL_TYPE, CheckpointConfig, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(TASK, SparseFTPipeline, pt_model=(CheckpointModel,))
