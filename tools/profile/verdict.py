"""What limits a loader, why, and what would lift it: pure functions of measured figures.

The one concept: two kinds of evidence. First what the loader was doing while somebody waited for it (`pipeline.monitor`),
second how fast each stage runs alone. The first says where to look, the second which stage it is.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from tools.profile.figures import STAGES, Facts, Measured
from pipeline.resident.capacity import NETWORK_BYTES, RAM_SHARE

NETWORK = "network"
# Which stages the loader may be in when its meter says so.
_CPU = {"read": ("order", "read", "crc"), "decode": ("decode",), "colour": ("resize", "colour"), "copy": ("copy", "hand-over")}
_GPU = {**_CPU, "decode": ("decode", "resize"), "colour": ("colour",)}    # there DALI resizes
_DOING = {"read": "waited for bytes", "decode": "waited for decoded pixels", "colour": "was resizing and finishing pixels",
          "copy": "was handing over"}
_WAITED = 0.05      # share of the loop's time below which its waiting for the loader is not worth a word
_LATE = 0.2         # share of the producing thread's time spent in stages before its own from which on those are late
_BUSY = 0.85        # share of the cores in use from which on more threads find no core
_OTHERS = 0.1       # share of the cores used by other programs that is worth a word


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
    """Lines of YAML under their groups, each with its reason."""
    machine: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def yaml(self) -> str:
        lines = [f"# {remark}" for remark in self.remarks]
        for group in ("machine", "data"):
            entries = getattr(self, group)
            lines += [f"{group}:", *(f"  {entry}" for entry in entries)] if entries else []
        return "\n".join(lines) + "\n"


def verdict(measured: Measured, facts: Facts) -> Verdict:
    """Which stage limits, why, and what would lift it.

    Raises:
        ValueError: no stage was measured.
    """
    if not measured.stages:
        raise ValueError("stages (=none) must have been measured; profile at least one")
    headroom = measured.headroom
    if not _loader_limits(measured):
        return Verdict(NETWORK, _network_sentence(measured, facts), _network_advice(measured, facts).yaml(), headroom)
    name, cause = limiting(measured, facts.gpu)
    return Verdict(name, _sentence(measured, facts, name, cause), _advise(measured, facts, name).yaml(), headroom)


def _loader_limits(measured: Measured) -> bool:
    if measured.need is None:
        return True
    if measured.together is not None and measured.together.waited > _WAITED:
        return True
    return measured.loader.rate < measured.need * (1 if measured.together is None else 0.9)


def limiting(measured: Measured, gpu: bool = False) -> tuple[str, str]:
    """(stage, evidence): the stage that limits the loader, and which evidence named it: a state of the meter, "own" when it
    was never the producing side that was waited for, or "alone" for the rates of the stages.

    The producing thread waits for bytes and for decoded pixels, and finishes pixels itself while both are made. So, when it
    waits for one of them at all, that one is late; only when it does not is it the finishing, however much time that takes.
    """
    loader = measured.loader
    if loader.waited < 0.5:  # asked without pause, yet seldom waiting: the time goes where batches change hands
        return _slowest(measured, _CPU["copy"]) or _slowest(measured, STAGES), "own"
    for states in (("read", "decode"), ("colour", "copy")):
        state = max(states, key=lambda state: loader.causes.get(state, 0.0))
        name = _slowest(measured, (_GPU if gpu else _CPU)[state])
        if name and sum(loader.causes.get(other, 0.0) for other in states) > _LATE:
            return name, state
    return _slowest(measured, STAGES), "alone"


def _slowest(measured: Measured, names: tuple[str, ...]) -> str:
    """The slowest alone of these stages; "" when none of them was measured."""
    found = [stage for stage in measured.stages if stage.name in names]
    return min(found, key=lambda stage: stage.rate).name if found else ""


def busy(measured: Measured, facts: Facts) -> float:
    """Share of the cores that the loader keeps busy, flat out."""
    return measured.loader.cpu / 1000 * measured.loader.rate / facts.cores


def resident_bytes(facts: Facts, layout: str) -> int:
    """What the resident set takes: `rgb` three bytes a pixel, `yuv420` one and a half."""
    return facts.images * facts.square_px ** 2 * 3 // (2 if layout == "yuv420" else 1)


def _sentence(measured: Measured, facts: Facts, name: str, cause: str) -> str:
    loader, stage, both = measured.loader, measured.stage(name), measured.together
    assert stage is not None
    parts = [f"{name} limits: the loader gives {loader.rate:,.0f} img/s"]
    if measured.need:
        parts[0] += f", {measured.headroom:.2f} of the {measured.need:,.0f} img/s needed"
    if both is not None:
        parts.append(f"together they reach {both.rate:,.0f}, and {both.waited:.0%} of the time is waiting for the loader")
    if cause in _CPU:
        parts.append(f"asked without pause, its own thread {_DOING[cause]} in {loader.causes[cause]:.0%} of the time")
        if cause in ("read", "decode") and loader.causes[cause] < 0.5:
            parts[-1] += ", although it had other pixels to finish meanwhile"
    elif cause == "own":
        parts.append(f"asked without pause, it was waited for in {loader.waited:.0%} of the time only: the rest is handing over")
    threads = f"{stage.threads} thread{'s' * (stage.threads != 1)}"
    total = sum(other.cpu for other in measured.stages)
    speed = f", {stage.mb_s:,.0f} MB/s," if stage.mb_s else ""
    parts.append(f"{name} alone runs at {stage.rate:,.0f} img/s{speed} with {threads} and takes {stage.cpu:.2f} of the stages' "
                 f"{total:.2f} CPU ms an image")
    used, others = busy(measured, facts), facts.others
    parts.append(f"all {facts.cores} cores are busy" if used + others > _BUSY else f"{used:.0%} of {facts.cores} cores are busy")
    if others > _OTHERS:
        parts[-1] += f", {others:.0%} with other programs: on an idle machine rates are higher (CPU ms hardly change)"
    slowest = _slowest(measured, STAGES)
    other = measured.stage(slowest)
    if other is not None and slowest != name and other.rate < 0.8 * stage.rate:
        parts.append(f"{slowest} is slower alone ({other.rate:,.0f} img/s), but was not what was waited for")
    return "; ".join(parts) + "."


def _network_sentence(measured: Measured, facts: Facts) -> str:
    assert measured.need is not None and measured.headroom is not None
    text = (f"the network limits: it takes {measured.need:,.0f} img/s and the loader alone gives {measured.loader.rate:,.0f}: "
            f"{measured.headroom:.1f}× head-room")
    both = measured.together
    if both is not None:
        text += f"; together {both.rate:,.0f} img/s, {both.waited:.1%} of the time waited"
        if both.rate < 0.9 * min(measured.need, measured.loader.rate) and measured.network_here and not facts.gpu:
            text += "; that is less than either alone: loader and network share the cores"
    return text + "."


def _network_advice(measured: Measured, facts: Facts) -> _Advice:
    advice = _Advice()
    advice.remarks.append("the loader needs nothing; what makes the network faster makes the run faster"
                          if (measured.headroom or 0) > 1.2 else
                          "loader and network are about equal: a faster tier, or more cores, would give room")
    if facts.others > _OTHERS:
        advice.remarks.append(f"other programs used {facts.others:.0%} of the cores meanwhile: measure again on an idle machine")
    if measured.network_here and not facts.gpu and facts.settings.threads > 1 and (measured.headroom or 0) > 2:
        fewer = max(1, int(facts.settings.threads * 1.5 / (measured.headroom or 1)))
        if fewer < facts.settings.threads:
            advice.machine.append(f"threads: {fewer}    # of {facts.settings.threads}: leaves cores to a network on the CPU")
    return advice


def _advise(measured: Measured, facts: Facts, name: str) -> _Advice:
    advice, settings = _Advice(), facts.settings
    free = busy(measured, facts) + facts.others <= _BUSY and settings.threads < facts.cores
    if name in ("decode", "resize", "colour") and free:
        advice.machine.append(f"threads: {facts.cores}    # of {facts.cores} cores {settings.threads} may work on pixels")
    if name in ("read", "order", "crc") and (name == "read" or settings.read_threads < facts.cores):
        more = min(32, max(4, 2 * settings.read_threads))
        if more > settings.read_threads:
            advice.machine.append(f"read_threads: {more}    # now {settings.read_threads}; storage answers many requests at once")
    if name == "crc":
        advice.machine.append("check_crc: false    # flipped bits pass unnoticed; `build_index.py verify` finds them beforehand")
    if name == "decode" and facts.gpu:
        advice.machine.append(f"hw_decoder_load: {settings.hw_decoder_load}    # try others: --sweep")
    p50, _, p99, _ = measured.loader.latency_ms
    if p99 > 3 * p50 and settings.queue < 4:
        advice.machine.append(f"queue: 4    # p99 of a batch is {p99 / p50:.1f}× its median; more batches ready even that out")
    if name in ("read", "crc", "decode", "resize", "copy"):
        _advise_tier(advice, facts, name)
    if name == "hand-over":
        advice.remarks.append("no setting lifts this: it is the consumer's own thread that takes batches over")
    if facts.others > _OTHERS:
        advice.remarks.append(f"other programs used {facts.others:.0%} of the cores meanwhile: measure again on an idle machine")
    if not (advice.machine or advice.data or advice.remarks):
        advice.remarks.append(f"no setting lifts {name} here: more or faster cores would")
    return advice


def _advise_tier(advice: _Advice, facts: Facts, name: str) -> None:
    """The next faster tier, and the resident set when it fits; says what does not."""
    if facts.tier == "resident":
        if name == "copy" and facts.settings.resident_memory == "ram" and _fits(facts, "rgb", "gpu"):
            advice.machine.append("resident_memory: gpu    # then nothing is copied to the device")
        return
    if name == "copy" and not facts.gpu_bytes:
        return
    if facts.tier == "archives" and name != "copy":
        advice.data.append(f"tier: packed    # {facts.square_px}-px JPEGs: fewer bytes to read and to decode, nothing to resize")
        advice.data.append("packed: FOLDER    # python tools/pack_shards.py INDEX FOLDER")
    if name == "read" and facts.tier == "packed" and facts.spinning:
        advice.data.append("tier: streamed    # the disk turns: sequential reads; the order is then no true permutation")
    if not facts.square:
        advice.remarks.append("tier resident holds squares, and data.region is full: it cannot serve this recipe")
        return
    fits = _resident_fit(facts)
    want = resident_bytes(facts, "rgb") / 1e9
    if fits is None:
        advice.remarks.append(f"tier resident would need {want:,.1f} GB (rgb) or {want / 2:,.1f} (yuv420); there are "
                              f"{facts.ram_bytes / 1e9:,.1f} GB of RAM" + _gpu_text(facts))
        return
    layout, memory = fits
    size = resident_bytes(facts, layout) / 1e9
    reason = f"{size:,.1f} GB of {memory.upper()} for {facts.images:,} squares; there are {facts.ram_bytes / 1e9:,.1f} GB of RAM"
    lines = ["tier: resident", f"resident: {layout}"]
    if advice.data:  # one tier can be pasted; the other is offered in a comment
        advice.remarks.append(f"or, faster still: data: {{{', '.join(lines)}}}: {reason}{_gpu_text(facts)}")
    else:
        advice.data += [f"{lines[0]}    # {reason}{_gpu_text(facts)}", lines[1]]
    if memory == "gpu":
        (advice.remarks if len(advice.data) and advice.data[0].startswith("tier: packed") else advice.machine).append(
            "resident_memory: gpu")


def _gpu_text(facts: Facts) -> str:
    return f" and {facts.gpu_bytes / 1e9:,.1f} GB of GPU memory" if facts.gpu_bytes else ""


def _fits(facts: Facts, layout: str, memory: str) -> bool:
    usable = facts.gpu_bytes - NETWORK_BYTES if memory == "gpu" else RAM_SHARE * facts.ram_bytes
    return resident_bytes(facts, layout) <= usable


def _resident_fit(facts: Facts) -> tuple[str, str] | None:
    """(layout, memory) of the best resident set that fits: the GPU's memory first, and exact RGB before YUV."""
    kinds = [(layout, memory) for layout in ("rgb", "yuv420") for memory in ("gpu", "ram")]
    return next((kind for kind in kinds if _fits(facts, *kind)), None)
