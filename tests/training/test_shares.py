"""Every rank restores exactly its own elements, for any sizes and number of ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.training.checkpoints import covering_rows, equal_share, read_share
from pipeline.training.zero import padded
from tests.support import launch_ranks

WORKER = Path(__file__).with_name("resize_worker.py")
SHAPES = st.lists(st.integers(1, 13), max_size=3).map(tuple)


@given(num_elements=st.integers(1, 5000), world_size=st.integers(1, 48))
def test_equal_shares_tile_a_parameter_and_the_padding_follows_it(
    num_elements: int, world_size: int
) -> None:
    values = torch.arange(1, num_elements + 1)
    share = math.ceil(num_elements / world_size)  # as DeepSpeed cuts partitions
    own = [equal_share(num_elements, rank=rank, share=share) for rank in range(world_size)]
    together = torch.cat([padded(values[e.start : e.stop], share) for e in own])
    assert together.shape == (share * world_size,)
    assert torch.equal(together[:num_elements], values)
    assert not together[num_elements:].any()


@given(shape=SHAPES, data=st.data())
def test_a_share_read_from_a_file_is_that_slice_of_the_flat_tensor(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    size = math.prod(shape)
    first = data.draw(st.integers(0, size))
    elements = range(first, data.draw(st.integers(first, size)))
    values = torch.arange(size, dtype=torch.float32).reshape(shape)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"x": values}, path)
        with safe_open(path, framework="pt") as file:
            found = read_share(file.get_slice("x"), elements)
    assert torch.equal(found, values.reshape(-1)[elements.start : elements.stop])


@given(shape=SHAPES.filter(bool), data=st.data())
def test_no_row_is_read_that_holds_nothing_of_the_share(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, math.prod(shape) - 1))
    elements = range(first, data.draw(st.integers(first + 1, math.prod(shape))))
    width = math.prod(shape[1:])
    assert set(covering_rows(shape, elements)) == {place // width for place in elements}


def test_a_run_moves_over_2_3_5_6_and_1_ranks_and_all_stages_bit_equal(tmp_path: Path) -> None:
    """Files have the bytes of DeepSpeed's whole tensors, which only their writers receive."""
    output = launch_ranks(1, WORKER, str(tmp_path))
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == 4 * 5
    for line in lines:
        assert line["wrong"] == [[]] * line["ranks"], line
        assert line["steps"] == line["step"] == [3, 5, 6, 1].index(line["ranks"]) + 1
