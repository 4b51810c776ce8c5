"""Synthetic clips, prompts and measurements for the miniature WAN checkpoint (numpy only).

A clip shows one antialiased shape that moves at a steady speed over a plain background:
"a {colour} {shape} moving {direction} on a {background} background". One combination in eight is held out of training.
Purple and rectangles are unknown to the checkpoint: the concept LoRA is trained on some of them.
"""

import dataclasses
import itertools

import numpy as np

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 235),
    "yellow": (240, 210, 50),
    "white": (245, 245, 245),
}
BACKGROUNDS = {
    "black": (12, 12, 12),
    "gray": (120, 120, 120),
    "navy": (20, 25, 85),
    "brown": (105, 65, 35),
}
SHAPES = ("circle", "square", "triangle")
TAUGHT_COLOUR, TAUGHT_SHAPE = "purple", "rectangle"
ALL_COLOURS = COLOURS | {TAUGHT_COLOUR: (165, 55, 215)}
ALL_SHAPES = (*SHAPES, TAUGHT_SHAPE)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (dx, dy), y grows downwards
HEIGHT = WIDTH = 96
FRAMES = 17
MARGIN = 3.0
TRIANGLE_SCALE = 1.4  # circumradius of the triangle relative to the radius of the circle
SQUARE_SCALE = 0.9  # half side of the square relative to the radius of the circle
RECTANGLE_SCALES = (1.4, 0.6)  # half width and half height of the rectangle relative to the radius of the circle


@dataclasses.dataclass(frozen=True, order=True)
class Combination:
    """What one prompt says."""

    colour: str
    shape: str
    direction: str
    background: str

    @property
    def prompt(self):
        return f"a {self.colour} {self.shape} moving {self.direction} on a {self.background} background"

    @property
    def indices(self):
        return (
            list(ALL_COLOURS).index(self.colour),
            ALL_SHAPES.index(self.shape),
            list(DIRECTIONS).index(self.direction),
            list(BACKGROUNDS).index(self.background),
        )

    @property
    def held_out(self):
        """True for one combination in eight; every pair of two attribute values still occurs in training.

        Of the taught colour and of the taught shape one in four, and all that have both.
        """
        colour, shape, direction, background = self.indices
        number = ((colour * 3 + shape) * 4 + direction) * 4 + background
        taught = (self.colour == TAUGHT_COLOUR) + (self.shape == TAUGHT_SHAPE)
        remainders = ((3,), (3, 7), range(8))[taught]
        return (number + number // 8 + number // 48) % 8 in remainders


def combinations():
    """Those of the checkpoint."""
    return [Combination(*values) for values in itertools.product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)]


def taught_combinations():
    """Those of the concept LoRA: the taught colour, the taught shape, and both."""
    everything = itertools.product(ALL_COLOURS, ALL_SHAPES, DIRECTIONS, BACKGROUNDS)
    return [Combination(*values) for values in everything if TAUGHT_COLOUR in values or TAUGHT_SHAPE in values]


def training_combinations():
    return [c for c in combinations() if not c.held_out]


def held_out_combinations():
    return [c for c in combinations() if c.held_out]


def parse_prompt(prompt):
    words = prompt.split()
    return Combination(words[1], words[2], words[4], words[7])


def vary_prompt(combination, rng):
    """Mostly the prompt itself; one time in eight a looser phrasing of it."""
    if rng.random() < 0.875:
        return combination.prompt
    c = combination
    templates = (
        f"{c.colour} {c.shape} moving {c.direction} on {c.background} background",
        f"a {c.colour} {c.shape} moves {c.direction} on a {c.background} background.",
        f"a {c.colour} {c.shape} on a {c.background} background, moving {c.direction}",
        f"on a {c.background} background a {c.colour} {c.shape} is moving {c.direction}",
        f"{c.colour} {c.shape}, {c.background} background, {c.direction}",
        f"a video of a {c.colour} {c.shape} moving {c.direction} on a {c.background} background",
    )
    return templates[rng.integers(len(templates))]


@dataclasses.dataclass(frozen=True)
class Clip:
    """Everything needed to draw one clip. Positions are in pixels, one (x, y) per frame."""

    shape: str
    colour: tuple
    background: tuple
    radius: float
    positions: tuple


def image_prompt(combination, rng):
    """What a clip is called whose first frame is given: the motion, and one time in four what the image shows."""
    if combination.colour and rng.random() < 0.25:
        return vary_prompt(combination, rng)
    shape, direction = combination.shape, combination.direction
    templates = (
        f"moving {direction}",
        f"a {shape} moving {direction}",
        f"the {shape} moves {direction}",
        f"it moves {direction}",
        f"{shape}, {direction}",
    )
    return templates[0 if rng.random() < 0.4 else rng.integers(1, len(templates))]


def extents(shape, radius):
    """Distances from the shape's centre to its left, right, top and bottom edges."""
    if shape == "circle":
        return radius, radius, radius, radius
    if shape == "square":
        half = SQUARE_SCALE * radius
        return half, half, half, half
    if shape == "rectangle":
        half_width, half_height = (scale * radius for scale in RECTANGLE_SCALES)
        return half_width, half_width, half_height, half_height
    circumradius = TRIANGLE_SCALE * radius
    side = circumradius * np.sqrt(3) / 2
    return side, side, circumradius, circumradius / 2


def sample_clip(combination, rng, frames=FRAMES, height=HEIGHT, width=WIDTH):
    """Draws size, start and distance: the shape stays inside the frame and crosses 27 to 45 % of it."""
    scale = min(height, width) / 96
    radius = rng.uniform(11.0, 16.0) * scale
    left, right, top, bottom = extents(combination.shape, radius)
    distance = rng.uniform(26.0, 43.0) * scale
    dx, dy = DIRECTIONS[combination.direction]
    low = np.array([left + MARGIN, top + MARGIN]) + distance * np.array([dx < 0, dy < 0])
    high = np.array([width - right - MARGIN, height - bottom - MARGIN]) - distance * np.array([dx > 0, dy > 0])
    start = rng.uniform(low, high)
    steps = np.arange(frames)[:, None] / max(frames - 1, 1) * distance * np.array([dx, dy])[None]
    return Clip(
        combination.shape,
        ALL_COLOURS[combination.colour],
        BACKGROUNDS[combination.background],
        float(radius),
        tuple(map(tuple, start[None] + steps)),
    )


def sample_still(shape, colour, background, rng):
    """A shape at rest, anywhere in the frame: the first frame of a clip."""
    radius = rng.uniform(11.0, 16.0)
    left, right, top, bottom = extents(shape, radius)
    low = (left + MARGIN, top + MARGIN)
    start = rng.uniform(low, (WIDTH - right - MARGIN, HEIGHT - bottom - MARGIN))
    return Clip(shape, tuple(colour), tuple(background), float(radius), (tuple(start),) * FRAMES)


def move(still, direction, rng):
    """The still shape set in motion by 16 to 40 pixels, or None where the frame's edge is nearer than 16."""
    (x, y), (dx, dy) = still.positions[0], DIRECTIONS[direction]
    left, right, top, bottom = extents(still.shape, still.radius)
    edges = {"left": x - left, "right": WIDTH - x - right, "up": y - top, "down": HEIGHT - y - bottom}
    room = edges[direction] - MARGIN
    if room < 16:
        return None
    travel = np.linspace(0, rng.uniform(16.0, min(40.0, room)), FRAMES)
    return dataclasses.replace(still, positions=tuple((x + dx * d, y + dy * d) for d in travel))


def random_colours(rng):
    """An arbitrary colour and a background from which it can be told apart."""
    while True:
        colour, background = rng.uniform(0, 255, (2, 3))
        if np.linalg.norm(colour - background) > 80:
            return colour, background


def sample_movable(shape, colour, background, rng):
    """A still that has room to move in every direction."""
    while True:
        still = sample_still(shape, colour, background, rng)
        if all(move(still, direction, rng) for direction in DIRECTIONS):
            return still


def signed_distance(shape, radius, x, y):
    """Distance to the outline, negative inside; x and y are relative to the centre."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        half = np.float32(SQUARE_SCALE * radius)
        return np.maximum(np.abs(x), np.abs(y)) - half
    if shape == "rectangle":
        half_width, half_height = (np.float32(scale * radius) for scale in RECTANGLE_SCALES)
        return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)
    circumradius = TRIANGLE_SCALE * radius
    inner = np.float32(circumradius / 2)
    slanted = np.float32(np.sqrt(3) / 2) * np.abs(x) - np.float32(0.5) * y
    return np.maximum(y, slanted) - inner


def render(clip, height=HEIGHT, width=WIDTH, window=None, first=0, frames=None):
    """Float32 frames (f, h, w, 3) between 0 and 255; `window` = (top, left, height, width) draws only that part."""
    top, left, rows, columns = window or (0, 0, height, width)
    positions = np.asarray(clip.positions, np.float32)[first : None if frames is None else first + frames]
    x = np.arange(left, left + columns, dtype=np.float32)[None, None, :] + 0.5 - positions[:, 0, None, None]
    y = np.arange(top, top + rows, dtype=np.float32)[None, :, None] + 0.5 - positions[:, 1, None, None]
    distance = signed_distance(clip.shape, clip.radius, x, y)
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    colour = np.asarray(clip.colour, np.float32)
    background = np.asarray(clip.background, np.float32)
    return background + (colour - background) * coverage


def render_uint8(clip, **options):
    return np.round(render(clip, **options)).astype(np.uint8)


# Measurements: frames are uint8 (f, h, w, 3), wherever they come from.


def nearest(colour, palette):
    names = list(palette)
    table = np.array([palette[name] for name in names], np.float32)
    return names[int(np.argmin(((table - np.asarray(colour, np.float32)) ** 2).sum(-1)))]


def largest_component(mask):
    """The largest 4-connected part of a boolean image: the runs of each row, joined where they touch the row above."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]
    parents = list(range(len(rows)))

    def root(i):
        while parents[i] != i:
            i = parents[i]
        return i

    first_above, row_start = 0, 0
    for i in range(len(rows)):
        if rows[i] != rows[row_start]:
            first_above, row_start = row_start, i
        for j in range(first_above, row_start):
            if rows[j] == rows[i] - 1 and starts[j] < stops[i] and starts[i] < stops[j]:
                parents[root(j)] = root(i)
    roots = np.array([root(i) for i in range(len(rows))])
    sizes = np.bincount(roots, stops - starts)
    part = np.zeros_like(mask)
    for i in np.flatnonzero(roots == np.argmax(sizes)):
        part[rows[i], starts[i] : stops[i]] = True
    return part


def segment(frame):
    """Background colour (median of the border) and the mask of the largest thing that differs from it, or None."""
    frame = frame.astype(np.float32)
    border = np.concatenate([frame[:2].reshape(-1, 3), frame[-2:].reshape(-1, 3), frame[:, :2].reshape(-1, 3),
                             frame[:, -2:].reshape(-1, 3)])  # fmt: skip
    background = np.median(border, axis=0)
    difference = np.sqrt(((frame - background) ** 2).sum(-1))
    peak = np.percentile(difference, 97)
    if peak < 30:
        return background, None
    return background, largest_component(difference > peak / 2)


def classify_shape(mask):
    """The shape whose ideal outline of the same area and centre overlaps the mask best, and that overlap (IoU)."""
    rows, columns = np.nonzero(mask)
    area, centre_x, centre_y = len(rows), columns.mean(), rows.mean()
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]].astype(np.float32)
    unit_areas = {
        "circle": np.pi,
        "square": 4 * SQUARE_SCALE**2,
        "triangle": 0.75 * np.sqrt(3) * TRIANGLE_SCALE**2,
        "rectangle": 4 * RECTANGLE_SCALES[0] * RECTANGLE_SCALES[1],
    }
    overlaps = {}
    for shape in ALL_SHAPES:
        ideal = signed_distance(shape, np.sqrt(area / unit_areas[shape]), x - centre_x, y - centre_y) < 0
        overlaps[shape] = (ideal & mask).sum() / (ideal | mask).sum()
    best = max(overlaps, key=overlaps.get)
    return best, float(overlaps[best])


@dataclasses.dataclass
class Measurement:
    """What the frames show, and how steadily. Distances in pixels; jitters are relative, frame to frame."""

    colour: str
    shape: str
    direction: str
    background: str
    displacement: float  # from the first to the last frame, along the main direction
    shape_overlap: float  # mean overlap (IoU) of the shape with the ideal outline
    track_residual: float  # root mean square distance of the centres from steady straight motion
    area_jitter: float  # mean absolute change of area from frame to frame, relative to the mean area
    colour_jitter: float  # mean absolute change of the shape's median colour from frame to frame (0..255)
    background_jitter: float  # the same for the background
    visible: float  # share of frames in which something was found

    def correct(self, combination):
        return {
            name: getattr(self, name) == getattr(combination, name)
            for name in ("colour", "shape", "direction", "background")
        }


def measure(frames):
    """Measures colour, shape, direction and background of a clip, and its smoothness."""
    frames = np.asarray(frames)
    found, centres, areas, colours, backgrounds, shapes, overlaps = [], [], [], [], [], [], []
    for number, frame in enumerate(frames):
        background, mask = segment(frame)
        backgrounds.append(background)
        if mask is None or mask.sum() < 20:
            continue
        rows, columns = np.nonzero(mask)
        found.append(number)
        centres.append((columns.mean() + 0.5, rows.mean() + 0.5))
        areas.append(mask.sum())
        colours.append(np.median(frame[mask].astype(np.float32), axis=0))
        shape, overlap = classify_shape(mask)
        shapes.append(shape)
        overlaps.append(overlap)
    background = nearest(np.median(backgrounds, axis=0), BACKGROUNDS)
    background_jitter = float(np.abs(np.diff(backgrounds, axis=0)).mean())
    if len(found) < 3:
        nan = float("nan")
        return Measurement("none", "none", "none", background, 0.0, nan, nan, nan, nan, background_jitter,
                           len(found) / len(frames))  # fmt: skip
    times = np.asarray(found, np.float64)
    centres = np.asarray(centres)
    slope, offset = np.polyfit(times, centres, 1)
    residual = centres - (times[:, None] * slope + offset)
    travel = slope * (len(frames) - 1)
    if np.abs(travel).max() < 6:
        direction = "none"
    elif abs(travel[0]) > abs(travel[1]):
        direction = "right" if travel[0] > 0 else "left"
    else:
        direction = "down" if travel[1] > 0 else "up"
    values, counts = np.unique(shapes, return_counts=True)
    return Measurement(
        nearest(np.median(colours, axis=0), ALL_COLOURS),
        str(values[np.argmax(counts)]),
        direction,
        background,
        float(np.abs(travel).max()),
        float(np.mean(overlaps)),
        float(np.sqrt((residual**2).sum(-1).mean())),
        float(np.abs(np.diff(areas)).mean() / np.mean(areas)),
        float(np.abs(np.diff(colours, axis=0)).mean()),
        background_jitter,
        len(found) / len(frames),
    )


@dataclasses.dataclass
class Fidelity:
    """How well a clip keeps to the image that it was given. Differences are means over the frames, of 255."""

    first_psnr: float  # of the first frame, in dB
    shape_kept: bool
    colour_error: float  # of the shape's median colour
    background_error: float  # of the border's median colour


def compare(frames, still):
    """Compares a clip with the still clip whose frame it was given."""
    image = render_uint8(still, frames=1)[0]
    error = np.mean((frames[0].astype(np.float64) - image) ** 2)
    colours, backgrounds = [], []
    for frame in frames:
        background, mask = segment(frame)
        backgrounds.append(background)
        colours.append(np.median(frame[mask], axis=0) if mask is not None and mask.any() else background)
    return Fidelity(
        float(10 * np.log10(255**2 / max(error, 1e-9))),
        measure(frames).shape == still.shape,
        float(np.abs(np.asarray(colours) - still.colour).mean()),
        float(np.abs(np.asarray(backgrounds) - still.background).mean()),
    )
