"""Tensors that claim to be on a GPU and compute on the CPU: code that mixes devices fails, and the rest gives its values.

Unlike a FakeTensor, such a tensor has values, so that code whose shapes depend on values runs to its end. As on a GPU, an
operation takes tensors of one device and scalars; copies may be between devices, and the indices of a tensor on the GPU may be on
the CPU. Sparse products are computed densely.
"""

from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnGpu(torch.Tensor):
    """own: the tensor on the CPU that computes."""

    @staticmethod
    def __new__(cls, own):
        return torch.Tensor._make_wrapper_subclass(cls, own.shape, dtype=own.dtype, device="cuda:0", strides=own.stride(),
                                                   storage_offset=own.storage_offset())

    def __init__(self, own):
        self.own = own

    def __repr__(self):
        return f"OnGpu({self.own})"

    def tolist(self):
        return self.own.tolist()

    def new_tensor(self, values):
        return OnGpu(self.own.new_tensor(values))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _compute(function, args, kwargs):
    on_gpu = any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs)))
    checked = tree_leaves((args[:1] + args[2:], kwargs) if function in INDEXED else (args, kwargs))
    if on_gpu and function not in COPIES:
        if any(isinstance(leaf, torch.Tensor) and leaf.ndim and not isinstance(leaf, OnGpu) for leaf in checked):
            raise RuntimeError(f"{function} of tensors on the CPU and on the GPU")
    device = kwargs.get("device")
    if device is not None:
        on_gpu, kwargs = torch.device(device).type == "cuda", kwargs | {"device": "cpu"}
    own_args, own_kwargs = tree_map(lambda leaf: leaf.own if isinstance(leaf, OnGpu) else leaf, (args, kwargs))
    found = function(*own_args, **own_kwargs)
    if function._schema.name.endswith("_"):  # in place
        return args[0]
    return tree_map(lambda leaf: OnGpu(leaf) if on_gpu and isinstance(leaf, torch.Tensor) else leaf, found)


class PretendedGpu(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self._mode_key, self.shape_env = torch._C._TorchDispatchModeKey.FAKE, None  # PyTorch then looks for no driver

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def pretend(monkeypatch):
    """Return the context in which `cuda` is a pretended GPU with tensor cores."""
    def tensor(values, device="cpu", **options):
        return make(values, **options).to(device)

    make = torch.tensor
    torch._C._ensureCUDADeviceGuardSet()
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _=None: (1 << 36, 1 << 36))
    monkeypatch.setattr(torch, "sparse_csr_tensor", lambda ptr, col, *_, **__: (ptr, col))
    monkeypatch.setattr(torch.sparse, "sampled_addmm", _sampled_product)
    return PretendedGpu()


def _sampled_product(wanted, one, other, beta):
    row = torch.repeat_interleave(wanted[0].diff())
    values = (one @ other)[row, wanted[1]]
    return SimpleNamespace(values=lambda: values)
