"""What teachers say, and what a student makes of it."""

import pytest
import torch
from toys import ODD_TEXTS

from sparse_ft.checkpoint.checkpoint import load_checkpoint
from sparse_ft.errors import ConfigError
from sparse_ft.experts.model import SparseExpertModel
from sparse_ft.tasks.kinds import find_kind
from sparse_ft.training.teachers import Teacher, distillation_loss, find_teachers


def test_the_soft_loss_is_the_divergence_of_the_answers():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    kind = find_kind("classification")
    assert distillation_loss(kind, teacher, teacher, temperature=2.0) == pytest.approx(0, abs=1e-9)
    distributions = [torch.distributions.Categorical(logits=logits / 2) for logits in (teacher, student)]
    expected = 4 * torch.distributions.kl_divergence(*distributions).mean()
    assert distillation_loss(kind, student, teacher, temperature=2.0) == pytest.approx(float(expected))
    choices = distillation_loss(
        find_kind("multiple_choice"), student[0].unsqueeze(1), teacher[0].unsqueeze(1), temperature=2.0
    )
    one = [torch.distributions.Categorical(logits=logits[0] / 2) for logits in (teacher, student)]
    assert choices == pytest.approx(4 * float(torch.distributions.kl_divergence(*one)))


def test_the_soft_loss_of_labels_that_exclude_none_is_a_divergence_each():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    kind = find_kind("multi_label")
    assert distillation_loss(kind, teacher, teacher, temperature=2.0) == pytest.approx(0, abs=1e-9)
    distributions = [torch.distributions.Bernoulli(logits=logits / 2) for logits in (teacher, student)]
    expected = 4 * torch.distributions.kl_divergence(*distributions).mean()
    assert distillation_loss(kind, student, teacher, temperature=2.0) == pytest.approx(float(expected))


def test_a_teacher_says_what_its_checkpoint_answers(toys):
    checkpoint = load_checkpoint(toys)
    for name in ("mood", "about", "names"):
        said = Teacher(checkpoint, checkpoint.encoder, checkpoint.tasks[name]).logits({"text": ODD_TEXTS})
        import sparse_ft

        expected = sparse_ft.load(toys, device="cpu").logits(ODD_TEXTS, name)
        assert len(said) == len(ODD_TEXTS)
        for one, other in zip(said, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_task_has_one_teacher(toys):
    assert set(find_teachers([toys])) == {"mood", "reply", "about", "names"}
    assert list(find_teachers([toys], ["about"])) == ["about"]
    with pytest.raises(ConfigError, match="'mood' is in two of the checkpoints"):
        find_teachers([toys, toys], ["mood"])


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_read_by_words_a_text_has_the_tokens_and_shapes_of_its_words(make_model, family):
    backbone = make_model(family, {}).backbone
    encoder = SparseExpertModel(backbone, by_words=True).text_encoder(16)
    texts = [*ODD_TEXTS, "Ada Lovelace met Charles Babbage in London in spring and then at the analytical engine again"]
    kind, language = find_kind("token_classification"), "en"
    windows = kind.encode({"text": texts}, encoder=encoder, labels=["PER"], language=language)
    first = {window.row: window for window in reversed(windows)}
    for row, example in enumerate(encoder.texts(texts, language=language)):
        assert example.row == row
        assert example.input_ids == first[row].input_ids
        assert example.word_shapes == first[row].word_shapes
        assert not example.word_positions
