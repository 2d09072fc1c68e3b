"""How many bytes of tensors are alive, and how many were at most: of real tensors and of fake ones, which have sizes and no data."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Within it every operation's results are counted, storage by storage, from their birth to their release.

    Views share a storage, which counts once; what autograd keeps is alive until autograd lets it go. What no tensor holds
    is not seen: the workspaces of kernels, the slack of allocators, a process's code.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at once since the start or the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def watch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that were there before, such as a network's weights."""
        for tensor in tensors:
            self._add(tensor)

    def restart(self) -> None:
        """Lets the peak begin at what is alive now."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in tree_iter(result):
            if isinstance(part, torch.Tensor):
                self._add(part)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def released(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        # torch keeps a storage's Python object as long as the storage, so this is called when the memory goes back.
        self._alive[key] = weakref.ref(storage, released)
        self.now += size
        self.peak = max(self.peak, self.now)
