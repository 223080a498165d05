"""Exchange of activations between the two towers' processes (model parallelism, paper figure 2) at the layers that see both.

The product of such a layer is a sum of two: own activations with their columns of the weight, and the other tower's with theirs.
So the first is computed while the other's activations travel. Backward the other way round: first the gradient that the other
tower waits for; while it travels, all the rest; what arrives is added.

  conv3, fc6, fc7, fc8   as above (and others, where a recipe says so), whatever the scheme (weird: no convolution).
  fc6 in scheme weird    each process has all features of its own half of the images: the product is in rows, not a sum.
  logits                 after the last layer. Every tower then computes the *same* loss, so the gradient of a half is that
                         tower's own slice; adding the other's would count the loss twice.

Messages are torch.distributed's isend and irecv, batched: NCCL makes them one exchange. What crosses has the precision of the
product: bfloat16 under autocast. It travels from where it lies to where it is used, in either memory format, without a copy;
only fc6 in scheme weird copies its own half beside the half that arrives. B batch, C channels (or features) of one tower, H
row, W column, N outputs of this tower."""
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from model.towers import Tower

# Every place where activations may cross, in a fixed order. A message's tag is 2·position in it, + 1 backward.
CROSSINGS = (*(f"{kind}{number}" for kind in ("conv", "fc") for number in range(1, 100)), "logits")
Direction = Literal["forward", "backward"]


class Exchange:
    """An exchange in flight: `sent` goes to the other tower, its tensor into `received`. Both are dense in memory."""

    def __init__(self, sent: torch.Tensor, received: torch.Tensor, tower: Tower, tag: int) -> None:
        # Held until `wait`: the memory of a tensor that travels must not be given to another one.
        self._sent, self._received = sent, received
        group, other = tower.group or dist.group.WORLD, 1 - tower.rank
        self._works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, _flat(sent), group=group, tag=tag, group_peer=other),
            dist.P2POp(dist.irecv, _flat(received), group=group, tag=tag, group_peer=other)])

    def wait(self) -> torch.Tensor:
        """The tensor received. On a GPU the current stream waits, not the CPU."""
        for work in self._works:
            work.wait()
        self._works = []
        return self._received


@dataclass(frozen=True)
class Link:
    """Connection to the other tower at one of the CROSSINGS. `overlap`: compute meanwhile; else wait for each message."""
    name: str
    tower: Tower
    overlap: bool

    def start(self, sent: torch.Tensor, received: torch.Tensor, direction: Direction) -> Exchange:
        made = Exchange(sent, received, self.tower, 2 * CROSSINGS.index(self.name) + (direction == "backward"))
        if not self.overlap:
            made.wait()
        return made

    def halves(self, whole: torch.Tensor, dimension: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(own, the other's) half along a dimension, tower a's first in it: views."""
        parts = whole.chunk(2, dimension)
        return parts[self.tower.rank], parts[1 - self.tower.rank]


def _flat(x: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor, whatever its format: a view."""
    return x.as_strided((x.numel(),), (1,))


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x without gaps in memory: x itself where it is contiguous in either format."""
    return x if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _output(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The layer's convolution or product, with this weight."""
    if isinstance(layer, nn.Conv2d):
        return torch.conv2d(x, weight, bias, layer.stride, layer.padding)
    return functional.linear(x, weight, bias)


def _gradients(layer: nn.Module, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, of_x: bool,
               of_weight: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of x, if wanted; that of the weight is put into `of_weight`, if given."""
    if not isinstance(layer, nn.Conv2d):
        if of_weight is not None:
            torch.mm(grad.t(), x, out=of_weight)
        return grad @ weight if of_x else None
    found = torch.ops.aten.convolution_backward(grad, x, weight, None, layer.stride, layer.padding, (1, 1), False, (0, 0), 1,
                                                (of_x, of_weight is not None, False))
    if of_weight is not None:
        of_weight.copy_(found[1])
    return found[0] if not of_x or found[0].stride() == x.stride() else torch.empty_like(x).copy_(found[0])


class _TwoTowerProduct(torch.autograd.Function):
    """(B, C, ...) of this tower and of the other → (B, N, ...)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layer: nn.Module,
                link: Link) -> torch.Tensor:
        x = _dense(x)
        exchange = link.start(x, torch.empty_like(x), "forward")
        own, other = link.halves(weight, 1)
        # The bias goes with tower a's part, so that both towers add the same terms in the same order.
        y = _output(layer, x, own, bias if link.tower.rank == 0 else None)
        received = exchange.wait()
        y += _output(layer, received, other, bias if link.tower.rank == 1 else None)
        ctx.save_for_backward(x, received, weight)
        ctx.layer, ctx.link = layer, link
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, received, weight = ctx.saved_tensors
        layer, link, wanted = ctx.layer, ctx.link, ctx.needs_input_grad[0]
        own, other = link.halves(weight, 1)
        sent = _gradients(layer, grad, received, other, of_x=True, of_weight=None) if wanted else None
        exchange = link.start(sent, torch.empty_like(x), "backward") if sent is not None else None
        of_weight = torch.empty_like(weight)
        of_own, of_other = link.halves(of_weight, 1)
        _gradients(layer, grad, received, other, of_x=False, of_weight=of_other)
        of_x = _gradients(layer, grad, x, own, of_x=wanted, of_weight=of_own)
        of_bias = grad.sum([d for d in range(grad.dim()) if d != 1])
        if exchange is not None:
            of_x += exchange.wait()
        return of_x, of_weight, of_bias, None, None


class _RowsProduct(torch.autograd.Function):
    """(B/2, 2C) features of this process's images and of the other's → (B, N). Forward nothing is computed meanwhile: own rows
    first, then the others', would read all of the weight twice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, link: Link) -> torch.Tensor:
        x = _dense(x)
        whole = x.new_empty(2 * x.shape[0], x.shape[1])
        own, other = link.halves(whole, 0)
        exchange = link.start(x, other, "forward")
        own.copy_(x)
        exchange.wait()
        ctx.save_for_backward(whole, weight)
        ctx.link = link
        return functional.linear(whole, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        whole, weight = ctx.saved_tensors
        own, other = ctx.link.halves(grad, 0)
        sent = other @ weight if ctx.needs_input_grad[0] else None
        exchange = ctx.link.start(sent, torch.empty_like(sent), "backward") if sent is not None else None
        of_weight, of_bias = grad.t() @ whole, grad.sum(0)
        of_x = own @ weight + exchange.wait() if exchange is not None else None
        return of_x, of_weight, of_bias, None


def two_tower_layer(layer: nn.Module, x: torch.Tensor, link: Link, by: Literal["channels", "rows"] = "channels") -> torch.Tensor:
    """Apply `layer` (this tower's rows of a Conv2d or a Linear, with a bias), which sees both towers, to the activations of
    this tower and of the other. Both processes must call it. x: (B, C, ...) activations of this tower; `by` rows (a Linear
    only), (B/2, 2C) of both towers for this process's half of the images, tower a's the first. Returns (B, N, ...) of the
    dtype of x, or of autocast's. It can be differentiated once."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None
    weight, bias = layer.weight, layer.bias
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    if by == "rows":
        rows: torch.Tensor = _RowsProduct.apply(x, weight, bias, link)
        return rows
    result: torch.Tensor = _TwoTowerProduct.apply(x, weight, bias, layer, link)
    return result


def gather_logits(part: torch.Tensor, size: int, tower: Tower) -> torch.Tensor:
    """All `size` logits from the parts of the towers: (B, size·/2) → (B, size). A tower's gradient is its own slice."""
    if tower.count == 1:
        return part
    received = part.new_empty(part.shape[0], size - part.shape[1])
    Link("logits", tower, overlap=False).start(part.detach().contiguous(), received, "forward")
    # Our own columns come from `part`, so autograd leads exactly their gradient back; the others are constants.
    return torch.cat([part, received] if tower.rank == 0 else [received, part], dim=1)
