"""Files of one client's tensors: readable by safetensors itself, checked to the last byte, written whole or not at all."""

from __future__ import annotations

import gc
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from fellrec.distributed.memory import anonymous_bytes
from fellrec.errors import CheckpointError, StorageError
from fellrec.functional.mixing import Mixture
from fellrec.functional.stacks import as_lazy
from fellrec.state.bank import AdapterBank
from fellrec.state.tensor_store import (
    SafetensorsWriter,
    StoredTensors,
    TensorStore,
    check_file,
    map_tensors,
    open_store,
    write_tensors,
)

TENSORS = {
    "b.half": torch.randn(3, 2).half(),
    "a.flags": torch.tensor([True, False, True]),
    "c.matrix": torch.randn(4, 5),
    "d.step": torch.tensor(7.0),
    "e.brain": torch.randn(5).bfloat16(),
    "f.rows": torch.arange(6),
    "g.none": torch.empty(0, 3),
    "h.turned": torch.randn(3, 4).T,
}


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checksum = write_tensors(path, TENSORS, {"made_from": "a \"quoted\" 'name' ü"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    mapped = map_tensors(path)
    assert mapped.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor), name
    mapped["c.matrix"].zero_()
    assert torch.equal(map_tensors(path)["c.matrix"], TENSORS["c.matrix"]), (
        "what is written to it stays in this process"
    )
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"made_from": "a \"quoted\" 'name' ü", "checksum": checksum}
    assert check_file(path)["checksum"] == checksum
    assert [item.name for item in tmp_path.iterdir()] == ["x.safetensors"]


def test_copies_in_memory_have_the_layout_of_those_in_files(tmp_path: Path) -> None:
    """The bits of a matrix product depend on the layout, so a resumed run would differ from one that is not."""
    kinds = {"h.turned": (torch.float32, torch.Size((3, 4)))}
    rows = as_lazy({"h.turned": TENSORS["h.turned"].T[None].transpose(1, 2).contiguous().transpose(1, 2)})
    for put in (lambda store: store.put(0, TENSORS), lambda store: store.put_rows([0], rows, kinds)[0]):
        kept, read = (put(TensorStore(folder)).tensors()["h.turned"] for folder in (None, tmp_path))
        assert torch.equal(kept, read)
        assert kept.stride() == read.stride()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_changed_byte_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    write_tensors(path, {"a": torch.arange(5.0)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"x\.safetensors is damaged"):
        check_file(path)


@pytest.mark.parametrize("length", [0, 7, 30, -1])
def test_a_file_that_was_cut_off_is_seen(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="is damaged"):
        check_file(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        check_file(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        StoredTensors(path=path).tensors()


def test_reading_a_file_again_and_again_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {f"layer.{number}": torch.ones(4) for number in range(50)})
    gc.collect()  # what other tests have left open and nobody holds may be closed at any time
    for _ in range(20):
        map_tensors(path)
    before, open_files = anonymous_bytes(), len(os.listdir("/proc/self/fd"))
    kept = [map_tensors(path) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) <= open_files, "a cohort may have more files than a process can have open"
    del kept
    for _ in range(8000):  # so many that a huge page more or less, 2 MB, does not matter
        map_tensors(path)
    assert anonymous_bytes() - before < 8000 * 50 * 16, "a quarter of what safetensors' reader keeps"


def test_a_large_tensor_is_written_without_a_copy(tmp_path: Path) -> None:
    tensor = torch.ones(16 << 20)  # 64 MB; what torch allocates is not traced
    tracemalloc.start()
    try:
        write_tensors(tmp_path / "x.safetensors", {"a": tensor[:100], "b": tensor, "c": tensor[:100]})
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["b"], tensor)


@pytest.mark.parametrize("buffer_bytes", [0, 1, 9, 40, 1 << 20])
def test_what_is_written_does_not_depend_on_the_buffer(tmp_path: Path, buffer_bytes: int) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"about": "it"})
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}
    path = tmp_path / "y.safetensors"
    with SafetensorsWriter(path, kinds, {"about": "it"}, buffer_bytes) as writer:
        for name in writer.names:
            writer.append(TENSORS[name])
        writer.finish()
    assert path.read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def stack(num_clients: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_clients)
    return {
        "a": torch.randn(num_clients, 3, 7, generator=generator),
        "b": torch.randn(num_clients, 5, generator=generator).bfloat16(),
    }


def test_a_cohort_written_in_blocks_is_one_written_client_by_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fellrec.functional.stacks.BLOCK_BYTES", 3 * 8 * 4)  # four columns of three clients
    adapters = stack(3)
    kinds = {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in adapters.items()}
    tensor_store = open_store(tmp_path / "together")
    versions = tensor_store.put_rows((4, 0, 2), as_lazy(adapters), kinds)
    for row, version in enumerate(versions):
        alone = tmp_path / f"{row}.safetensors"
        write_tensors(alone, {name: tensor[row] for name, tensor in adapters.items()})
        assert version.path is not None
        assert version.path.read_bytes() == alone.read_bytes()
        assert check_file(version.path)["checksum"] == version.checksum
    assert sorted(p.name.split(".")[0] for p in (tmp_path / "together").iterdir()) == ["000000", "000002", "000004"]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_bank_gives_what_it_was_given_and_a_stack_stays_what_it_was(tmp_path: Path, on_disk: bool) -> None:
    bank = AdapterBank.replicate({name: tensor[0] for name, tensor in stack(1).items()}, 4)
    if on_disk:
        bank.tensor_store = open_store(tmp_path)
    before = bank.stack((0, 3))
    adapters = stack(2)
    bank.replace((0, 3), adapters)
    for name, tensor in adapters.items():
        assert torch.equal(bank.stack((0, 3))[name], tensor)
        assert torch.equal(before[name], stack(1)[name].expand(2, *tensor.shape[1:])), "as it was when it was asked for"
    matrix = torch.softmax(torch.randn(2, 2).double(), dim=1)
    bank.replace((0, 3), Mixture(matrix, bank.stack((0, 3))))
    for name, tensor in adapters.items():
        expected = torch.einsum("rs,s...->r...", matrix, tensor.double()).to(tensor.dtype)
        torch.testing.assert_close(bank.tensors[name][[0, 3]], expected)
    assert len(list(tmp_path.iterdir())) == (4 if on_disk else 0)


def test_what_is_put_in_memory_is_a_copy() -> None:
    tensor = torch.zeros(2)
    version = TensorStore().put(0, {"w": tensor})
    tensor.fill_(1)
    assert version.tensors()["w"].tolist() == [0.0, 0.0]


def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """A file where the folder should be: what every user gets, root included."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=rf"cannot write {tmp_path}/file/clients: Not a directory.* MB are free"):
        open_store(tmp_path / "file" / "clients")
    assert os.listdir(tmp_path) == ["file"]
