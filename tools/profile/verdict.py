"""Bottleneck of a loader: which stage limits it, why, and what would lift it; pure functions of measured figures.

Two kinds of evidence: what the loader was doing during its stalls (`pipeline.monitor`) says where to look, and how fast each
stage runs alone says which stage it is. What can be done about it, by tier, is `pipeline.monitor.remedies`, as in training.
Rates are images/s, CPU times are ms an image of all threads together.
"""
from dataclasses import dataclass, field

from pipeline.config import LoaderConfig
from pipeline.monitor import cause_of, remedies
from pipeline.resident.capacity import NETWORK_BYTES, RAM_SHARE
from tools.profile.measure import Figures

STAGES = ("read", "crc", "decode", "normalize", "copy", "hand-over")  # in the order of a batch's way
NETWORK = "network"
# The stages in which the loader may be when its monitor names one.
_WITHIN = {"read": ("read", "crc"), "decode": ("decode",), "normalize": ("normalize",), "copy": ("copy", "hand-over")}
_DOING = {"read": "waited for bytes", "decode": "waited for decoded pixels", "normalize": "was resizing and normalizing pixels",
          "copy": "was handing over"}
_STALL = 0.05  # share of the loop's time below which a stall is not worth a word
_BUSY = 0.85  # share of the cores in use from which on more threads find no core


@dataclass(frozen=True)
class Measured:
    """All figures of one profile."""
    stages: tuple[Figures, ...]  # each alone, in the order of STAGES
    loader: Figures  # end to end, asked for batches as fast as it gives them
    need: float | None = None  # images/s that training takes, or None when nobody asked
    together: Figures | None = None  # the loader feeding the network, or a consumer of that rate

    @property
    def headroom(self) -> float | None:
        """Throughput of the loader alone ÷ need."""
        return self.loader.rate / self.need if self.need else None

    @property
    def met(self) -> float | None:
        """Rate together ÷ need; of the loader alone when they were not run together; None without a need."""
        return (self.together or self.loader).rate / self.need if self.need else None

    @property
    def stages_cpu(self) -> float:
        """CPU ms an image of all stages."""
        return sum(stage.cpu for stage in self.stages)


@dataclass(frozen=True)
class Setup:
    """Where and on what it was measured."""
    tier: str
    settings: LoaderConfig  # its threads decided
    cores: int  # this process may use
    gpu: bool  # whether batches are made on one
    images: int
    square_px: int  # side of the resized image
    square: bool  # training crops come from the central square only, which is what a resident set holds
    ram_bytes: int  # this process may use in all
    gpu_bytes: int = 0  # free on its GPU

    def resident_bytes(self, layout: str) -> int:
        """Size of the resident set: `rgb` three bytes a pixel, `yuv420` one and a half."""
        return self.images * self.square_px ** 2 * 3 // (2 if layout == "yuv420" else 1)

    def resident_fit(self) -> tuple[str, str] | None:
        """(layout, memory) of the best resident set that fits: the GPU's memory first, and exact RGB before YUV."""
        usable = {"gpu": self.gpu_bytes - NETWORK_BYTES, "ram": RAM_SHARE * self.ram_bytes}
        return next(((layout, memory) for layout in ("rgb", "yuv420") for memory in usable
                     if self.resident_bytes(layout) <= usable[memory]), None)


@dataclass(frozen=True)
class Verdict:
    """The answer."""
    limit: str  # one of STAGES, or "network"
    sentence: str  # which, and the figures that say so
    advice_yaml: str  # to paste into the recipe, with its reasons as comments; comments only when nothing would help


@dataclass
class _Advice:
    """Lines of YAML under their groups, each with its reason, and remarks."""
    machine: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def yaml(self) -> str:
        lines = [f"# {remark}" for remark in self.remarks]
        for group, entries in (("machine", self.machine), ("data", self.data)):
            lines += [f"{group}:", *(f"  {entry}" for entry in entries)] if entries else []
        return "\n".join(lines) + "\n"


def verdict(measured: Measured, setup: Setup) -> Verdict:
    """Which stage limits, why, and what would lift it."""
    loader, need, together = measured.loader, measured.need, measured.together
    if need is not None and (loader.rate >= need if together is None else
                             together.waited <= _STALL and loader.rate >= 0.9 * need):
        name, sentence, advice = NETWORK, _network_sentence(measured), _Advice()
        advice.remarks.append("the loader needs nothing; what makes the network faster makes the run faster"
                              if loader.rate > 1.2 * need else
                              "loader and network are about equal: a faster tier, or more cores, would give room")
    else:
        name, evidence = limiting(measured)
        sentence, advice = _sentence(measured, setup, name, evidence), _advise(measured, setup, name)
    if not (advice.machine or advice.data or advice.remarks):
        advice.remarks.append(f"no setting lifts {name} here: more or faster cores would")
    return Verdict(name, sentence, advice.yaml())


def limiting(measured: Measured) -> tuple[str, str]:
    """(stage, evidence): the stage that limits the loader, and what named it: a stage of the monitor, "own" when the loader was
    seldom waited for, or "alone" for the rates of the stages."""
    loader = measured.loader
    if loader.waited < 0.5:  # asked without pause, yet seldom waiting: the time goes where batches change hands
        return _slowest(measured, _WITHIN["copy"]) or _slowest(measured, STAGES), "own"
    if loader.causes:
        cause = cause_of(loader.causes)
        if name := _slowest(measured, _WITHIN[cause]):
            return name, cause
    return _slowest(measured, STAGES), "alone"


def _slowest(measured: Measured, names: tuple[str, ...]) -> str:
    """The slowest alone of these stages; "" when none of them was measured."""
    stages = [stage for stage in measured.stages if stage.name in names]
    return min(stages, key=lambda stage: stage.rate).name if stages else ""


def _busy(measured: Measured, setup: Setup) -> float:
    """Share of the cores that the loader keeps busy, flat out."""
    return measured.loader.cpu / 1000 * measured.loader.rate / setup.cores


# --- in words

def _sentence(measured: Measured, setup: Setup, name: str, evidence: str) -> str:
    loader, together = measured.loader, measured.together
    stage = next(stage for stage in measured.stages if stage.name == name)
    parts = [f"{name} limits: the loader gives {loader.rate:,.0f} img/s"]
    if measured.need:
        parts[0] += f", {measured.headroom:.2f} of the {measured.need:,.0f} img/s needed"
    if together is not None:
        parts.append(f"together they reach {together.rate:,.0f}, and {together.waited:.0%} of the time is data stall")
    if evidence in _DOING:
        parts.append(f"asked without pause, its own thread {_DOING[evidence]} in {loader.causes[evidence]:.0%} of the time")
    elif evidence == "own":
        parts.append(f"asked without pause, it was waited for in {loader.waited:.0%} of the time only: the rest is handing over")
    speed = f", {stage.mb_s:,.0f} MB/s," if stage.mb_s else ""
    parts.append(f"{name} alone runs at {stage.rate:,.0f} img/s{speed} with {stage.threads} thread{'s' * (stage.threads != 1)} "
                 f"and takes {stage.cpu:.2f} of the stages' {measured.stages_cpu:.2f} CPU ms an image")
    used = _busy(measured, setup)
    parts.append(f"all {setup.cores} cores are busy" if used > _BUSY else f"{used:.0%} of {setup.cores} cores are busy")
    return "; ".join(parts) + "."


def _network_sentence(measured: Measured) -> str:
    loader, together = measured.loader, measured.together
    text = (f"the network limits: it takes {measured.need:,.0f} img/s and the loader alone gives {loader.rate:,.0f}: "
            f"{measured.headroom:.1f}× headroom")
    if together is not None:
        text += f"; together {together.rate:,.0f} img/s, {together.waited:.1%} data stall"
    return text + "."


# --- what to do

def _advise(measured: Measured, setup: Setup, name: str) -> _Advice:
    advice, settings = _Advice(), setup.settings
    cause = next(cause for cause, names in _WITHIN.items() if name in names)
    chosen = remedies(setup.tier, cause)
    if "threads" in chosen and _busy(measured, setup) <= _BUSY and settings.threads < setup.cores:
        advice.machine.append(f"threads: {setup.cores}    # of {setup.cores} cores {settings.threads} may work on pixels")
    more = min(32, max(4, 2 * settings.read_threads))
    if cause == "read" and more > settings.read_threads and (name == "read" or settings.read_threads < setup.cores):
        advice.machine.append(f"read_threads: {more}    # now {settings.read_threads}; storage answers many requests at once")
    if name == "crc":
        advice.machine.append("check_crc: false    # flipped bits pass unnoticed; `build_index.py verify` finds them beforehand")
    if name == "decode" and setup.gpu:
        advice.machine.append(f"hw_decoder_load: {settings.hw_decoder_load}    # tools/gpu_report.py measures others")
    if name == "hand-over":
        advice.remarks.append("no setting lifts this: it is the consumer's own thread that takes batches over")
    if "packed" in chosen:
        advice.data += [f"tier: packed    # {setup.square_px}-px JPEGs: fewer bytes to read and to decode, nothing to resize",
                        "packed: FOLDER    # python tools/pack_shards.py INDEX FOLDER"]
    if name == "read" and setup.tier == "packed":
        advice.remarks.append("on a spinning disk, data.tier: streamed reads sequentially; the order is then no true permutation")
    if setup.tier == "resident":
        if name == "copy" and settings.resident_memory == "ram" and setup.resident_fit() == ("rgb", "gpu"):
            advice.machine.append("resident_memory: gpu    # then nothing is copied to the device")
    elif "resident" in chosen or name == "copy" and setup.gpu_bytes:
        _advise_resident(advice, setup)
    return advice


def _advise_resident(advice: _Advice, setup: Setup) -> None:
    """The resident set when it fits, else why it does not."""
    gb, fit = setup.resident_bytes("rgb") / 1e9, setup.resident_fit()
    gpu = f" and {setup.gpu_bytes / 1e9:,.1f} GB of GPU memory" if setup.gpu_bytes else ""
    have = f"there are {setup.ram_bytes / 1e9:,.1f} GB of RAM{gpu}"
    if not setup.square:
        advice.remarks.append("tier resident holds central squares, and data.region is full: it cannot serve this recipe")
    elif fit is None:
        advice.remarks.append(f"tier resident would need {gb:,.1f} GB (rgb) or {gb / 2:,.1f} (yuv420); {have}")
    else:
        layout, memory = fit
        size = f"{setup.resident_bytes(layout) / 1e9:,.1f} GB of {memory.upper()} for {setup.images:,} images; {have}"
        if advice.data:  # one tier can be pasted; the other is offered in a comment
            in_gpu = ", machine: {resident_memory: gpu}" if memory == "gpu" else ""
            advice.remarks.append(f"or, faster still: data: {{tier: resident, resident: {layout}}}{in_gpu}: {size}")
            return
        advice.data += [f"tier: resident    # {size}", f"resident: {layout}"]
        advice.machine += ["resident_memory: gpu"] * (memory == "gpu")
