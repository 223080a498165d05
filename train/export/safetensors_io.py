"""Read and write model.safetensors and the folder around it that train.export writes.

    model.safetensors   every parameter under its canonical name (conv1.weight … fc8.bias), float32; metadata: recipe and hashes
    config.yaml, stats.npz   the recipe without the machine's part, the statistics whose mean is subtracted
    classes.txt         a line `wnid words` for each class, where they are known
    model.onnx          when asked for
    README.md           the model card; yours to edit
    manifest.json       size and SHA-256 of all but the card, compared before use: safetensors does not notice a flipped bit

Needs the extra `export` (safetensors). Whoever has only safetensors and torch reads the file too: the card says how.
"""
import contextlib
import importlib
import json
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch

from model.alexnet import AlexNet, canonical_shapes
from model.config import ModelConfig
from pipeline.files import parse_json
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import MANIFEST
from train.config import Config
from train.recipe import model_config

FORMAT = 1
WEIGHTS, CLASSES, ONNX, CARD = "model.safetensors", "classes.txt", "model.onnx", "README.md"


def pack(config: Config, tensors: Mapping[str, torch.Tensor], hashes: Mapping[str, str]) -> bytes:
    """The bytes of model.safetensors: canonical name → float32 of the canonical shape; the metadata has the recipe and `hashes`,
    such as `classes_sha256`. Raises ValueError for a tensor that is not the network's, or not finite."""
    _check(tensors, config.model, "weights")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} (=NaN or infinite) must be finite; the weights are damaged, take an earlier checkpoint")
    metadata = {"format": "pt", "alexnet_dali_format": str(FORMAT), "config": json.dumps(config.as_dict(), sort_keys=True),
                "fingerprint": config.fingerprint(), **hashes}
    packed: bytes = library("safetensors.torch").save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    return _in_order(packed)


def _in_order(packed: bytes) -> bytes:
    """The same file with its header in order: safetensors writes the metadata in another one each time."""
    end = 8 + int.from_bytes(packed[:8], "little")
    header = json.dumps(json.loads(packed[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + packed[end:]


def load_safetensors(path: str | Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """The network of a file that `pack` made, or of the folder it lies in, and its weights, float32 on the CPU.
    Raises ValueError when it is not there, of another format, or has other tensors than its network, DamagedCheckpoint when the
    folder's manifest says other sizes or hashes."""
    file = _file(path)
    metadata = read_metadata(file)
    if metadata.get("alexnet_dali_format") != str(FORMAT):
        raise ValueError(f"weights (={file}) have format {metadata.get('alexnet_dali_format', 'none')}, not {FORMAT}; give a "
                         "file that train.export of this version wrote")
    try:
        config = model_config(parse_json(metadata["config"])["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"weights (={file}) have a config that this version does not read ({error}); use the version that "
                         "wrote them") from None
    tensors = read_weights(file)
    _check(tensors, config, str(file))
    return config, tensors


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of anyone's safetensors file, or of an exported folder: name → as stored, on the CPU. A folder is verified first.
    Raises ValueError and DamagedCheckpoint."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file or of an exported folder. Raises as `read_weights`."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


def from_pretrained(folder: str | Path) -> AlexNet:
    """The network of an exported folder (or its model.safetensors), in eval mode on the CPU: (B, 3, crop, crop) RGB of 0–255,
    mean subtracted → (B, K) logits. Raises as `load_safetensors`."""
    config, tensors = load_safetensors(folder)
    with torch.device("meta"):  # no initial values are drawn
        network = AlexNet(config, seed=0)
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def write_manifest(folder: Path) -> None:
    """Write manifest.json of all files of a folder but the card."""
    checkpoint.write_manifest(folder, [path.name for path in folder.iterdir() if path.name not in (CARD, MANIFEST)])


def verify(folder: Path) -> None:
    """Compare an exported folder with its manifest. Raises DamagedCheckpoint, naming the file."""
    checkpoint.verify_manifest(folder, [WEIGHTS], "exported file", "export again")


def library(name: str, purpose: str = "read and write model.safetensors") -> Any:
    """A module of an optional library. Raises RuntimeError, saying how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise RuntimeError(f"{package} (=not installed) is needed to {purpose}; pip install {package}, or this package with its "
                           "extra export") from None


def _file(path: str | Path) -> Path:
    """The safetensors file of a path: itself, or that of a folder, which is compared with its manifest if it has one."""
    path = Path(path)
    if path.is_dir():
        if (path / MANIFEST).exists():
            verify(path)
        path = path / WEIGHTS
    if not path.is_file():
        raise ValueError(f"weights (={path}) are not there; give a folder that train.export wrote, or its {WEIGHTS}")
    return path


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    file, safetensors = _file(path), library("safetensors")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights (={file}) are no safetensors file ({error}); give one that train.export wrote") from None


def _check(tensors: Mapping[str, torch.Tensor], config: ModelConfig, what: str) -> None:
    """Raise ValueError unless these are the tensors of the network."""
    wanted = canonical_shapes(config)
    for name in [*wanted, *(name for name in tensors if name not in wanted)]:
        tensor = tensors.get(name)
        if tensor is None or name not in wanted or tuple(tensor.shape) != wanted[name] or tensor.dtype != torch.float32:
            given = "none" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            expected = f"float32 {wanted[name]}" if name in wanted else "absent"
            raise ValueError(f"{name} (={given} in {what}) must be {expected}; give the weights of this network")
