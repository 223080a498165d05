"""Bottleneck of a loader: which stage limits it, why, and what would lift it; pure functions of measured figures.

Two kinds of evidence: what the loader was doing during its stalls (`pipeline.monitor`) says where to look, and how fast each
stage runs alone says which stage it is. What can be done about it, by tier, is `pipeline.monitor.remedies`, as in training; the
first of these settings whose estimated rate reaches the need is the one to paste. Rates are images/s, CPU times are ms an image,
of all threads together.
"""
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.config import LoaderConfig
from pipeline.monitor import cause_of, remedies
from pipeline.resident.capacity import NETWORK_BYTES, RAM_SHARE
from tools.profile.measure import Figures

STAGES = ("read", "crc", "decode", "normalize", "copy", "hand-over")  # in the order of a batch's way
NETWORK, NOTHING = "network", "nothing"  # limits, other than a stage: of a need that was measured, and of one that was stated
# The stages in which the loader may be when its monitor names one.
_WITHIN = {"read": ("read", "crc"), "decode": ("decode",), "normalize": ("normalize",), "copy": ("copy", "hand-over")}
_DOING = {"read": "waited for bytes", "decode": "waited for decoded pixels", "normalize": "was resizing and normalizing pixels",
          "copy": "was handing over"}
_STALL = 0.05  # share of the loop's time below which a stall is not worth a word
_BUSY = 0.85  # share of the cores in use from which on more threads find no core
# Of the CPU time that normalizing takes in tier archives the resize has this share (docs/lab-log.md); the rest is colour.
_RESIZE = 0.64
_PACKED_DECODE = 2.5  # CPU time of decoding a packed image ÷ that of its colour (0.34 ÷ 0.134 ms at 256 px)
_YUV = 2.0  # CPU time of a crop out of a yuv420 set ÷ that out of rgb


@dataclass(frozen=True)
class Measured:
    """All figures of one profile."""
    stages: tuple[Figures, ...]  # each alone, in the order of STAGES
    loader: Figures  # end to end, asked for batches as fast as it gives them
    need: float | None = None  # images/s that training takes, or None when nobody asked
    together: Figures | None = None  # the loader feeding the network, or a consumer of that rate
    stated: bool = False  # the need is a number that was given; no network was measured

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

    def cpu(self, *names: str) -> float:
        """CPU ms an image of these stages; 0 for what was not measured."""
        return sum(stage.cpu for stage in self.stages if stage.name in names)


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
    layout: str = "rgb"  # of the resident set
    resizes: bool = False  # crops are resized one by one, in every tier

    def resident_bytes(self, layout: str) -> int:
        """Size of the resident set: `rgb` three bytes a pixel, `yuv420` one and a half."""
        return self.images * self.square_px ** 2 * 3 // (2 if layout == "yuv420" else 1)

    def resident_fit(self, layouts: tuple[str, ...] = ("rgb", "yuv420")) -> tuple[str, str] | None:
        """(layout, memory) of the best resident set that fits: the GPU's memory first, and exact RGB before YUV."""
        usable = {"gpu": self.gpu_bytes - NETWORK_BYTES, "ram": RAM_SHARE * self.ram_bytes}
        return next(((layout, memory) for layout in layouts for memory in usable
                     if self.resident_bytes(layout) <= usable[memory]), None)


@dataclass(frozen=True)
class Verdict:
    """The answer."""
    limit: str  # one of STAGES, "network", or "nothing"
    sentence: str  # which, and the figures that say so
    advice_yaml: str  # to paste into the recipe, with its reasons as comments; comments only when nothing would help


@dataclass(frozen=True)
class Setting:
    """Lines to paste, each with its reason, and the images/s that may be expected of them; None where nothing tells."""
    machine: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    rate: float | None = None

    def yaml(self) -> list[str]:
        return [line for group, entries in (("machine", self.machine), ("data", self.data)) if entries
                for line in (f"{group}:", *(f"  {entry}" for entry in entries))]

    def inline(self) -> str:
        """On one line, without the reasons."""
        return ", ".join(f"{group}: {{{', '.join(entry.partition('    #')[0] for entry in entries)}}}"
                         for group, entries in (("data", self.data), ("machine", self.machine)) if entries)

    @property
    def expected(self) -> str:
        return (f"about {self.rate:,.0f} img/s, estimated for otherwise idle cores" if self.rate else
                "not estimated on a GPU: profile it with --tier")


def verdict(measured: Measured, setup: Setup) -> Verdict:
    """Which stage limits, why, and what would lift it."""
    loader, need, together = measured.loader, measured.need, measured.together
    if need is not None and (loader.rate >= need if together is None else
                             together.waited <= _STALL and loader.rate >= 0.9 * need):
        what = "what makes the network faster makes the run faster" if not measured.stated else "--model measures the network"
        advice = (f"the loader needs nothing; {what}" if loader.rate > 1.2 * need else
                  "loader and need are about equal: a faster tier, or more cores, would give room")
        return Verdict(NOTHING if measured.stated else NETWORK, _enough_sentence(measured), f"# {advice}\n")
    name, evidence = limiting(measured)
    return Verdict(name, _sentence(measured, setup, name, evidence), "\n".join(_advice(measured, setup, name)) + "\n")


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
        parts[0] += f", {measured.headroom:.2f} of the {measured.need:,.0f} img/s {'stated' if measured.stated else 'needed'}"
    if together is not None:
        who = "a consumer of that rate gets" if measured.stated else "together they reach"
        parts.append(f"{who} {together.rate:,.0f}, and {together.waited:.0%} of the time is data stall")
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


def _enough_sentence(measured: Measured) -> str:
    loader, together = measured.loader, measured.together
    if measured.stated:
        text = (f"nothing limits: the loader alone gives {loader.rate:,.0f} img/s, {measured.headroom:.1f}× the "
                f"{measured.need:,.0f} stated (no network was measured)")
    else:
        text = (f"the network limits: it takes {measured.need:,.0f} img/s and the loader alone gives {loader.rate:,.0f}: "
                f"{measured.headroom:.1f}× headroom")
    if together is not None:
        text += f"; {'a consumer of that rate' if measured.stated else 'together'} {together.rate:,.0f} img/s, " \
                f"{together.waited:.1%} data stall"
    return text + "."


# --- what to do

def _advice(measured: Measured, setup: Setup, name: str) -> Iterator[str]:
    """Lines of YAML: the first setting that reaches the need (without a need: the first), the others as comments."""
    settings, remarks, need = _settings(measured, setup, name), list(_remarks(setup, name)), measured.need
    if not settings:
        yield from (f"# {remark}" for remark in remarks or [f"no setting lifts {name} here: more or faster cores would"])
        if need:
            yield f"# no setting here reaches the {need:,.0f} img/s"
        return
    enough = [one for one in settings if need is None or one.rate is not None and one.rate >= need]
    unknown = [one for one in settings if one.rate is None]
    chosen = enough[0] if enough else unknown[-1] if unknown else max(settings, key=lambda one: one.rate or 0)
    yield f"# {chosen.expected}"
    if not enough and need:
        yield (f"# whether it reaches the {need:,.0f} img/s, only measuring tells" if chosen.rate is None else
               f"# no setting here reaches the {need:,.0f} img/s; this comes nearest, more or faster cores would help")
    yield from chosen.yaml()
    yield from (f"# or {one.inline()}: {one.expected}" for one in settings if one is not chosen)
    yield from (f"# {remark}" for remark in remarks)


def _settings(measured: Measured, setup: Setup, name: str) -> list[Setting]:
    """What lifts this stage, the cheapest first."""
    cause = next(cause for cause, names in _WITHIN.items() if name in names)
    chosen, machine = remedies(setup.tier, cause), _machine(measured, setup, name, cause)
    threads = setup.cores if any(line.startswith("threads") for line in machine.machine) else setup.settings.threads
    found = [machine] if machine.machine else []
    if "packed" in chosen:
        found.append(Setting(machine.machine, (
            f"tier: packed    # {setup.square_px}-px JPEGs: fewer bytes to read and to decode, nothing to resize",
            "packed: FOLDER    # alexnet pack INDEX -o FOLDER"), _rate(measured, setup, threads, "packed")))
    if setup.tier == "resident":
        if name == "copy" and setup.settings.resident_memory == "ram" and setup.resident_fit(("rgb",)) == ("rgb", "gpu"):
            found.append(Setting(("resident_memory: gpu    # then nothing is copied to the device",)))
        if name == "normalize" and setup.layout == "yuv420" and setup.resident_fit(("rgb",)):
            found.append(Setting(machine.machine, (f"resident: rgb    # {_room(setup, 'rgb')}: no chroma to bring to size",),
                                 _rate(measured, setup, threads, "resident")))
    elif ("resident" in chosen or name == "copy" and setup.gpu_bytes) and setup.square and (fit := setup.resident_fit()):
        layout, memory = fit
        found.append(Setting((*machine.machine, *["resident_memory: gpu"] * (memory == "gpu")), (
            f"tier: resident    # {_room(setup, layout)}", f"resident: {layout}"),
            _rate(measured, setup, threads, "resident", layout)))
    return found


def _machine(measured: Measured, setup: Setup, name: str, cause: str) -> Setting:
    """Settings of the machine alone."""
    settings, loader, lines, rate = setup.settings, measured.loader, [], measured.loader.rate
    if "threads" in remedies(setup.tier, cause) and _busy(measured, setup) <= _BUSY and settings.threads < setup.cores:
        lines.append(f"threads: {setup.cores}    # of {setup.cores} cores {settings.threads} may work on pixels")
        rate *= min(setup.cores / max(1, settings.threads), max(1.0, _BUSY / _busy(measured, setup)))
    more = min(32, max(4, 2 * settings.read_threads))
    if cause == "read" and more > settings.read_threads and (name == "read" or settings.read_threads < setup.cores):
        lines.append(f"read_threads: {more}    # now {settings.read_threads}; storage answers many requests at once")
    if name == "crc":
        lines.append("check_crc: false    # flipped bits pass unnoticed; `alexnet index verify` finds them beforehand")
        rate *= loader.cpu / max(1e-9, loader.cpu - measured.cpu("crc"))
    return Setting(tuple(lines), (), None if setup.gpu else rate)


def _rate(measured: Measured, setup: Setup, threads: int, tier: str, layout: str = "rgb") -> float | None:
    """Images/s to expect of another tier on a CPU: what of the measured CPU time it leaves, on cores as busy as they get."""
    if setup.gpu:
        return None
    cpu, own = measured.loader.cpu, measured.cpu("normalize")
    resize = _RESIZE * own if setup.tier == "archives" and not setup.resizes else 0.0
    colour = own - resize
    if setup.tier == "resident":  # yuv420, to rgb
        colour /= _YUV
        cpu -= own - colour
    elif tier == "packed":
        cpu -= resize + measured.cpu("decode") - min(measured.cpu("decode"), _PACKED_DECODE * colour)
    else:
        cpu -= resize + measured.cpu("read", "crc", "decode") - (_YUV - 1) * colour * (layout == "yuv420")
    return _BUSY * 1000 * min(setup.cores, max(1, threads)) / max(cpu, colour, 1e-3)


def _room(setup: Setup, layout: str) -> str:
    """Memory that a resident set takes, and what there is."""
    gpu = f" and {setup.gpu_bytes / 1e9:,.1f} GB of GPU memory" if setup.gpu_bytes else ""
    size = setup.resident_bytes(layout) / 1e9
    return (f"{f'{size:,.1f} GB' if size >= 0.1 else f'{1e3 * size:,.1f} MB'} for {setup.images:,} images; there are "
            f"{setup.ram_bytes / 1e9:,.1f} GB of RAM{gpu}")


def _remarks(setup: Setup, name: str) -> Iterator[str]:
    """What a reader must know besides."""
    cause = next(cause for cause, names in _WITHIN.items() if name in names)
    if name == "hand-over":
        yield "no setting lifts this: it is the consumer's own thread that takes batches over"
    if name == "decode" and setup.gpu:
        yield f"machine.hw_decoder_load is {setup.settings.hw_decoder_load}: tools/gpu_report.py measures others"
    if name == "read" and setup.tier == "packed":
        yield "on a spinning disk, data.tier: streamed reads sequentially; the order is then no true permutation"
    if "resident" in remedies(setup.tier, cause):
        if not setup.square:
            yield "tier resident holds central squares, and data.region is full: it cannot serve this recipe"
        elif setup.resident_fit() is None:
            yield f"tier resident would need {_room(setup, 'rgb')} (yuv420: half)"
    if setup.tier == "resident" and setup.layout == "yuv420" and name == "normalize" and not setup.resident_fit(("rgb",)):
        yield f"data.resident: rgb would need {_room(setup, 'rgb')}"
