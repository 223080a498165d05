"""Synthetic photographs: one lit object of a given shape and colour on a textured background.

A picture (H, W, 3) RGB is a function of (seed, class, number). Shapes are signed distance fields (negative inside), their height
over the background gives normals, normals give shading; position, size, angle, light, background and noise are random. Neither
shape nor colour alone tells a class: classes share each of them with others, and the background is of any colour.
"""
import colorsys
import io
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Hue in turns. Far enough apart that the lighting of a picture cannot turn one into another.
COLOURS: dict[str, float] = {"red": 0.0, "blue": 0.62, "green": 0.36, "yellow": 0.15, "violet": 0.8, "cyan": 0.5}


def _star(x: Array, y: Array) -> Array:
    sector = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)  # folded into half a point
    radius = np.hypot(x, y)
    # The edge runs from the tip (radius 1, angle 0) to the notch (radius 0.42, angle π/5).
    tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(sector), np.sin(sector)])
    along = (notch - tip) / np.linalg.norm(notch - tip)
    return (radius * np.sin(angle) - tip[1]) * -along[0] + (radius * np.cos(angle) - tip[0]) * along[1]


def _cross(x: Array, y: Array) -> Array:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 0.95, short - 0.3)


# Signed distance to each shape over (x, y) in units of the object's radius; y grows downwards.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "ball": lambda x, y: np.hypot(x, y) - 0.9,
    "box": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.78,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) - 0.24,
    "star": _star,
    "cross": _cross,
    "triangle": lambda x, y: np.maximum(np.abs(x) * 0.866 - (y + 0.95) * 0.5, y - 0.6)}


def classes(count: int) -> list[tuple[str, str]]:
    """The first `count` (4 to 36) classes as (colour, shape), each sharing its shape and its colour with others."""
    most = len(SHAPES) * len(COLOURS)
    if not 4 <= count <= most:
        raise ValueError(f"classes (={count}) must lie in 4..{most}; choose fewer shapes and colours")
    shapes = list(SHAPES)[:max(2, min(len(SHAPES), (count + 1) // 2))]
    return [(list(COLOURS)[k // len(shapes)], shapes[k % len(shapes)]) for k in range(count)]


def _noise(random: np.random.Generator, height: int, width: int, cells: int) -> Array:
    """Smooth noise in [0, 1], (H, W): a grid of about `cells` random values a side, interpolated."""
    grid = random.random((cells + 2, cells + 2))
    rows, columns = np.linspace(0, cells, height), np.linspace(0, cells, width)
    i, j = rows.astype(int), columns.astype(int)
    v, u = rows - i, columns - j
    v, u = (v * v * (3 - 2 * v))[:, None], (u * u * (3 - 2 * u))[None, :]
    top = grid[np.ix_(i, j)] * (1 - u) + grid[np.ix_(i, j + 1)] * u
    bottom = grid[np.ix_(i + 1, j)] * (1 - u) + grid[np.ix_(i + 1, j + 1)] * u
    return np.asarray(top * (1 - v) + bottom * v)


def _rgb(hue: float, saturation: float, value: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _background(random: np.random.Generator, height: int, width: int) -> Array:
    """(H, W, 3) in [0, 1]: two colours mixed by noise, planks, checks or weave, lit at an angle."""
    x, y = np.meshgrid(np.arange(width) / min(height, width), np.arange(height) / min(height, width))
    angle, scale = random.uniform(0, np.pi), random.uniform(3, 9)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    rough = sum(_noise(random, height, width, 3 * 2 ** k) / 2 ** k for k in range(5)) / 1.94
    pattern = {"cloud": lambda: rough,
               "planks": lambda: (np.floor(u * scale) * 0.37 % 1) * 0.6 + 0.4 * rough,
               "checks": lambda: ((np.floor(u * scale) + np.floor(v * scale)) % 2) * 0.6 + 0.4 * rough,
               "weave": lambda: 0.5 + 0.3 * np.sin(20 * scale * u) * np.sin(20 * scale * v) + 0.4 * (rough - 0.5),
               }[str(random.choice(["cloud", "cloud", "planks", "checks", "weave"]))]()
    hue = random.random()
    first = _rgb(hue, random.uniform(0, 0.45), random.uniform(0.25, 0.9))
    second = _rgb(hue + random.normal(0, 0.08), random.uniform(0, 0.45), random.uniform(0.25, 0.9))
    mix = np.asarray(pattern)[:, :, None]
    slope = 1 + random.uniform(-0.25, 0.25) * (x - 0.5) + random.uniform(-0.25, 0.25) * (y - 0.5)
    return np.asarray((first * mix + second * (1 - mix)) * (0.85 + 0.3 * rough)[:, :, None] * slope[:, :, None])


def _add_object(picture: Array, random: np.random.Generator, shape: str, colour: str, centre: tuple[float, float],
                radius: float, light: Array) -> None:
    """Lay one object and its shadow over `picture` (H, W, 3), in place. centre (x, y), radius in pixels, light a unit vector."""
    height, width, _ = picture.shape
    turn, squeeze = random.uniform(-0.45, 0.45), random.uniform(0.85, 1)  # things stand more or less upright
    x, y = np.meshgrid((np.arange(width) - centre[0]) / radius, (np.arange(height) - centre[1]) / (radius * squeeze))

    def distance(shift_x: float, shift_y: float) -> Array:
        a, b = x - shift_x, y - shift_y
        return SHAPES[shape](a * np.cos(turn) + b * np.sin(turn), b * np.cos(turn) - a * np.sin(turn))

    shade = np.clip(0.5 - distance(-light[0] * 0.35, -light[1] * 0.35) / 0.35, 0, 1)  # a soft edge: the light is wide
    picture *= 1 - 0.55 * shade[:, :, None]
    inside = distance(0, 0)
    depth = np.clip(-inside, 0, None)
    roundness = 0.9 if shape == "ball" else 0.35  # the width of the rounded rim
    z = np.sqrt(np.clip(1 - (1 - np.clip(depth / roundness, 0, 1)) ** 2, 0, 1)) * roundness
    slope_y, slope_x = np.gradient(z, 1 / radius)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(z)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    lambert = np.clip(normal @ light, 0, 1)
    half = (light + np.array([0, 0, 1])) / np.linalg.norm(light + np.array([0, 0, 1]))
    gloss = random.uniform(0, 0.6) * np.clip(normal @ half, 0, 1) ** random.uniform(15, 60)
    paint = _rgb(COLOURS[colour] + random.normal(0, 0.015), random.uniform(0.72, 0.95), random.uniform(0.65, 1.0))
    wear = 0.85 + 0.3 * _noise(random, height, width, 12)
    surface = paint * (0.3 + 0.85 * lambert * wear)[:, :, None] + gloss[:, :, None]
    cover = np.clip(0.5 - inside * radius, 0, 1)[:, :, None]  # one pixel of antialiasing
    picture[:] = picture * (1 - cover) + surface * cover


def render(seed: int, colour: str, shape: str, number: int, sides: tuple[int, int] = (90, 160)) -> Array:
    """One photograph, (H, W, 3) uint8 RGB, the same for the same arguments. `number` tells the pictures of a class apart; `sides`:
    range of the short side in pixels; the long side is 1 to 1.5 times as long, upright or across."""
    random = np.random.default_rng([seed, list(COLOURS).index(colour), list(SHAPES).index(shape), number])
    short = int(random.integers(sides[0], sides[1] + 1))
    long = int(short * random.uniform(1, 1.5))
    height, width = (short, long) if random.random() < 0.6 else (long, short)
    picture = _background(random, height, width)
    light = np.array([random.normal(0, 0.5), random.normal(-0.3, 0.5), 1.0])
    light /= np.linalg.norm(light)
    for _ in range(random.integers(0, 4)):  # pebbles, of any colour
        _add_object(picture, random, "ball", str(random.choice(list(COLOURS))),
                    (random.uniform(0, width), random.uniform(0, height)), short * random.uniform(0.03, 0.06), light)
    radius = short * random.uniform(0.3, 0.44)
    # Inside the central square, which is all that training sees (paper §2); up to a sixth of the object may leave it.
    reach = max(0.0, short / 2 - 0.85 * radius)
    centre = (width / 2 + random.uniform(-reach, reach), height / 2 + random.uniform(-reach, reach))
    _add_object(picture, random, shape, colour, centre, radius, light)
    picture *= random.uniform(0.65, 1.2) * random.uniform(0.92, 1.08, 3)  # exposure and white balance
    picture += random.normal(0, random.uniform(0.005, 0.03), picture.shape)  # the sensor
    return np.asarray(np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8))


def encode(picture: Array, kind: str = "jpeg") -> bytes:
    """The file of a picture (H, W, 3) uint8. kind: jpeg, png, cmyk or grey (the last two are JPEGs)."""
    try:
        from PIL import Image
    except ImportError:
        raise RuntimeError("Pillow is not installed, and nothing else here writes JPEG; pip install pillow") from None
    image = Image.fromarray(picture)
    if kind in ("cmyk", "grey"):
        image = image.convert({"cmyk": "CMYK", "grey": "L"}[kind])
    target = io.BytesIO()
    image.save(target, **({"format": "PNG"} if kind == "png" else {"format": "JPEG", "quality": 90}))
    return target.getvalue()
