"""One vector a row out of the hidden states of its tokens."""

import pytest
import torch

from sparse_ft.backbone.pooling import pool


def ragged(dtype=torch.float32):
    """Hidden states of rows of 5, 1 and 3 real tokens, with rubbish where the padding is."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 8, generator=generator).to(dtype)
    lengths = [5, 1, 3]
    mask = torch.tensor([[1] * length + [0] * (5 - length) for length in lengths])
    return hidden, mask, lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["unit", "mean", "first", "last"])
def test_pool_reads_the_real_tokens_of_each_row(how, dtype):
    hidden, mask, lengths = ragged(dtype)
    got = pool(hidden, mask, how)
    rows = [row[:length].float() for row, length in zip(hidden, lengths, strict=True)]
    vectors = {"unit": lambda row: row.mean(0), "mean": lambda row: row.mean(0), "first": lambda row: row[0]}
    expected = torch.stack([vectors.get(how, lambda row: row[-1])(row) for row in rows])
    if how == "unit":  # as sentence-transformers' Normalize, times the root of the width
        expected = torch.nn.functional.normalize(expected, dim=-1) * hidden.shape[-1] ** 0.5
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    rubbish = torch.where(mask[..., None].bool(), hidden, torch.full_like(hidden, 1e4))
    torch.testing.assert_close(pool(rubbish, mask, how), got)


@pytest.mark.parametrize("how", ["unit", "last"])
def test_pooling_can_be_traced_for_any_number_of_rows(how):
    class Pooled(torch.nn.Module):
        def forward(self, hidden, mask):
            return pool(hidden, mask, how)

    rows, tokens = torch.export.Dim("rows", min=1), torch.export.Dim("tokens", min=1)
    shapes = {"hidden": {0: rows, 1: tokens}, "mask": {0: rows, 1: tokens}}
    example = (torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.long))
    traced = torch.export.export(Pooled(), example, dynamic_shapes=shapes).module()
    hidden, mask = torch.randn(2, 7, 4), torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    assert torch.equal(traced(hidden, mask), pool(hidden, mask, how))
