"""The error type keeps its one line across processes."""

import pytest
from torch.utils.data import DataLoader, Dataset

from microcinema.utils.errors import UserError, first_line


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
