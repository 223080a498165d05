"""An exported network in code that needs nothing of this program: safetensors and torch, PIL and NumPy. For the model card; the
tests run it."""

from __future__ import annotations

from model.config import ModelConfig
from train.config import Config
from train.export.safetensors_io import STATS, WEIGHTS


def plain_code(model: ModelConfig) -> str:
    """The network in plain torch: code that makes `logits` of `images`, from a file beside it."""
    lines = ["import torch, torch.nn.functional as F", "from safetensors.torch import load_file", f'w = load_file("{WEIGHTS}")']
    lrn, pool = model.lrn, model.pool
    if lrn is not None and any(conv.lrn != "none" for conv in model.convs.values()):
        call = f"F.local_response_norm({{}}, {lrn.n}, {lrn.alpha * lrn.n:.12g}, {lrn.beta}, {lrn.k})"
        apart = model.towers == 2
        lines.append("lrn = lambda x: " + (f"torch.cat([{call.format('t')} for t in x.chunk(2, 1)], 1)" if apart else
                                           call.format("x")) + "  # torch divides alpha by n")
    if model.towers == 2 and any(full.sees == "own" for full in model.fulls.values()):
        lines.append("own = lambda x, weight, bias: torch.cat([F.linear(*t) for t in zip(x.chunk(2, 1), weight.chunk(2), "
                     "bias.chunk(2))], 1)  # each tower alone")
    lines += ['of = lambda name: (w[name + ".weight"], w[name + ".bias"])', "x = images"]
    activation = "F.relu" if model.activation == "relu" else "torch.tanh"
    for number, (name, conv) in enumerate(model.convs.items()):
        groups = f", groups={model.towers}" if conv.sees == "own" and number and model.towers > 1 else ""
        term = f'F.conv2d(x, *of("{name}"), stride={conv.stride}, padding={conv.pad}{groups})'
        placed = conv.lrn if lrn is not None else "none"
        term = {"none": f"{activation}({term})", "after": f"lrn({activation}({term}))",
                "before": f"{activation}(lrn({term}))"}[placed]
        term = f"F.max_pool2d({term}, {pool.px}, {pool.stride})" if conv.pool else term
        lines.append(f"x = {term}")
    lines.append("x = x.flatten(1)")
    for name, full in model.fulls.items():
        product = "own" if model.towers == 2 and full.sees == "own" else "F.linear"
        term = f'{product}(x, *of("{name}"))'
        lines.append(f"logits = {term}" if name == model.last else f"x = {term if full.linear else f'{activation}({term})'}")
    return "\n".join(lines)


def image_code(config: Config) -> str:
    """Plain PIL and NumPy: code with a function `prepare(file)`, the centre view of a file as the network takes it."""
    data = config.data
    side, crop = data.square_px, data.crop_px
    low = (side - crop) // 2
    mean = '["channel_mean"]' if data.mean == "channel" else f'["mean_image"][{low}:{low + crop}, {low}:{low + crop}]'
    return f"""\
import numpy as np
from PIL import Image

mean = np.load("{STATS}"){mean}  # RGB

def prepare(file):  # -> (3, {crop}, {crop}) float32
    image = Image.open(file).convert("RGB")
    short = min(image.size)
    size = [(2 * side * {side} + short) // (2 * short) for side in image.size]
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
    top, left = ((length - {side}) // 2 + {low} for length in pixels.shape[:2])
    return (pixels[top:top + {crop}, left:left + {crop}] - mean).transpose(2, 0, 1)"""
