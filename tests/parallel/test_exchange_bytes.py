"""What tools/scaling.py computes that processes send is what they send."""
import pytest

from model.alexnet import paper
from tests.helpers.exchanged import Case, Sent, exchanged
from tests.helpers.networks import small, with_layers
from tools.scaling import BYTES, SCHEMES, traffic

NETWORKS = {"small": small(), "towers apart until fc7": with_layers(small(), conv3={"sees": "own"}, fc6={"sees": "own"})}
CASES = [(scheme, precision) for scheme in SCHEMES for precision in BYTES]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Case, Sent]]:
    """By each of two processes."""
    cases = [*(("small", *case) for case in CASES), ("towers apart until fc7", "towers", "fp32")]
    return exchanged(NETWORKS, cases, tmp_path_factory.mktemp("exchanged"))


@pytest.mark.parametrize(("scheme", "precision"), CASES)
def test_computed_bytes_are_counted_bytes(counted: list[dict[Case, Sent]], scheme: str, precision: str) -> None:
    sent = [process["small", scheme, precision] for process in counted]
    for rank, found in enumerate(sent):
        computed = traffic(NETWORKS["small"], scheme, precision, tower_rank=0 if scheme == "data" else rank)
        assert found == (computed.crossings, sum(computed.gradients.values()))
    # 7 classes: 4 logits of tower a, 3 of tower b.
    assert scheme == "data" or [crossings["logits", "forward"] for crossings, _ in sent] == [
        4 * BYTES[precision], 3 * BYTES[precision]]


def test_a_layer_that_sees_its_own_tower_sends_nothing(counted: list[dict[Case, Sent]]) -> None:
    name = "towers apart until fc7"
    crossings, _ = counted[0][name, "towers", "fp32"]
    assert crossings == traffic(NETWORKS[name], "towers", "fp32").crossings
    assert {layer for layer, _ in crossings} == {"fc7", "fc8", "logits"}


def test_the_papers_network_as_docs_scaling_says() -> None:
    towers, data, weird = (traffic(paper(), scheme, "fp32") for scheme in SCHEMES)
    both = {"conv3": 128 * 13 * 13 * 4, "fc6": 128 * 6 * 6 * 4, "fc7": 2048 * 4, "fc8": 2048 * 4}
    assert towers.crossings == {(name, way): size for name, size in both.items() for way in ("forward", "backward")} | {
        ("logits", "forward"): 500 * 4}
    assert weird.crossings == {key: size for key, size in towers.crossings.items() if key[0] != "conv3"}
    assert data.crossings == {} and [sum(found.gradients.values()) for found in (towers, weird, data)] == [
        0, 9_336_320, 60_965_224 * 4]

    def step(scheme: str, precision: str, images: int) -> float:
        found = traffic(paper(), scheme, precision)
        return images * sum(found.crossings.values()) + sum(found.gradients.values())
    assert (step("towers", "fp32", 1), step("towers", "bf16", 1)) == (244_688, 122_344)
    # Images a pair with which both send about as much.
    for one, other, precision, images in (("towers", "data", "fp32", 997), ("towers", "data", "bf16", 1993),
                                          ("towers", "weird", "fp32", 54), ("towers", "weird", "bf16", 108),
                                          ("weird", "data", "fp32", 3274), ("weird", "data", "bf16", 6548)):
        assert step(one, precision, images - 1) < step(other, precision, images - 1)
        assert step(one, precision, images + 1) > step(other, precision, images + 1)
    assert sum(traffic(paper(), "towers", pairs=4).gradients.values()) == 2 * 3 / 4 * 60_965_224 / 2 * 4
