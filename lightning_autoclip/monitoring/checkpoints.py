"""Parts of checkpoints, read without running or importing anything that is pickled in them."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class _Inert:
    """Stands for an object whose class is not loaded: takes whatever a pickle does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.arguments = args

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self  # a method that was looked up in a class, for one

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...


class _StoredTensor(_Inert):
    """A tensor that is still in the file."""

    def read(self, archive: zipfile.ZipFile, folder: str) -> Tensor:
        (_, storage_type, key, *_), offset, size, stride, *_ = self.arguments
        data, dtype = _stored(archive, f"{folder}data/{key}"), _DTYPES[storage_type.__name__]
        stored = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
        if math.prod(size) > stored.numel():
            raise ValueError(f"a tensor of shape {size} has {stored.numel()} numbers")
        return stored.as_strided(size, stride, offset).clone()


class _Unpickler(pickle._Unpickler):
    """Makes dicts, lists, tuples, strings and numbers; everything that has a class is inert.

    The one in Python rather than the one in C, to which a number in a few bytes can be the size of an array that it
    makes; and without what asks the process for classes that it knows by a number.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8)
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _StoredTensor
        return type(name, (_Inert,), {"__module__": module})

    def persistent_load(self, pid: Any) -> Any:
        return pid  # where the numbers of a tensor are


def read_part(path: Path, choose: Callable[[Any], Any]) -> Any:
    """Read a part of a file of `torch.save`, whatever else is pickled in it.

    Nothing of the file is executed and no module that it names is imported. Tensors are read for the part alone.

    Args:
        path: The file, in the zip format that torch has written since version 1.6.
        choose: From the file's content to the part; its errors are passed on.

    Raises:
        ValueError: It is no such file, or the part holds anything but tensors, dicts, lists, tuples, strings and
            numbers.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # whatever a damaged directory of the archive leads to
        raise ValueError(
            f"Expected {path} to be a checkpoint, as `torch.save` writes it since torch 1.6: {error}."
        ) from error
    with archive:
        try:
            folder = next(name for name in archive.namelist() if name.endswith("data.pkl")).removesuffix("data.pkl")
            content = _Unpickler(io.BytesIO(_stored(archive, f"{folder}data.pkl"))).load()
        except Exception as error:  # whatever a damaged pickle leads to
            raise ValueError(f"Expected {path} to be a checkpoint, but it is damaged: {error!r}.") from error
        part = choose(content)
        try:
            return _Reader(archive, folder).plain(part)
        except Exception as error:  # likewise
            raise ValueError(f"{path} is damaged: {error}.") from error


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """What the archive holds under a name, in as many bytes as it takes there."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # a few bytes could become any number of them
        raise ValueError(f"{name} is compressed, which `torch.save` never does")
    return archive.read(name)


class _Reader:
    """Reads the tensors of a part. What stands in several places is read once: each could double what is below it."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._read: dict[int, Any] = {}
        self._most = 4 * sum(each.file_size for each in archive.infolist())  # bytes; views may share their numbers

    def plain(self, value: Any) -> Any:
        """The value with its tensors."""
        if id(value) not in self._read:
            self._read[id(value)] = self._plain(value)
        return self._read[id(value)]

    def _plain(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {self.plain(key): self.plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.plain(entry) for entry in value)
        if isinstance(value, _StoredTensor):
            tensor = value.read(self._archive, self._folder)
            self._most -= tensor.nbytes
            if self._most < 0:
                raise ValueError("its tensors are many times what it holds of them")
            return tensor
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        kind = value if isinstance(value, type) else type(value)
        raise ValueError(f"an entry of this library holds a `{kind.__module__}.{kind.__qualname__}`")
