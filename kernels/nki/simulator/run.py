"""Running kernels: ``simulate``, ``cost``, ``as_nki``, launch grids, arrays in and out."""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from . import dtypes, hardware
from . import machine as _machine
from .cost_model import CostReport, Recorder
from .errors import NkiSimulationError, fail
from .language_rules import check_language
from .memory import Memory, Storage
from .tensor import NkiTensor


class Kernel:
    """A function decorated with ``nki.jit``; ``kernel[2]`` launches it on a grid of two programs."""

    def __init__(self, function: Callable[..., Any], grid: Any = None) -> None:
        functools.update_wrapper(self, function)
        self.function, self.grid = function, grid

    def __getitem__(self, grid: Any) -> Kernel:
        return Kernel(self.function, grid)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _machine.running():
            expected, name = "functions called by a kernel to have no decorator", self.function.__name__
            _machine.current().caution("nki.jit", name, expected, "a kernel")
            return self.function(*args, **kwargs)
        return simulate(self)(*args, **kwargs)


def simulate(
    kernel: Any, grid: Any = None, target: str | None = None, language: str = "0.6"
) -> Callable[..., Any]:
    """Make `kernel` callable on NumPy arrays or torch tensors, on the CPU.

    Arrays become HBM tensors and are updated in place where the kernel writes them; other arguments pass
    through. Results, which the kernel allocates in shared HBM, come back as the kind of array that came in.
    ``grid``: None or 1 for one program, 2 or ``(2,)`` for the two NeuronCores of a logical one, which share
    HBM. ``target``: trn1, trn2 or trn3; None is that of ``NEURON_PLATFORM_TARGET_OVERRIDE``, or trn2 (see
    ``hardware.Target`` for what differs). ``language``: the version of NKI, "0.6" or "0.7", whose Python the
    kernel may use (see :func:`check_language`).

    A kernel written against the Neuron SDK's own ``nki``, where that is installed, runs in the SDK's
    simulator instead.

    Raises NkiSimulationError where the kernel breaks a rule, NotImplementedError for what is not covered,
    ValueError for a grid, target or language that does not exist. Warns with NkiSimulationWarning of what is
    doubtful on the hardware, once for each line.
    """
    real, sizes = _real_nki(kernel), _sizes(grid)

    def call(*args: Any, **kwargs: Any) -> Any:
        if real is None:
            return _launch(kernel, grid, target, language, None, args, kwargs)
        with _target_in_environment(target):
            return real.simulate(kernel if sizes is None else kernel[sizes[0]])(*args, **kwargs)

    return call


def cost(kernel: Any, grid: Any = None, target: str | None = None) -> Callable[..., CostReport]:
    """Make `kernel` callable like :func:`simulate`; the call returns a :class:`CostReport`, a MODEL.

    Raises NotImplementedError for another target than trn2.
    """
    if _real_nki(kernel) is not None:
        raise NkiSimulationError("cost() runs on this simulator: import the kernel under as_nki()")

    def call(*args: Any, **kwargs: Any) -> CostReport:
        if hardware.target(target) is not hardware.TARGETS["trn2"]:
            raise NotImplementedError("the cost model covers Trainium2 only")
        recorders: list[Recorder] = []
        _launch(kernel, grid, target, "0.6", recorders, args, kwargs)
        return CostReport(recorders)

    return call


@dataclass(frozen=True)
class Zeros:
    """An argument of :func:`scheduled_us`: an array of zeros of this shape and dtype, ``"bfloat16"`` say."""

    shape: tuple[int, ...]
    dtype: str


def scheduled_us(kernel: Any, grid: Any, *args: Any, careful: bool = False, **named: Any) -> float:
    """Microseconds that `kernel` should take, without the launch: :func:`cost`, once for the same call.

    args, named: the kernel's, with :class:`Zeros` for its arrays, and hashable.
    careful: the slower reading of VectorE's 16-bit modes (``CostReport``).
    """
    return _scheduled(kernel, grid, args, tuple(sorted(named.items())))[careful]


@functools.cache
def _scheduled(kernel: Any, grid: Any, args: Any, named: Any) -> tuple[float, float]:
    def array(value: Any) -> Any:
        return np.zeros(value.shape, dtypes.NUMPY[value.dtype]) if isinstance(value, Zeros) else value

    report = cost(kernel, grid)(*map(array, args), **{name: array(value) for name, value in named})
    return report.scheduled_us, report.careful_us


@contextmanager
def as_nki() -> Iterator[Any]:
    """Give the simulator for ``import nki``, ``nki.isa``, ``nki.language``; put back what was there after.

    Import or define a kernel written for the Neuron SDK inside; it keeps the simulator's functions.
    """
    ours = importlib.import_module(__package__ + ".nki")
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "nki"}
    sys.modules["nki"] = ours
    sys.modules.update({f"nki.{name}": getattr(ours, name) for name in ("isa", "language", "typing")})
    sys.modules["nki.isa.constants"] = ours.isa.constants
    try:
        yield ours
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "nki"]:
            del sys.modules[name]
        sys.modules.update(before)


def _real_nki(kernel: Any) -> Any:
    """The Neuron SDK's ``nki`` if `kernel` was made by its ``jit`` or is a function that refers to it."""
    if isinstance(kernel, Kernel):
        return None
    used = [v.__name__ for v in getattr(kernel, "__globals__", {}).values() if isinstance(v, ModuleType)]
    if "nki" not in {name.split(".")[0] for name in (type(kernel).__module__, *used)}:
        return None
    return importlib.import_module("nki")


@contextmanager
def _target_in_environment(target: str | None) -> Iterator[None]:
    """Where the Neuron SDK's simulator looks for its target."""
    before = os.environ.get(hardware.TARGET_VARIABLE)
    if target is not None:
        os.environ[hardware.TARGET_VARIABLE] = target
    try:
        yield
    finally:
        if before is not None:
            os.environ[hardware.TARGET_VARIABLE] = before
        else:
            os.environ.pop(hardware.TARGET_VARIABLE, None)


def _sizes(grid: Any) -> tuple[int, ...] | None:
    if grid is None:
        return None
    return tuple(int(n) for n in grid) if isinstance(grid, (tuple, list)) else (int(grid),)


def _launch(
    kernel: Any,
    grid: Any,
    target: str | None,
    language: str,
    recorders: list[Recorder] | None,
    args: Any,
    kwargs: Any,
) -> Any:
    function = kernel.function if isinstance(kernel, Kernel) else kernel
    if grid is None and isinstance(kernel, Kernel):
        grid = kernel.grid
    sizes = _sizes(grid) or ()
    programs = math.prod(sizes)
    if len(sizes) > 1 or programs not in (1, 2):
        raise ValueError(
            f"grid: expected None, 1, 2, (1,) or (2,), the NeuronCores of a logical one (LNC), got {grid!r}"
        )
    check_language(kernel, language)
    inputs = _Inputs(programs)
    args = [inputs.wrap(a) for a in args]
    kwargs = {k: inputs.wrap(v) for k, v in kwargs.items()}
    shared = Shared(programs)
    machines = []
    for program in range(programs):
        recorder = None
        if recorders is not None:
            recorders.append(recorder := Recorder())
        machines.append(_machine.Machine(program, sizes, shared, recorder, hardware.target(target)))
    try:
        results = _run(function, args, kwargs, machines, shared)
    finally:
        _machine.warn(machines)
    for m in machines:
        if m.cost is not None:
            m.cost.peaks = {"SBUF": m.sbuf.peak, "PSUM": m.psum.peak}
    with _machine.on(machines[0]):
        shared.finish(inputs.storages)
        outputs = inputs.unwrap(results[0])
    inputs.copy_back()
    return outputs


def _run(function: Any, args: Any, kwargs: Any, machines: list[Any], shared: Shared) -> list[Any]:
    if len(machines) == 1:
        with _machine.on(machines[0]):
            return [function(*args, **kwargs)]
    results: list[Any] = [None] * len(machines)
    errors: list[BaseException] = []

    def body(m: Any) -> None:
        try:
            shared.turn(m.program)
            with _machine.on(m):
                results[m.program] = function(*args, **kwargs)
        except Aborted:
            pass
        except BaseException as error:
            errors.append(error)
            shared.abort()
        finally:
            shared.done(m.program)

    threads = [threading.Thread(target=body, args=(m,), name=f"nki program {m.program}") for m in machines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    shared.check_met()
    return results


class Aborted(Exception):
    """Another program of the grid failed; this one stops too."""


class Shared:
    """What the programs of a launch share: HBM allocations, and the turn to run.

    Programs are threads, but one runs at a time, until it meets a barrier or ends: every run of a kernel
    is the same, and a race shows as one program touching bytes that another touched since the last barrier.
    """

    def __init__(self, programs: int) -> None:
        self._condition = threading.Condition()
        self._turn = 0
        self._state: list[Any] = ["ready"] * programs
        self._aborted = False
        self._stuck: list[int] = []
        self._brought: list[Any] = [None] * programs  # to the next meeting, and to the last one
        self._met: list[Any] = []
        self._allocations: list[tuple[tuple, Storage]] = []

    def allocation(self, key: tuple, make: Callable[[], Storage]) -> Storage:
        """Shared HBM: the n-th allocation of every program is one and the same."""
        here = _machine.current()
        index = here.shared_allocations
        here.shared_allocations += 1
        if index == len(self._allocations):
            self._allocations.append((key, make()))
        expected, storage = self._allocations[index]
        if expected != key:
            fail("nki.language.ndarray", f"shared_hbm allocation {index}", f"{expected} as program 0", key)
        return storage

    def turn(self, program: int) -> None:
        """Wait until `program` may run."""
        with self._condition:
            self._condition.wait_for(lambda: self._aborted or self._turn == program)
            if self._aborted:
                raise Aborted

    def meet(
        self, program: int, place: Any, what: Any = None, release: Callable[[], None] | None = None
    ) -> list[Any]:
        """Wait until every program is at `place`, then `release`; what each of them brought."""
        with self._condition:
            self._brought[program] = what
            self._state[program] = place
            if all(state == place for state in self._state):
                if release is not None:
                    release()
                self._state = ["ready"] * len(self._state)
                self._met = list(self._brought)
            self._pass_on()
        self.turn(program)
        return self._met

    def done(self, program: int) -> None:
        """`program` has ended."""
        with self._condition:
            self._state[program] = "done"
            self._pass_on()

    def abort(self) -> None:
        """Stop all programs."""
        with self._condition:
            self._aborted = True
            self._condition.notify_all()

    def check_met(self) -> None:
        """Error if a program waited at a barrier that another never reached."""
        if self._stuck:
            raise NkiSimulationError(
                "nki.isa.core_barrier, sendrecv: expected every program at the same barrier, "
                f"got only programs {self._stuck}"
            )

    def finish(self, inputs: Sequence[Storage]) -> None:
        """All programs have ended: nothing races with the host."""
        for storage in (*inputs, *(storage for _, storage in self._allocations)):
            storage.memory.barrier()

    def _pass_on(self) -> None:
        ready = [p for p, state in enumerate(self._state) if state == "ready"]
        if ready:
            self._turn = ready[0]
        elif not all(state == "done" for state in self._state):
            self._stuck = [p for p, state in enumerate(self._state) if state != "done"]
            self._aborted = True
        self._condition.notify_all()


class _Inputs:
    """Arrays on their way into HBM tensors and back."""

    def __init__(self, programs: int) -> None:
        self._programs = programs
        self._torch: Any = None
        self._copies: list[tuple[np.ndarray, np.ndarray]] = []
        self.storages: list[Storage] = []

    def wrap(self, value: Any) -> Any:
        """An HBM tensor for an array; anything else as it is."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            self._torch = torch
            value = _from_torch(torch, value)
        if isinstance(value, tuple):
            return tuple(self.wrap(v) for v in value)
        if isinstance(value, list):
            fail("launch", "arguments", "tuples: lists are no kernel arguments", value)
        if not isinstance(value, np.ndarray):
            return value
        name = dtypes.name_of(value.dtype)
        dense = value
        if not (value.flags.c_contiguous and value.flags.writeable):
            dense = np.array(value, order="C")
            if value.flags.writeable:
                self._copies.append((value, dense))
        flat = dense.reshape(-1).view(np.uint8)
        buffer = "shared_hbm" if self._programs > 1 else "private_hbm"
        storage = Storage(buffer, 1, flat.nbytes, Memory(flat, written=True, programs=self._programs))
        self.storages.append(storage)
        return NkiTensor(value.shape, name, storage, buffer)

    def unwrap(self, value: Any) -> Any:
        """Arrays for the HBM tensors a kernel returned."""
        if isinstance(value, (tuple, list)):
            return type(value)(self.unwrap(v) for v in value)
        if not isinstance(value, NkiTensor):
            return value
        if value.buffer != "shared_hbm" and value.storage not in self.storages:
            fail("return", "result", "a tensor in HBM that the caller sees: buffer=nl.shared_hbm", value)
        array = np.array(value.read("return", "result"))
        return array if self._torch is None else _to_torch(self._torch, array)

    def copy_back(self) -> None:
        """Inputs that had to be copied get what the kernel wrote."""
        for original, dense in self._copies:
            original[...] = dense


def _from_torch(torch: Any, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    name = str(tensor.dtype).removeprefix("torch.")
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raw = tensor.view(torch.int16 if name == "bfloat16" else torch.uint8).numpy()
        return raw.view(dtypes.NUMPY[name])
    return tensor.numpy()


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    name = dtypes.name_of(array.dtype)
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raw = torch.from_numpy(array.view(np.int16 if name == "bfloat16" else np.uint8))
        return raw.view(getattr(torch, name))
    if name == "float8_e4m3":  # torch has no dtype of that range: its bytes
        return torch.from_numpy(array.view(np.uint8))
    return torch.from_numpy(array)
