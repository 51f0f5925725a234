"""The one door to Numba: two decorators that compile a function to machine code.

It is not a place for kernels. Every compiled loop of the package is written in `iterreduce.columns` and
decorated here, so that the compiler options, and with them the bits of every float sum, are chosen once.
Kernels release the GIL and never start threads of their own: the caller owns the threads.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import re
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir as llvm
from numba import types
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_WAIT_SECONDS = 120.0
"""For another process that compiles: longer than any kernel takes, even with many ranks on few cores."""

REASSOCIATE = {"reassoc", "contract", "nsz", "arcp"}
"""Float flags that let additions be regrouped (one binary regroups always alike), but keep NaN and infinity.
"""

yield_core = types.ExternalFunction("sched_yield", types.int32())
"""For kernels that wait: let another thread have this core. Also makes the compiler read memory again."""


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def prefetch(typing: Any, arrays: Any, i: Any) -> Any:
    """In a kernel: ask for the memory of element i (unsigned) of an array that lies in one piece, whatever
    its dimensions, or of each of some, before it is read. One beyond the end does nothing.
    """
    byte, small = llvm.IntType(8).as_pointer(), llvm.IntType(32)
    each = tuple(arrays) if isinstance(arrays, types.BaseTuple) else None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        asked = [(arrays, arguments[0])]
        if each is not None:
            asked = [(of, builder.extract_value(arguments[0], k)) for k, of in enumerate(each)]
        kind = llvm.FunctionType(llvm.VoidType(), [byte, small, small, small])
        call = builder.module.declare_intrinsic("llvm.prefetch", [byte], fnty=kind)
        for of, value in asked:
            data = context.make_array(of)(context, builder, value).data
            at = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
            builder.call(call, [at, *(llvm.Constant(small, word) for word in (0, 3, 1))])  # read; keep; data
        return context.get_dummy_value()

    return types.void(arrays, i), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def bit_length(typing: Any, word: Any) -> Any:
    """Of a word of 64 bits, unsigned; for kernels."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zeros = builder.ctlz(arguments[0], llvm.Constant(llvm.IntType(1), 0))
        return builder.sub(llvm.Constant(llvm.IntType(64), 64), zeros)

    return types.uint64(types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def load_word(typing: Any, address: Any) -> Any:
    """The int64 at an address; for `callback`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], llvm.IntType(64).as_pointer()))

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator,unused-ignore]
def store_word(typing: Any, address: Any, word: Any) -> Any:
    """Write an int64 to an address; for `callback`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], llvm.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


C_TYPES = {"": types.void, "p": types.int64, "i": types.int32}  # nothing; a pointer, size or offset; an int


def external(name: str, returns: str, takes: str) -> Any:
    """A function of the C library, for kernels and `callback`: a letter of `C_TYPES` for each argument."""
    return types.ExternalFunction(name, C_TYPES[returns](*(C_TYPES[letter] for letter in takes)))


def callback(function: Callable[..., Any], returns: str, takes: str) -> int:
    """The address of machine code for this function that C can call; it lives as long as the process.

    Cached on disk like a `kernel`. It must raise nothing, and hold no Python object.
    """
    signature = C_TYPES[returns](*(C_TYPES[letter] for letter in takes))
    with global_compiler_lock:
        depth = _turns.depth
        try:
            _turns.begin(f"{function.__module__}.{function.__qualname__}")
            made = numba.cfunc(signature, cache=True, error_model="numpy")(function)
        finally:
            _turns.end(depth)
    _callbacks.append(made)
    return int(made.address)


_callbacks: list[Any] = []


def _compile(function: Callable[P, R], **options: object) -> Callable[P, R]:
    options |= {"nogil": True, "error_model": "numpy"}
    closed = getattr(function, "__closure__", None) is not None
    if closed:
        # Numba names machine code by qualified name and a count of this process: two loops made by one
        # factory, compiled in two processes, would otherwise meet under one name in a third
        function.__qualname__ += f"_{fingerprint(function)}"
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # a function typed at a prompt has no file beside which a cache could stand
        compiled = numba.njit(**options)(function)
    else:
        if closed:
            compiled._cache._index_key = _KeyOfClosure(function)
        _compile_once_per_node(compiled)
    return cast("Callable[P, R]", compiled)


def fingerprint(function: Any) -> str:
    """16 hexadecimal digits for what a function does: its code, what it is closed over, what it calls.

    The same in every process, so that a loop made by a factory around other kernels is found in the cache
    again. Numba's own digest of a closure pickles it, and a compiled function is pickled with a name drawn by
    chance.
    """
    digest = hashlib.sha256()
    for piece in _pieces(function, set()):
        digest.update(piece.encode() + b"\0")
    return digest.hexdigest()[:16]


def _pieces(thing: Any, seen: set[int]) -> Iterator[str]:
    thing = getattr(thing, "py_func", getattr(thing, "_defn", thing))  # compiled; emitted as LLVM code
    if isinstance(thing, FunctionType):
        if id(thing) in seen:
            return
        seen.add(id(thing))
        yield from _pieces(thing.__code__, seen)
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        named = [thing.__globals__[name] for name in thing.__code__.co_names if name in thing.__globals__]
        for part in [*cells, *named, thing.__defaults__]:
            yield from _pieces(part, seen)
    elif isinstance(thing, CodeType):
        yield thing.co_code.hex()
        yield " ".join(thing.co_names)
        for part in thing.co_consts:
            yield from _pieces(part, seen)
    elif isinstance(thing, tuple | list):
        for part in thing:
            yield from _pieces(part, seen)
    elif isinstance(thing, ModuleType | type):
        yield thing.__name__
    elif isinstance(thing, bool | int | float | str | bytes | None | np.generic):
        yield f"{type(thing).__name__} {thing!r}"


class _KeyOfClosure:
    """What a compiled closure is filed under: its types, the processor, its fingerprint."""

    def __init__(self, function: Any) -> None:
        self._fingerprint = fingerprint(function)

    def __call__(self, signature: Any, codegen: Any) -> Any:
        return signature, codegen.magic_tuple(), self._fingerprint


class _Notice:
    """Says, once, that compiling has taken long: a person who sees nothing happen wants to know why.

    Time counts while this process compiles, or waits for another that compiles what it needs.
    """

    def __init__(self, seconds: float, tell: Callable[[], None]) -> None:
        self._left, self._tell = seconds, tell
        self._since, self._timer = 0.0, threading.Timer(0.0, tell)

    def begin(self) -> None:
        self._since, self._timer = time.monotonic(), threading.Timer(self._left, self._speak)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join()
        self._left = max(0.0, self._left - (time.monotonic() - self._since))

    def _speak(self) -> None:
        with contextlib.suppress(ValueError):  # it is too late
            _notices.remove(self)
            self._tell()


_notices: list[_Notice] = []


@contextlib.contextmanager
def when_compiling_takes(seconds: float, tell: Callable[[], None]) -> Iterator[None]:
    """Call `tell` from a thread of its own, at most once, when compiling has taken so long in all."""
    notice = _Notice(seconds, tell)
    _notices.append(notice)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            _notices.remove(notice)
        notice.end()


class _Turns:
    """Who may compile a kernel: one process of a user at a time, for one cache on one node.

    Each kernel is a byte of one file that is locked, so that processes that need different kernels (tests
    side by side) do not wait for each other. A kernel waits only for those that it calls, in no circle. The
    file is in the node's own temporary directory, never in a home that nodes share, and the operating system
    drops locks with the process. Where no file can be made, or the wait grows too long, each process
    compiles for itself.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._held: list[int] = []

    @property
    def depth(self) -> int:
        """How many compilations are going on, one inside another."""
        return len(self._held)

    def _descriptor(self) -> int:
        if self._file is None:
            place = f"{os.environ.get('NUMBA_CACHE_DIR', '')} {__file__}"
            name = f"iterreduce-compile-{os.getuid()}-{zlib.crc32(place.encode()):08x}.lock"
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
                self._file = os.open(os.path.join(tempfile.gettempdir(), name), flags, 0o600)
            except OSError:
                self._file = -1
        return self._file

    def begin(self, name: str) -> None:
        """Wait for the turn of this kernel, unless this process has it."""
        byte = self._byte(name)
        if not self._held:
            for notice in [*_notices]:
                notice.begin()
        if byte not in self._held and self._descriptor() >= 0:
            last = time.monotonic() + LONGEST_WAIT_SECONDS
            while not self._taken(byte) and time.monotonic() < last:
                time.sleep(0.01)
        self._held.append(byte)

    @staticmethod
    def _byte(name: str) -> int:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])

    def _taken(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._descriptor(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True

    def end(self, depth: int) -> None:
        """Back to as many compilations, one inside another, as there were."""
        while self.depth > depth:
            byte = self._held.pop()
            if byte not in self._held and self._descriptor() >= 0:
                self._leave(byte)
            if not self._held:
                for notice in [*_notices]:
                    notice.end()

    def _leave(self, byte: int) -> None:
        fcntl.lockf(self._descriptor(), fcntl.LOCK_UN, 1, byte)


_turns = _Turns()


class _SharedCache:
    """Numba's file cache behind the lock: what is not there is compiled by one process, and loaded by the
    others.

    Numba alone lets every process compile, and two that save at once can leave an index that names the
    other's code. Loading takes no lock: a new index never stands beside old code, because old code is removed
    first.
    """

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, target: Any) -> Any:
        found = self._cache.load_overload(signature, target)
        if found is None:
            _turns.begin(self._cache._cache_file._index_path)  # until the compilation that follows is saved
            found = self._cache.load_overload(signature, target)
        return found

    def save_overload(self, signature: Any, compiled: Any) -> None:
        try:
            self._remove_old_code()
            self._cache.save_overload(signature, compiled)
        except OSError:  # a full or read-only disk: this process goes on with what it has compiled
            pass

    def _remove_old_code(self) -> None:
        file = self._cache._cache_file
        if not file._load_index():
            pattern = os.path.join(glob.escape(file._cache_path), file._data_name_pattern.format(number=0))
            for path in glob.glob(re.sub(r"0(?=\.nbc$)", "*", pattern)):
                os.unlink(path)


def _compile_once_per_node(dispatcher: Any) -> None:
    dispatcher._cache = _SharedCache(dispatcher._cache)
    compile_alone = dispatcher.compile

    def compile_in_turn(signature: Any) -> Any:
        with global_compiler_lock:
            depth = _turns.depth
            try:
                return compile_alone(signature)
            finally:
                _turns.end(depth)

    dispatcher.compile = compile_in_turn


def on_disk(compiled: Any, signature: tuple[Any, ...]) -> bool:
    """Is the machine code of a kernel for arguments of these types in this process, or in its cache?"""
    if signature in compiled.overloads:
        return True
    cache = compiled._cache
    if not isinstance(cache, _SharedCache):
        return False
    key = cache._index_key(signature, compiled.targetctx.codegen())
    return key in cache._cache_file._load_index()


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compile `function` on its first call: cached on disk, GIL released, strict IEEE arithmetic.

    >>> import numpy as np
    >>> @kernel
    ... def total(values):
    ...     s = 0
    ...     for v in values:
    ...         s += v
    ...     return s
    >>> int(total(np.arange(5)))
    10
    """
    return _compile(function)


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Compile like `kernel`, as a part of each kernel that calls it.

    For what a hot loop calls with many arrays: else all their lengths and strides are handed over each time.

    >>> @inlined
    ... def twice(x):
    ...     return x + x
    >>> twice(4)
    8
    """
    return _compile(function, forceinline=True)


def kernel_reassoc(function: Callable[P, R]) -> Callable[P, R]:
    """Compile like `kernel`, and let the compiler regroup float operations so that sums vectorise.

    NaN and infinity behave as ever; the result may differ from the strict one in the last bits, but is the
    same on every run of the same build.

    >>> import numpy as np
    >>> @kernel_reassoc
    ... def total(values):
    ...     s = 0.0
    ...     for v in values:
    ...         s += v
    ...     return s
    >>> total(np.ones(8))
    8.0
    """
    return _compile(function, fastmath=REASSOCIATE)
