"""Bottleneck of a loader: which stage limits it, why, and what would lift it; pure functions of measured figures.

Two kinds of evidence: what the loader was doing during its stalls (`pipeline.monitor`) says where to look, and how fast each
stage runs alone says which stage it is. What can be done about it, by tier, is `pipeline.monitor.remedies`, as in training.
Rates are images/s, CPU times are ms an image of all threads together.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.config import LoaderConfig
from pipeline.monitor import cause_of, remedies
from pipeline.resident.capacity import NETWORK_BYTES, RAM_SHARE
from tools.profile.measure import Figures

STAGES = ("read", "crc", "decode", "normalize", "copy", "hand-over")    # in the order of a batch's way
NETWORK = "network"
# The stages in which the loader may be when its monitor names one.
_WITHIN = {"read": ("read", "crc"), "decode": ("decode",), "normalize": ("normalize",), "copy": ("copy", "hand-over")}
_DOING = {"read": "waited for bytes", "decode": "waited for decoded pixels", "normalize": "was resizing and normalizing pixels",
          "copy": "was handing over"}
_STALL = 0.05       # share of the loop's time below which a stall is not worth a word
_BUSY = 0.85        # share of the cores in use from which on more threads find no core
_OTHERS = 0.1       # share of the cores used by other programs that is worth a word


@dataclass(frozen=True)
class Measured:
    """All figures of one profile.

    Attributes:
        stages: each stage alone, in the order of STAGES.
        loader: the loader end to end, asked for batches as fast as it gives them.
        need: images/s that training takes, or None when nobody asked.
        together: the loader feeding the network, or a consumer of that rate.
        network_here: the need is that of a network measured on the same machine.
    """
    stages: tuple[Figures, ...]
    loader: Figures
    need: float | None = None
    together: Figures | None = None
    network_here: bool = False

    def stage(self, name: str) -> Figures | None:
        """The stage of that name, or None where this tier has none."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def headroom(self) -> float | None:
        """Throughput of the loader alone ÷ need."""
        return self.loader.rate / self.need if self.need else None

    @property
    def remainder_ms(self) -> float:
        """CPU time of the whole loader that no stage measured alone accounts for; negative when they take more."""
        return self.loader.cpu - sum(stage.cpu for stage in self.stages)


@dataclass(frozen=True)
class Setup:
    """Where and on what it was measured.

    Attributes:
        tier: archives, packed, streamed or resident.
        settings: of the loader, its threads decided.
        cores: this process may use.
        gpu: whether batches are made on one.
        images, square_px, image_bytes: of the split: how many, side of the resized image, mean bytes of a file.
        square: whether training crops come from the central square only, which is what a resident set holds.
        ram_bytes: memory this process may use in all. gpu_bytes: free on its GPU.
        spinning: the archives lie on a disk that turns.
        others: share of all cores of the machine that other programs used meanwhile.
    """
    tier: str
    settings: LoaderConfig
    cores: int
    gpu: bool
    images: int
    square_px: int
    image_bytes: float
    square: bool
    ram_bytes: int
    gpu_bytes: int = 0
    spinning: bool = False
    others: float = 0.0

    def resident_bytes(self, layout: str) -> int:
        """Size of the resident set: `rgb` three bytes a pixel, `yuv420` one and a half."""
        return self.images * self.square_px ** 2 * 3 // (2 if layout == "yuv420" else 1)

    def resident_fit(self) -> tuple[str, str] | None:
        """(layout, memory) of the best resident set that fits: the GPU's memory first, and exact RGB before YUV."""
        usable = {"gpu": self.gpu_bytes - NETWORK_BYTES, "ram": RAM_SHARE * self.ram_bytes}
        return next(((layout, memory) for layout in ("rgb", "yuv420") for memory in usable
                     if self.resident_bytes(layout) <= usable[memory]), None)

    @property
    def memory(self) -> str:
        """RAM and GPU memory in words."""
        gpu = f" and {self.gpu_bytes / 1e9:,.1f} GB of GPU memory" if self.gpu_bytes else ""
        return f"there are {self.ram_bytes / 1e9:,.1f} GB of RAM{gpu}"


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Attributes:
        limit: one of STAGES, or "network".
        sentence: which, and the figures that say so.
        advice_yaml: YAML to paste into the recipe, with its reasons as comments; comments only when nothing would help.
        headroom: loader alone ÷ need, or None without a need.
    """
    limit: str
    sentence: str
    advice_yaml: str
    headroom: float | None


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
    """Which stage limits, why, and what would lift it.

    Raises:
        ValueError: no stage was measured.
    """
    if not measured.stages:
        raise ValueError("stages (=none) must have been measured; profile at least one")
    if _loader_limits(measured):
        name, evidence = limiting(measured)
        sentence, advice = _sentence(measured, setup, name, evidence), _advise(measured, setup, name)
    else:
        name, sentence, advice = NETWORK, _network_sentence(measured, setup), _network_advice(measured, setup)
    if setup.others > _OTHERS:
        advice.remarks.append(f"other programs used {setup.others:.0%} of the cores meanwhile: measure again on an idle machine")
    if not (advice.machine or advice.data or advice.remarks):
        advice.remarks.append(f"no setting lifts {name} here: more or faster cores would")
    return Verdict(name, sentence, advice.yaml(), measured.headroom)


def _loader_limits(measured: Measured) -> bool:
    if measured.need is None:
        return True
    if measured.together is None:
        return measured.loader.rate < measured.need
    return measured.together.waited > _STALL or measured.loader.rate < 0.9 * measured.need


def limiting(measured: Measured) -> tuple[str, str]:
    """(stage, evidence): the stage that limits the loader, and what named it: a state of the monitor, "own" when the loader was
    seldom waited for, or "alone" for the rates of the stages."""
    loader = measured.loader
    if loader.waited < 0.5:  # asked without pause, yet seldom waiting: the time goes where batches change hands
        return _slowest(measured, _WITHIN["copy"]) or _slowest(measured, STAGES), "own"
    if loader.causes:
        state = cause_of(loader.causes)
        if name := _slowest(measured, _WITHIN[state]):
            return name, state
    return _slowest(measured, STAGES), "alone"


def _slowest(measured: Measured, names: tuple[str, ...]) -> str:
    """The slowest alone of these stages; "" when none of them was measured."""
    stages = [stage for stage in measured.stages if stage.name in names]
    return min(stages, key=lambda stage: stage.rate).name if stages else ""


def busy(measured: Measured, setup: Setup) -> float:
    """Share of the cores that the loader keeps busy, flat out."""
    return measured.loader.cpu / 1000 * measured.loader.rate / setup.cores


# --- in words

def _sentence(measured: Measured, setup: Setup, name: str, evidence: str) -> str:
    loader, stage, together = measured.loader, measured.stage(name), measured.together
    assert stage is not None
    parts = [f"{name} limits: the loader gives {loader.rate:,.0f} img/s"]
    if measured.need:
        parts[0] += f", {measured.headroom:.2f} of the {measured.need:,.0f} img/s needed"
    if together is not None:
        parts.append(f"together they reach {together.rate:,.0f}, and {together.waited:.0%} of the time is data stall")
    if evidence in _DOING:
        parts.append(f"asked without pause, its own thread {_DOING[evidence]} in {loader.causes[evidence]:.0%} of the time")
        if evidence in ("read", "decode") and loader.causes[evidence] < 0.5:
            parts[-1] += ", although it had other pixels to finish meanwhile"
    elif evidence == "own":
        parts.append(f"asked without pause, it was waited for in {loader.waited:.0%} of the time only: the rest is handing over")
    threads = f"{stage.threads} thread{'s' * (stage.threads != 1)}"
    total = sum(other.cpu for other in measured.stages)
    speed = f", {stage.mb_s:,.0f} MB/s," if stage.mb_s else ""
    parts.append(f"{name} alone runs at {stage.rate:,.0f} img/s{speed} with {threads} and takes {stage.cpu:.2f} of the stages' "
                 f"{total:.2f} CPU ms an image")
    used = busy(measured, setup)
    parts.append(f"all {setup.cores} cores are busy" if used + setup.others > _BUSY
                 else f"{used:.0%} of {setup.cores} cores are busy")
    if setup.others > _OTHERS:
        parts[-1] += f", {setup.others:.0%} with other programs: on an idle machine rates are higher (CPU ms hardly change)"
    slowest = measured.stage(_slowest(measured, STAGES))
    if slowest is not None and slowest.name != name and slowest.rate < 0.8 * stage.rate:
        parts.append(f"{slowest.name} is slower alone ({slowest.rate:,.0f} img/s), but was not what was waited for")
    return "; ".join(parts) + "."


def _network_sentence(measured: Measured, setup: Setup) -> str:
    assert measured.need is not None and measured.headroom is not None
    text = (f"the network limits: it takes {measured.need:,.0f} img/s and the loader alone gives {measured.loader.rate:,.0f}: "
            f"{measured.headroom:.1f}× headroom")
    together = measured.together
    if together is not None:
        text += f"; together {together.rate:,.0f} img/s, {together.waited:.1%} data stall"
        if together.rate < 0.9 * min(measured.need, measured.loader.rate) and measured.network_here and not setup.gpu:
            text += "; that is less than either alone: loader and network share the cores"
    return text + "."


# --- what to do

def _network_advice(measured: Measured, setup: Setup) -> _Advice:
    advice, headroom, threads = _Advice(), measured.headroom or 0, setup.settings.threads
    advice.remarks.append("the loader needs nothing; what makes the network faster makes the run faster" if headroom > 1.2 else
                          "loader and network are about equal: a faster tier, or more cores, would give room")
    if measured.network_here and not setup.gpu and headroom > 2:
        fewer = max(1, int(threads * 1.5 / headroom))
        if fewer < threads:
            advice.machine.append(f"threads: {fewer}    # of {threads}: leaves cores to a network on the CPU")
    return advice


def _advise(measured: Measured, setup: Setup, name: str) -> _Advice:
    advice, settings = _Advice(), setup.settings
    state = next(state for state, names in _WITHIN.items() if name in names)
    chosen = remedies(setup.tier, state)
    free = busy(measured, setup) + setup.others <= _BUSY and settings.threads < setup.cores
    if "threads" in chosen and free:
        advice.machine.append(f"threads: {setup.cores}    # of {setup.cores} cores {settings.threads} may work on pixels")
    if state == "read" and (name == "read" or settings.read_threads < setup.cores):
        more = min(32, max(4, 2 * settings.read_threads))
        if more > settings.read_threads:
            advice.machine.append(f"read_threads: {more}    # now {settings.read_threads}; storage answers many requests at once")
    if name == "crc":
        advice.machine.append("check_crc: false    # flipped bits pass unnoticed; `build_index.py verify` finds them beforehand")
    if name == "decode" and setup.gpu:
        advice.machine.append(f"hw_decoder_load: {settings.hw_decoder_load}    # try others: --sweep")
    p50, _, p99, _ = measured.loader.latency_ms
    if p99 > 3 * p50 and settings.queue < 4:
        advice.machine.append(f"queue: 4    # p99 of a batch is {p99 / p50:.1f}× its median; more batches ready even that out")
    if name == "hand-over":
        advice.remarks.append("no setting lifts this: it is the consumer's own thread that takes batches over")
    if "packed" in chosen:
        advice.data.append(f"tier: packed    # {setup.square_px}-px JPEGs: fewer bytes to read and to decode, nothing to resize")
        advice.data.append("packed: FOLDER    # python tools/pack_shards.py INDEX FOLDER")
    if name == "read" and setup.tier == "packed" and setup.spinning:
        advice.data.append("tier: streamed    # the disk turns: sequential reads; the order is then no true permutation")
    if setup.tier == "resident":
        if name == "copy" and settings.resident_memory == "ram" and setup.resident_fit() == ("rgb", "gpu"):
            advice.machine.append("resident_memory: gpu    # then nothing is copied to the device")
    elif "resident" in chosen or name == "copy" and setup.gpu_bytes:
        _advise_resident(advice, setup)
    return advice


def _advise_resident(advice: _Advice, setup: Setup) -> None:
    """The resident set when it fits, else why it does not."""
    if not setup.square:
        advice.remarks.append("tier resident holds central squares, and data.region is full: it cannot serve this recipe")
        return
    fit = setup.resident_fit()
    if fit is None:
        gb = setup.resident_bytes("rgb") / 1e9
        advice.remarks.append(f"tier resident would need {gb:,.1f} GB (rgb) or {gb / 2:,.1f} (yuv420); {setup.memory}")
        return
    layout, memory = fit
    size = f"{setup.resident_bytes(layout) / 1e9:,.1f} GB of {memory.upper()} for {setup.images:,} images; {setup.memory}"
    lines = ["tier: resident", f"resident: {layout}"]
    if advice.data:  # one tier can be pasted; the other is offered in a comment
        in_gpu = ", machine: {resident_memory: gpu}" if memory == "gpu" else ""
        advice.remarks.append(f"or, faster still: data: {{{', '.join(lines)}}}{in_gpu}: {size}")
        return
    advice.data += [f"{lines[0]}    # {size}", lines[1]]
    if memory == "gpu":
        advice.machine.append("resident_memory: gpu")
