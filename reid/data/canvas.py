"""What `reid.data.figure` draws on: lit shapes on a layer of colour and one of shade, larger than the crop."""

import math

import numpy as np
from PIL import Image, ImageDraw

SCALE = 5  # drawn this much larger than the crop, then averaged: PIL's polygons have no antialiasing
NEUTRAL = 128  # of the shade layer: the colour as it is


def mix(a, b, t):
    """The colour at part `t` of the way from `a` to `b`."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def darker(colour, t):
    return mix(colour, (0, 0, 0), t)


class Canvas:
    """A layer of colour and one of shade, multiplied in the end: patterns need not know of light."""

    TONES = ((1.0, 0.66), (0.84, 0.83), (0.62, 0.98), (0.36, 1.1))  # part of the width, brightness: a lit cylinder

    def __init__(self, background, light):
        """background: RGB image, SCALE times the crop's size; light: -1 (from the left) to 1."""
        self.colour, self.shade = background, Image.new("L", background.size, NEUTRAL)
        self.paint, self.dim, self.light = ImageDraw.Draw(self.colour), ImageDraw.Draw(self.shade), light

    def tube(self, points, widths, colour, tone=1.0, ends=True, texture=None):
        """A bent cylinder through `points` with the `widths` there: limbs, trunks, skirts, hair, straps."""
        for part, bright in self.TONES:
            shift, level = self.light * (1 - part) * 0.32, round(NEUTRAL * bright * tone)
            lit = [(x + shift * w, y) for (x, y), w in zip(points, widths)]
            outline = _outline(lit, [w * part for w in widths])
            self.dim.polygon(outline, fill=level)
            if part == 1:
                self._fill(outline, colour, texture)
            for (x, y), w in zip(lit, widths) if ends else ():
                r = w * part / 2
                self.dim.ellipse([x - r, y - r, x + r, y + r], fill=level)
                if part == 1:
                    self.paint.ellipse([x - r, y - r, x + r, y + r], fill=colour)

    def _fill(self, outline, colour, texture):
        if texture is None:
            self.paint.polygon(outline, fill=colour)
            return
        xs, ys = zip(*outline)
        x, y = math.floor(min(xs)), math.floor(min(ys))
        size = (max(2, math.ceil(max(xs)) - x), max(2, math.ceil(max(ys)) - y))
        mask = Image.new("1", size)
        ImageDraw.Draw(mask).polygon([(a - x, b - y) for a, b in outline], fill=1)
        self.colour.paste(texture(size), (x, y), mask)

    def ball(self, x, y, rx, ry, colour, tone=1.0):
        for part, bright in self.TONES:
            a, b, c = rx * part, ry * part, x + self.light * (1 - part) * 0.6 * rx
            self.dim.ellipse([c - a, y - b, c + a, y + b], fill=round(NEUTRAL * bright * tone))
        self.paint.ellipse([x - rx, y - ry, x + rx, y + ry], fill=colour)

    def mark(self, x, y, rx, ry, colour):
        """A flat spot, lit as what is below it: eyes, mouth."""
        self.paint.ellipse([x - rx, y - ry, x + rx, y + ry], fill=colour)

    def shadow(self, x, y, size):
        for part, tone in ((1.0, 0.9), (0.75, 0.78), (0.5, 0.64)):
            a, b, c = 0.17 * size * part, 0.035 * size * part, x - self.light * 0.06 * size
            self.dim.ellipse([c - a, y - b, c + a, y + b], fill=round(NEUTRAL * tone))

    def render(self):
        """float32 [height, width, 3] of the crop's size, 0..255 and a little above."""
        colour, shade = (np.asarray(layer.reduce(SCALE), np.float32) for layer in (self.colour, self.shade))
        return colour * (shade / NEUTRAL)[..., None]


def _outline(points, widths):
    """Polygon around a polyline."""
    left, right = [], []
    for i, ((x, y), w) in enumerate(zip(points, widths)):
        (ax, ay), (bx, by) = points[max(i - 1, 0)], points[min(i + 1, len(points) - 1)]
        length = math.hypot(bx - ax, by - ay) or 1
        nx, ny = (by - ay) / length * w / 2, (ax - bx) / length * w / 2
        left.append((x + nx, y + ny))
        right.append((x - nx, y - ny))
    return left + right[::-1]
