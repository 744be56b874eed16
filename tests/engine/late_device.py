"""A device that runs behind the host, on the CPU. Not a test module.

Its tensors hold what has been computed, but the host sees none of it: reading one fails, as does
every other call that would wait. A copy to the host holds poison until an event behind it has been
waited for; the host's memory that a copy to the device reads must not change until then either.
What is launched and what is waited for stands in `log`, in that order.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import engine.decode_inputs
import engine.sampler
import engine.token_operators
import engine.token_tables
import engine.transfers
from engine.batch import Batch
from kernels.choice import Chosen, TokenTables, choose_tokens_reference
from tests.engine.fakes import FakeStaticLoraBatch, HistoryModel

DEVICE = torch.device("meta")  # PyTorch's own name for what is not there: nothing can leak from it
POISON = -(2**31) + 11
ATEN = torch.ops.aten
WAITING = {ATEN._local_scalar_dense.default, ATEN.equal.default, ATEN.nonzero.default}


class LateTensor(torch.Tensor):
    """A tensor of the device; `held` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        del types
        return run_on_device(func, args, kwargs or {})


def run_on_device(func, args, kwargs):
    """An operation on tensors of the device, in the order of launching."""
    assert func not in WAITING, f"{func} waits for the device"
    originals = {}

    def unwrap(tensor: LateTensor) -> torch.Tensor:
        originals[id(tensor.held)] = tensor
        return tensor.held

    args, kwargs = tree_map_only(LateTensor, unwrap, (args, kwargs))
    out = func(*args, **kwargs)

    def wrap(tensor: torch.Tensor) -> LateTensor:
        return originals[id(tensor)] if id(tensor) in originals else LateTensor(tensor)

    return tree_map_only(torch.Tensor, wrap, out)


def has_late(values: object) -> bool:
    found = []
    tree_map_only(LateTensor, found.append, values)
    return bool(found)


class Event:
    """So far has the device come once this has been waited for."""

    def __init__(self, device: LateDevice, place: int) -> None:
        self._device = device
        self._place = place

    def synchronize(self) -> None:
        self._device.run_until(self._place)


class LateDevice(TorchDispatchMode):
    """All that is computed while it is entered; one queue."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.is_starting = True
        """Nothing has been launched yet: there is nothing to wait for."""
        self._num_recorded = self._num_done = 0
        self._arriving: list[tuple[torch.Tensor, torch.Tensor, int]] = []
        self._leaving: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def patch(self, monkeypatch, *, at_once: bool = False) -> None:
        """Put its events in place of CUDA's; have it choose tokens in one operation, as GPUs do."""
        for module in (engine.transfers, engine.decode_inputs):
            monkeypatch.setattr(module, "record_event", self._record)

        def apply_bitmask(logits, rows, bitmask):
            """As on a GPU: what the mask holds now."""
            kernel(logits.held, rows, bitmask.clone())

        kernel = engine.token_operators.apply_bitmask
        monkeypatch.setattr(engine.token_operators, "apply_bitmask", apply_bitmask)
        monkeypatch.setattr(engine.sampler, "is_fused", lambda _: at_once)
        monkeypatch.setattr(engine.token_tables, "choose_tokens", _choose_tokens)

    def _record(self, device: torch.device) -> Event | None:
        if device.type == "cpu":
            return None
        self._num_recorded += 1
        return Event(self, self._num_recorded)

    def run_until(self, place: int) -> None:
        if place <= self._num_done:
            return
        self.log.append("wait")
        self._num_done = place
        for host, values, behind in self._arriving:
            if behind < place:
                host.copy_(values)
        for host, values, behind in self._leaving:
            if behind < place:
                assert host.equal(values), "the host has overwritten what was still to be copied"
        self._arriving = [entry for entry in self._arriving if entry[2] >= place]
        self._leaving = [entry for entry in self._leaving if entry[2] >= place]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func in (ATEN.pin_memory.default, ATEN._pin_memory.default):
            return args[0].clone()
        with self:  # into what PyTorch makes of it: inference mode hands operations over whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func is ATEN.copy_.default and has_late(args):
            return self._copy(args[0], args[1], is_async=(*args, False)[2])
        if func is ATEN._to_copy.default and has_late(args):
            assert kwargs.get("device", DEVICE) == DEVICE, "reading a tensor waits for the device"
        is_late = has_late((args, kwargs))
        if kwargs.get("device") == DEVICE:
            is_late = True
            kwargs["device"] = torch.device("cpu")
            if func is ATEN._to_copy.default:
                may_wait = self.is_starting or not args[0].numel()
                assert may_wait or kwargs.get("non_blocking"), "a copy from ordinary memory waits"
                self._leaving.append((args[0], args[0].clone(), self._num_recorded))
        if is_late:
            return run_on_device(func, args, kwargs)
        return func(*args, **kwargs)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, *, is_async: bool) -> torch.Tensor:
        if isinstance(target, LateTensor) and isinstance(source, LateTensor):
            target.held.copy_(source.held)
            return target
        assert is_async, "the copy waits for the device"
        if isinstance(target, LateTensor):
            self._leaving.append((source, source.clone(), self._num_recorded))
            target.held.copy_(source)
        else:
            assert isinstance(source, LateTensor)
            self._arriving.append((target, source.held.clone(), self._num_recorded))
            target.fill_(POISON)
        return target


def _choose_tokens(logits: LateTensor, tables: TokenTables) -> Chosen:
    """What the reference chooses, as one operation of the device."""
    fields = {field.name: getattr(tables, field.name) for field in dataclasses.fields(tables)}
    held = {name: x.held for name, x in fields.items() if isinstance(x, LateTensor)}
    chosen = choose_tokens_reference(logits.held, dataclasses.replace(tables, **held))
    names = [field.name for field in dataclasses.fields(chosen)]
    return Chosen(**{name: LateTensor(getattr(chosen, name)) for name in names})


class LateModel:
    """HistoryModel on the device."""

    def __init__(self, device: LateDevice) -> None:
        self.inner = HistoryModel()
        self._device = device

    def __call__(self, batch: Batch, kv_caches, lora) -> torch.Tensor:
        self._device.log.append("layers")
        names = [field.name for field in dataclasses.fields(batch)]
        tensors = {name: getattr(batch, name) for name in names}
        real = {name: x.held for name, x in tensors.items() if isinstance(x, LateTensor)}
        if isinstance(lora, FakeStaticLoraBatch):
            lora = FakeStaticLoraBatch(lora.pool, lora.lora_indices.held, lora.lora_scales.held)
        return LateTensor(self.inner(dataclasses.replace(batch, **real), kv_caches, lora))

    def logits(self, hidden: LateTensor, lora: object) -> torch.Tensor:
        self._device.log.append("logits")
        return LateTensor(self.inner.logits(hidden.held, lora))
