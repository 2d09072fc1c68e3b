"""Bytes of live tensors and their peak, for real tensors and for fake ones, which have sizes and no data."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Within it the results of every operation are counted, storage by storage, from allocation to release.

    What autograd saves is live until it is released. Memory that no tensor holds, such as workspaces of kernels, is not counted.

    Attributes:
        now: live bytes.
        peak: most live bytes at once since the start or the last `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors allocated before, such as a network's weights."""
        for tensor in tensors:
            self._add(tensor)

    def reset_peak(self) -> int:
        """The peak so far; the next one starts at what is alive now."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in tree_iter(result):
            if isinstance(output, torch.Tensor):
                self._add(output)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return

        def released(_: Any) -> None:
            self.now -= size
            del self._live[key]

        # torch keeps a storage's Python object as long as the storage, so this is called when the memory is freed.
        self._live[key] = weakref.ref(storage, released)
        self.now += size
        self.peak = max(self.peak, self.now)
