"""Settings of the pipeline: `DataConfig` changes results, `LoaderConfig` never does. Imports nothing heavy."""
import hashlib
import json
from dataclasses import dataclass, field, fields
from typing import Any, Self, get_type_hints

from pipeline.schema import check_types

REGIONS = ("square", "full")
CROPS = ("random", "random_resized")
MEANS = ("image", "image_center", "channel")
OUTPUTS = ("float32", "float16", "bfloat16", "uint8")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as torchvision has them
PRESETS: dict[str, dict[str, Any]] = {
    "alexnet": {},
    "imagenet": {"region": "full", "square_px": 256, "crop_px": 224, "crop": "random_resized", "mirror": True, "lighting": 0.0,
                 "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
}
# Of a field that changes results: a recipe must state it, though it has a default; or it was added later, and is left out of what
# is written where it is at its default, so that fingerprints of earlier runs stay as they were.
STATED, ADDED = {"recipe": "stated"}, {"recipe": "added"}
WINDOW, LANES = 4096, 8  # of tier streamed, unless a recipe says otherwise


def _check(key: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key} (={value}) must {rule}")


@dataclass(frozen=True)
class DataConfig:
    """How a file becomes a training or test image; by default as in the paper (§2, §4.1). A recipe states all of it, but for keys
    added later, whose defaults are the earlier behaviour; at those they stay out of a run's fingerprint.

    Attributes:
        region: where training crops come from: ``square``, the central square (paper §2), or ``full``, the whole image
            at the short side of the square. Evaluations always use the square.
        square_px: short side after the resize, and side of the central square (paper: 256).
        crop_px: side of the crop the network sees (227: the paper's 224 with its windows' overhang).
        mirror: flip half of the training crops horizontally.
        lighting: PCA colour jitter, standard deviation of the three alphas of paper §4.1 (0.1); 0 turns it off.
        mean: what is subtracted: ``image``, the mean image at the crop's own position, flipped with it (the paper);
            ``image_center``, its central crop whatever the position (the release); ``channel``, the training set's three means;
            or three numbers, R, G, B, as shares of 255 (0.485, 0.456, 0.406), which need `std`.
        lighting_epochs: epochs, counted from the first, that have the colour jitter (the release: 68 of 93); 0: all of them.
        crop: ``random``, a crop of `crop_px` at a random place (the paper); or ``random_resized``, torchvision's
            RandomResizedCrop: a random box of the region, resized to `crop_px`. Evaluations take the central crop either way.
        scale: random_resized: smallest and largest share of the region's area that a box covers.
        ratio: random_resized: smallest and largest ratio of a box's width to its height.
        std: with three numbers as `mean`: what the differences are divided by, R, G, B, as shares of 255. Empty: images stay in
            grey levels, 0–255 less the mean.
        output: type of the images: float32, float16, bfloat16; or uint8, the pixels, of which no mean is subtracted.

    Raises:
        ValueError: a value outside its range, naming the key; TypeError: one of another type.
    """
    region: str = field(default="square", metadata=STATED)
    square_px: int = field(default=256, metadata=STATED)
    crop_px: int = field(default=227, metadata=STATED)
    mirror: bool = field(default=True, metadata=STATED)
    lighting: float = field(default=0.1, metadata=STATED)
    mean: str | tuple[float, ...] = field(default="image", metadata=STATED)
    lighting_epochs: int = field(default=0, kw_only=True)
    crop: str = field(default="random", kw_only=True, metadata=ADDED)
    scale: tuple[float, ...] = field(default=(0.08, 1.0), kw_only=True, metadata=ADDED)
    ratio: tuple[float, ...] = field(default=(3 / 4, 4 / 3), kw_only=True, metadata=ADDED)
    std: tuple[float, ...] = field(default=(), kw_only=True, metadata=ADDED)
    output: str = field(default="float32", kw_only=True, metadata=ADDED)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The settings of a kind of network, with `changes`: ``alexnet``, the paper's; or ``imagenet``, what most recipes for
        ImageNet since ResNet do: RandomResizedCrop to 224, horizontal flips, mean and standard deviation of ImageNet; evaluations
        resize the short side to 256 and take the central 224. Raises ValueError."""
        _check("preset", name, name in PRESETS, f"be one of {', '.join(PRESETS)}; correct it")
        return cls(**{**PRESETS[name], **changes})

    def __post_init__(self) -> None:
        check_types(vars(self), get_type_hints(DataConfig), "data.")
        for name in ("scale", "ratio", "std", *(["mean"] if not isinstance(self.mean, str) else [])):  # recipes have lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, allowed in (("region", REGIONS), ("crop", CROPS), ("output", OUTPUTS)):
            _check(f"data.{name}", getattr(self, name), getattr(self, name) in allowed,
                   f"be one of {', '.join(allowed)}; correct it")
        _check("data.square_px", self.square_px, 1 <= self.square_px <= 8192, "lie in 1…8192; the paper's value is 256")
        _check("data.crop_px", self.crop_px, 1 <= self.crop_px <= self.square_px,
               f"lie in 1…data.square_px (={self.square_px}); the paper's network takes 227 of 256")
        _check("data.lighting", self.lighting, 0 <= self.lighting < 10,
               "be a standard deviation in [0, 10); the paper's value is 0.1")
        _check("data.lighting_epochs", self.lighting_epochs, self.lighting_epochs >= 0,
               "not be negative; 0 is colour jitter in every epoch, data.lighting: 0 in none")
        self._check_normalization()
        self._check_boxes()

    def _check_normalization(self) -> None:
        _check("data.mean", self.mean, self.mean in MEANS or _are_shares(self.mean),
               f"be one of {', '.join(MEANS)}, or three numbers in [0, 1], shares of 255; correct it")
        _check("data.mean", self.mean, self.mean != "image" or self.region != "full",
               "not be image where data.region is full: the mean image covers the central square only; use mean: channel")
        if self.std or not isinstance(self.mean, str):
            _check("data.std", list(self.std), _are_shares(self.std) and min(self.std) > 0,
                   "be three numbers in (0, 1], shares of 255, where data.mean is three numbers; ImageNet's are "
                   f"{list(IMAGENET_STD)}")
            _check("data.std", list(self.std), not isinstance(self.mean, str),
                   f"be empty where data.mean is {self.mean}; or give three numbers as data.mean")
        _check("data.lighting", self.lighting, self.lighting == 0 or self.output != "uint8",
               "be 0 where data.output is uint8: colour jitter is added to floating-point images")

    def _check_boxes(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", 1e3)):
            low_high = getattr(self, name)
            _check(f"data.{name}", list(low_high), len(low_high) == 2 and 0 < low_high[0] <= low_high[1] <= most,
                   f"be two numbers, smallest and largest, above 0 and at most {most:g}; correct it")
        _check("data.mean", self.mean, self.mean != "image" or not self.resized_boxes,
               "not be image where data.crop is random_resized: a resized box has no place in the mean image; use mean: channel, "
               "or three numbers with std")

    def added_digest(self) -> dict[str, str]:
        """{"data": 16 hex digits of SHA-256 over all values}; empty where keys added later are all at their defaults."""
        values = {item.name: getattr(self, item.name) for item in fields(DataConfig)}
        if all(values[item.name] == item.default for item in fields(DataConfig) if item.metadata == ADDED):
            return {}
        return {"data": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]}

    @property
    def resized_boxes(self) -> bool:
        """Whether training crops are boxes of random size, resized."""
        return self.crop == "random_resized"

    @property
    def needs_stats(self) -> bool:
        """Whether images depend on statistics of the training set: its mean, or the components of its colours."""
        return self.lighting > 0 or self.output != "uint8" and isinstance(self.mean, str)

    @property
    def factor(self) -> tuple[float, ...] | None:
        """What grey levels, less their mean, are multiplied by, R, G, B; None: they stay as they are."""
        return tuple(1 / (255 * std) for std in self.std) if self.std and self.output != "uint8" else None


def _are_shares(values: Any) -> bool:
    return not isinstance(values, str) and len(values) == 3 and all(0 <= value <= 1 for value in values)


@dataclass(frozen=True)
class LoaderConfig:
    """How fast the machine makes batches. Never changes the order or the augmentation; and pixels only in the three settings that
    say so, on a GPU, by rounding: its decoders differ by a grey level here and there, more at edges of colour.

    Attributes:
        threads: DALI's worker threads; 0 means one per core this process may use.
        prefetch: batches DALI keeps ready, at least 1.
        queue: finished batches that wait for the network, at least 1; those that wait on a GPU take its memory.
        read_threads: threads that fetch bytes from storage and check them; 0 reads in the caller's thread.
        check_crc: compare each file's bytes with the CRC-32 of the index (25 µs for 110 kB); finds flipped bits that
            decode to other pixels without an error.
        quarantine_budget: largest share of the training samples that may be unreadable before training stops.
        gpu_decode: GPU only, changes pixels: region, decode only what lies under a crop; whole, the image; auto is region, but
            whole with DALI's build for CUDA 13, whose decoder of regions is reported to crash.
        fancy_upsampling: GPU only, changes pixels: interpolate the chroma of 4:2:0 and 4:2:2 as CPUs do; else it is repeated.
            With it, regions of such images are decoded by the CPU (nvImageCodec 0.9 with nvJPEG before 13.2); whole ones are not.
        hw_decoder_load: GPU only, changes pixels: share of each batch's baseline JPEGs given to the hardware engine. Between 0
            and 1 the decoder of an image depends on its place in the batch; squares that are kept (tier resident) and
            evaluations therefore take 1 instead.
        kernels: what finishes the images of tier resident on a GPU: auto, a Triton kernel where one can be built; torch never,
            triton always (on a CPU in its interpreter, for tests).
        channels_last: memory layout of the images, and of the network's kernels: NHWC instead of NCHW.
        preallocate_px: GPU only: side of the largest image for which decoder memory is reserved at the start; 0: none.
        resident_memory: where tier resident keeps images: ram, one memory-mapped file for all processes of a node; or gpu,
            spread over the node's processes.
        resident_folder: folder of that file; empty means `resident` in the index folder.

    Raises:
        ValueError: a value outside its range, naming the key; TypeError: one of another type.
    """
    threads: int = 0
    prefetch: int = 2
    queue: int = 2
    read_threads: int = 2
    check_crc: bool = True
    quarantine_budget: float = 1e-4
    gpu_decode: str = "auto"
    fancy_upsampling: bool = True
    hw_decoder_load: float = 0.65
    kernels: str = "auto"
    channels_last: bool = False
    preallocate_px: int = 0
    resident_memory: str = "ram"
    resident_folder: str = ""

    def __post_init__(self) -> None:
        check_types(vars(self), get_type_hints(LoaderConfig), "machine.")
        for name, low, high in (("threads", 0, 1024), ("prefetch", 1, 1024), ("queue", 1, 1024), ("read_threads", 0, 1024),
                                ("preallocate_px", 0, 1 << 16)):  # more threads than a machine starts abort the process
            _check(f"machine.{name}", value := getattr(self, name), low <= value <= high,
                   f"be at least {low} and at most {high}; correct the setting")
        _check("machine.gpu_decode", self.gpu_decode, self.gpu_decode in ("auto", "region", "whole"),
               "be auto, region or whole; correct the setting")
        _check("machine.kernels", self.kernels, self.kernels in ("auto", "torch", "triton"),
               "be auto, torch or triton; correct the setting")
        _check("machine.resident_memory", self.resident_memory, self.resident_memory in ("ram", "gpu"),
               "be ram or gpu; correct the setting")
        for name in ("quarantine_budget", "hw_decoder_load"):
            _check(f"machine.{name}", value := getattr(self, name), 0 <= value <= 1,
                   "be a share between 0 and 1; correct the setting")
