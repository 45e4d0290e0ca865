"""What runs of several processes share among themselves. Whole runs of several: contracts/test_new_processes.py."""

import torch
from toys import write_toy

from sparse_ft.backbone.devices import find_device
from sparse_ft.backbone.encoding import Encoder
from sparse_ft.tasks.encoded_rows import encode_rows
from sparse_ft.tasks.spec import load_task
from sparse_ft.training import processes


def test_one_process_needs_no_group():
    assert not processes.is_distributed()
    assert (processes.world_size(), processes.rank()) == (1, 0)
    assert processes.gather("own") == ["own"]
    assert processes.gather_rows(3, lambda rows: [row + 1 for row in rows]) == [1, 2, 3]
    assert processes.rank_device(find_device("cpu")) == torch.device("cpu")


def test_rows_taken_for_one_process_keep_their_windows(tmp_path, make_model):
    spec = load_task(write_toy(tmp_path, "names", labels=["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))
    model = make_model("bert", {"names": ("word", 5)})
    columns = {
        "tokens": [["Ada"], ["met"] * 60, [], ["London", "and", "Lisbon"]],
        "tags": [["B-PER"], ["O"] * 60, [], ["B-LOC", "O", "B-LOC"]],
        "row": [0, 1, 2, 3],
    }
    data = encode_rows(columns, spec=spec, encoder=Encoder(model.backbone, max_length=16))
    taken = data.take([1, 3])
    assert taken.num_rows == 2
    assert taken.num_parts == [60, 3]
    assert taken.columns["tokens"] == [columns["tokens"][1], columns["tokens"][3]]
    assert {example.row for example in taken.examples} == {0, 1}
    windows = [example.input_ids for example in data.examples if example.row in (1, 3)]
    assert len(windows) > 2
    assert [example.input_ids for example in taken.examples] == windows
