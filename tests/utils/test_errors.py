"""The error type keeps its one line across processes."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from microcinema.utils.errors import MachineError, UserError, first_line, user_errors


class Bad(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise UserError("clip 'a.mp4' is empty; remove it from the list")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loader_process_stays_one_line(workers):
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Bad(), num_workers=workers)))
    assert str(caught.value) == "clip 'a.mp4' is empty; remove it from the list"


def test_the_first_line_of_an_error_is_its_message_or_its_class():
    assert first_line(ValueError("\nno such key\nTraceback ...")) == "no such key"
    assert first_line(MemoryError()) == "MemoryError"


def test_errors_of_libraries_become_one_line():
    with pytest.raises(UserError, match=r"^'a' cannot be read \(no weights\); get it again$") as caught:
        with user_errors("'a' cannot be read ({reason}); get it again"):
            raise RuntimeError("no weights\nin a")
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(UserError, match=r"KeyError\('fps'\)"), user_errors("{reason}"):
        raise KeyError("fps")
    for error in (MachineError("the disk"), MemoryError(), torch.OutOfMemoryError()):
        with pytest.raises(type(error)), user_errors("'a' cannot be read ({reason})"):
            raise error
    with pytest.raises(OSError, match="^a fault of the disk$"), user_errors("{reason}", ValueError, TypeError):
        raise OSError("a fault of the disk")
    with pytest.raises(UserError, match="^out of memory$"), user_errors("{reason}", RuntimeError):
        raise torch.OutOfMemoryError("out of memory")
