"""Reads what torch.distributed.checkpoint (DCP) wrote, without running code out of a file.

DCP keeps a checkpoint's table of contents, `.metadata`, as a pickle, and `pickle.load` calls whatever function a pickle names.
This reader knows the classes that DCP writes and refuses all others. (Tensors are read by torch.load with weights_only.)
"""
import collections
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from pipeline.schema import is_file_name


def _memory_format(kind: Any, name: str) -> Any:
    """A member of an enumeration, in place of getattr, with which Python 3.11.2 and its like (Debian 12) write one."""
    return getattr(metadata, "_MEM_FORMAT_ENCODING")[name]


ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__name__): kind for kind in (
        metadata.Metadata, metadata.TensorStorageMetadata, metadata.TensorProperties, metadata.ChunkStorageMetadata,
        metadata.MetadataIndex, metadata.StorageMeta, torch.Size, collections.OrderedDict)},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16)},
    # Named by their own names in the pickle, which are not public.
    **{(module, name): getattr(owner, name) for module, owner, name in (
        (metadata.__name__, metadata, "_MEM_FORMAT_ENCODING"), (filesystem.__name__, filesystem, "_StorageInfo"),
        ("torch.serialization", torch.serialization, "_get_layout"))},
    ("builtins", "getattr"): _memory_format,
    **{(module, "PosixPath"): pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")}}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return ALLOWED[module, name]


class Reader(dcp.FileSystemReader):
    """DCP's reader with a table of contents that is checked. Raises RuntimeError when it is none of DCP's."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                found = _Unpickler(file).load()
            _check(found)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a pickle of damaged bytes raises anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RuntimeError(f"checkpoint file (={path}) is not one that a checkpoint has ({reason}); use another "
                               "checkpoint") from None
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


def _check(found: Any) -> None:
    """Raise an exception, of any kind, unless this describes tensors in files of the folder itself."""
    if type(found) is not metadata.Metadata:
        raise ValueError("it is no table of contents")
    for name, entry in found.state_dict_metadata.items():
        if type(name) is not str or type(entry) is not metadata.TensorStorageMetadata or type(entry.size) is not torch.Size:
            raise ValueError("it holds something other than tensors")
        for chunk in entry.chunks:
            if type(chunk.offsets) is not torch.Size or type(chunk.sizes) is not torch.Size:
                raise ValueError("a part of a tensor has no shape")
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise ValueError(f"the parts of {name} are not the whole of it")
    for index, place in found.storage_data.items():
        if type(place.relative_path) is not str or not is_file_name(place.relative_path):
            raise ValueError(f"it names a file elsewhere, {place.relative_path!r}")
        if type(index) is not metadata.MetadataIndex or min(place.offset, place.length) < 0 \
                or getattr(place, "transform_descriptors", None):
            raise ValueError(f"{index} lies nowhere")
