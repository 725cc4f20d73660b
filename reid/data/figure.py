"""Draw a person as a walking 3-d stick figure of lit tubes and balls, and what it is drawn on.

Body units: the height is 1, x points to the person's left, y up, z ahead. Yaw 0 faces the camera.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

SCALE = 5  # drawn this much larger than the crop, then averaged: PIL's polygons have no antialiasing
NEUTRAL = 128  # value of the shade layer that leaves the colour as it is


def mix(a, b, t):
    """Return the colour at fraction `t` between `a` and `b`."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def darker(colour, t):
    return mix(colour, (0, 0, 0), t)


class Canvas:
    """A layer of colour and one of shade, which are multiplied in the end, so that patterns do not depend on the light."""

    TONES = ((1.0, 0.66), (0.84, 0.83), (0.62, 0.98), (0.36, 1.1))  # (fraction of the width, brightness) of a lit cylinder

    def __init__(self, background, light):
        """background: RGB image, SCALE times the crop's size; light: -1 (from the left) to 1."""
        self.colour, self.shade = background, Image.new("L", background.size, NEUTRAL)
        self.paint, self.dim, self.light = ImageDraw.Draw(self.colour), ImageDraw.Draw(self.shade), light

    def tube(self, points, widths, colour, tone=1.0, ends=True, texture=None):
        """Draw a bent cylinder through `points`, `widths` wide there: limbs, trunks, skirts, hair, straps."""
        for part, bright in self.TONES:
            shift, level = self.light * (1 - part) * 0.32, round(NEUTRAL * bright * tone)
            lit = [(x + shift * w, y) for (x, y), w in zip(points, widths)]
            outline = _outline(lit, [w * part for w in widths])
            self.dim.polygon(outline, fill=level)
            if part == 1 and texture:
                self._paste(outline, texture)
            elif part == 1:
                self.paint.polygon(outline, fill=colour)
            for (x, y), w in zip(lit, widths) if ends else ():
                r = w * part / 2
                self.dim.ellipse([x - r, y - r, x + r, y + r], fill=level)
                if part == 1:
                    self.mark(x, y, r, r, colour)

    def _paste(self, outline, texture):
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
        self.mark(x, y, rx, ry, colour)

    def mark(self, x, y, rx, ry, colour):
        """Draw a flat spot, lit like what is below it: eyes, mouth."""
        self.paint.ellipse([x - rx, y - ry, x + rx, y + ry], fill=colour)

    def shadow(self, x, y, size):
        for part, tone in ((1.0, 0.9), (0.75, 0.78), (0.5, 0.64)):
            a, b, c = 0.17 * size * part, 0.035 * size * part, x - self.light * 0.06 * size
            self.dim.ellipse([c - a, y - b, c + a, y + b], fill=round(NEUTRAL * tone))

    def render(self):
        """Return the picture, float32 [height, width, 3] of the crop's size, from 0 to a little above 255."""
        colour, shade = (np.asarray(layer.reduce(SCALE), np.float32) for layer in (self.colour, self.shade))
        return colour * (shade / NEUTRAL)[..., None]


def _outline(points, widths):
    """Return the polygon around a polyline."""
    left, right = [], []
    for i, ((x, y), w) in enumerate(zip(points, widths)):
        (ax, ay), (bx, by) = points[max(i - 1, 0)], points[min(i + 1, len(points) - 1)]
        length = math.hypot(bx - ax, by - ay) or 1
        nx, ny = (by - ay) / length * w / 2, (ax - bx) / length * w / 2
        left.append((x + nx, y + ny))
        right.append((x - nx, y - ny))
    return left + right[::-1]


class Figure:
    """One person in one pose on a canvas. `draw` draws it.

    p: traits of `synthetic.make_person`; x0, foot, size: position and height in pixels of the canvas; yaw: degrees; phase of
    the step: radians; pitch: of the camera.
    """

    def __init__(self, canvas, p, x0, foot, size, yaw, phase, pitch):
        self.canvas, self.p, self.x0, self.foot, self.size = canvas, p, x0, foot, size
        self.phase, self.pitch = phase, pitch
        self.sin, self.cos = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
        self.front = self.cos > -0.15
        self.shoulder = (0.092 if p.female else 0.106) * (0.6 + 0.4 * p.build)
        self.bob = 0.008 * math.cos(2 * phase)
        self.skirt = p.legs in ("skirt", "dress", "longskirt")

    def at(self, x, y, z=0.0):
        """Project body units to pixels: orthographic, looking down a little."""
        near = z * self.cos - x * self.sin
        return (self.x0 + (x * self.cos + z * self.sin) * self.size,
                self.foot - (y + self.bob) * self.size + near * self.size * self.pitch)

    def tube(self, points, widths, colour, tone=1.0, **options):
        self.canvas.tube([self.at(*q) for q in points], [w * self.size for w in widths], colour, tone, **options)

    def body(self, rows, colour, tone=1.0):
        """Draw a tube of elliptic cross-sections: rows of (x, y, z, half width, half depth)."""
        self.tube([row[:3] for row in rows], [self.girth(*row[3:]) for row in rows], colour, tone, ends=False)

    def girth(self, wide, deep):
        """Return the visible width of an elliptic cross-section."""
        return 2 * math.hypot(wide * self.cos, deep * self.sin) * self.p.build

    def draw(self):
        """Draw all parts, from far to near."""
        sides = sorted((-1, 1), key=lambda side: -side * self.sin)
        self.canvas.shadow(self.x0, self.foot, self.size)
        if self.front:
            self.back()
        self.arm(sides[0], 0.84)
        if abs(self.sin) < 0.5:  # seen from the front or back, the trunk hides both shoulders' inner half
            self.arm(sides[1], 0.95)
        self.hips()
        for side, tone in zip(sorted((-1, 1), key=self.ankle_depth), (0.86, 1.0)):
            self.leg(side, tone)
        self.trunk()
        self.head()
        if not self.front:
            self.back()
        self.straps()
        if abs(self.sin) >= 0.5:
            self.arm(sides[1], 1.0)
        self.handbag()

    def swing(self, side):
        return side * 0.42 * self.p.stride * math.sin(self.phase)

    def ankle_depth(self, side):
        return math.sin(self.swing(side)) * self.cos * 0.45 - side * 0.05 * self.sin

    def leg(self, side, tone):
        p, b = self.p, self.p.build
        angle = self.swing(side)
        bend = 0.25 + 0.45 * max(0.0, side * math.cos(self.phase)) if angle < 0.15 else 0.08
        hip = (side * (0.048 if p.female else 0.045) * b, 0.5, 0.0)
        knee = (hip[0] * 0.95, 0.5 - 0.235 * math.cos(angle), 0.235 * math.sin(angle))
        ankle = (hip[0] * 0.8, knee[1] - 0.215 * math.cos(angle - bend), knee[2] + 0.215 * math.sin(angle - bend))
        if p.legs in ("trousers", "jeans", "leggings"):
            wide = {"trousers": 0.02, "jeans": 0.012, "leggings": 0.0}[p.legs]
            self.tube([hip, knee, ankle], [0.096 * b + wide, 0.07 * b + wide, 0.046 + wide * 1.4], p.bottom, tone)
        else:
            self.tube([hip, knee, ankle], [0.092 * b, 0.064 * b, 0.04], p.tights or p.skin, tone)
            if p.legs == "shorts":
                self.tube([hip, _between(knee, hip, 0.1)], [0.105 * b, 0.1 * b], p.bottom, tone, ends=False)
            if not p.tights:
                self.tube([_between(ankle, knee, 0.16), ankle], [0.045, 0.042], p.socks, tone, ends=False)
        x, y, z = ankle
        heel, toe = (x, max(y - 0.032, 0.012), z - 0.02), (x * 1.15, max(y - 0.036, 0.012), z + 0.085)
        self.tube([heel, toe], [0.046, 0.036], p.shoes, tone)

    def arm(self, side, tone):
        p, b = self.p, self.p.build
        holds = p.bag == "tote" and side == p.bag_side
        angle = -self.swing(side) * (0.3 if holds else 0.85)
        bend = 0.12 if holds else 0.28 + 0.3 * max(0.0, angle)
        top = (side * self.shoulder * b, 0.79, 0.0)
        elbow = (top[0] + side * 0.022, 0.79 - 0.165 * math.cos(angle), 0.165 * math.sin(angle))
        wrist = (elbow[0] + side * 0.004, elbow[1] - 0.145 * math.cos(angle + bend), elbow[2] + 0.145 * math.sin(angle + bend))
        hand = _between(wrist, elbow, -0.22)
        if holds:
            x, y, z = hand
            self.tube([(x, y, z), (x, y - 0.06, z)], [0.008, 0.008], p.bag_colour)
            self.body([(x, y - 0.05, z, 0.03, 0.055), (x, y - 0.17, z, 0.035, 0.06)], p.bag_colour)
        self.tube([top, elbow, wrist], [0.054 * b, 0.044 * b, 0.034], p.skin, tone)
        self.tube([wrist, hand], [0.036, 0.04], p.skin, tone)
        sleeve = p.top2 if p.pattern == "blocks" and p.layer == "shirt" else p.top
        thick = 0.0 if p.layer == "shirt" else 0.01
        if p.sleeve == "long":
            self.tube([top, elbow, wrist], [0.062 * b + thick, 0.052 * b + thick, 0.044 + thick], sleeve, tone)
        elif p.sleeve == "short":
            points = [top, _between(elbow, top, 0.5), _between(elbow, top, 0.25)]
            self.tube(points, [0.062 * b, 0.066 * b, 0.068 * b], sleeve, tone)

    def hips(self):
        """Draw what the legs then cover."""
        if not self.skirt:
            wide = self.girth(0.085 if self.p.female else 0.08, 0.068)
            widths = [wide * 0.9, wide, wide * 0.72]
            self.tube([(0, 0.58, 0), (0, 0.5, 0), (0, 0.455, 0)], widths, self.p.bottom, 0.97, ends=False)

    def trunk(self):
        p, s = self.p, self.shoulder
        hips, waist, chest = (0.088, 0.07, 0.084) if p.female else (0.082, 0.08, 0.096)
        if self.skirt:
            hem, flare = (0.1, 0.12) if p.legs == "longskirt" else (0.3, 0.118)
            sway = 0.02 * math.sin(self.phase)
            self.body([(0, 0.6, 0, waist, 0.055), (0, 0.5, 0, hips * 1.1, 0.08), (0, hem, sway, flare, 0.105)], p.bottom)
        low = {"shirt": 0.475, "jacket": 0.45, "hoodie": 0.46, "coat": 0.3}[p.layer]
        low += 0.06 if p.layer != "coat" and self.skirt else 0
        thick = 1.0 if p.layer == "shirt" else 1.08
        rows = [(0.84, 0.04, 0.04), (0.826, s * 0.66, 0.052), (0.808, s * 1.06, 0.062), (0.78, s * 1.1, 0.068),
                (0.72, chest, 0.078 if p.female else 0.072), (0.6, waist, 0.06), (0.52, hips * 1.02, 0.068),
                (low, hips * (1.04 if low > 0.4 else 1.2), 0.072 if low > 0.4 else 0.085)]
        self.tube([(0, y, 0.012 * (y > 0.6)) for y, _, _ in rows], [self.girth(a, d) * thick for _, a, d in rows],
                  p.top, ends=False, texture=self.cloth)
        if p.layer == "hoodie":
            x, y = self.at(0, 0.828, -0.02)
            self.canvas.ball(x, y, 0.068 * self.size, 0.026 * self.size, darker(p.top, 0.12))

    def cloth(self, size):
        """Return an image of the cloth of the top: its pattern, and what only the front has."""
        p, (w, h), front, middle = self.p, size, self.cos > 0.1, size[0] * (0.5 + 0.42 * self.sin)
        image = Image.new("RGB", size, p.top)
        draw = ImageDraw.Draw(image)
        step = max(5, h // 9)
        if p.pattern in ("stripes", "plaid"):
            for y in range(0, h, step):
                draw.rectangle([0, y, w, y + step * (0.45 if p.pattern == "stripes" else 0.3)], fill=p.top2)
        if p.pattern in ("vertical", "plaid"):
            ink = p.top2 if p.pattern == "vertical" else mix(p.top, p.top2, 0.55)
            for x in range(int(self.sin * step), w, step):
                draw.rectangle([x, 0, x + step * 0.3, h], fill=ink)
        if p.pattern == "dots":
            for row, y in enumerate(range(step // 2, h, step)):
                for x in range((row % 2) * step // 2, w, step):
                    draw.ellipse([x, y, x + step * 0.5, y + step * 0.5], fill=p.top2)
        if p.pattern == "blocks":
            draw.rectangle([0, h * 0.42, w, h], fill=p.top2)
        if front and p.pattern == "print":
            draw.rounded_rectangle([middle - w * 0.24, h * 0.2, middle + w * 0.24, h * 0.46], w // 12, fill=p.top2)
        if front and p.layer in ("jacket", "coat"):  # open: the shirt
            a, b = w * 0.2, w * 0.1
            draw.polygon([(middle - a, 0), (middle + a, 0), (middle + b, h), (middle - b, h)], fill=p.inner)
        if front and p.layer == "hoodie":  # zip and pocket
            draw.line([(middle, 0), (middle, h)], fill=darker(p.top, 0.4), width=max(2, w // 30))
            draw.rounded_rectangle([middle - w * 0.3, h * 0.66, middle + w * 0.3, h * 0.9], 6, fill=darker(p.top, 0.15))
        return image

    def head(self):
        p, c = self.p, self.canvas
        self.tube([(0, 0.88, 0.005), (0, 0.825, 0)], [0.05, 0.06], p.skin, 0.84)
        x, y = self.at(0, 0.925, 0.015)
        side = abs(self.sin)
        r, tall = 0.054 * self.size * p.head * (1 + 0.12 * side), 0.068 * self.size * p.head
        short = p.style in ("short", "crop")  # leaves the temples free
        lift, thick = (0.24, 1.0) if short else (0.15, 1.06)
        c.ball(x, y - lift * tall, r * thick, tall * (0.94 if short else 1.02), p.skin if p.style == "bald" else p.hair)
        if self.cos > -0.55:  # some of the face is visible
            seen = (self.cos + 0.55) / 1.55
            fx = x + self.sin * r * (0.34 if self.cos > 0 else 0.55)
            fw = r * (0.52 + 0.34 * seen) * (1 - 0.25 * side) * (1.12 if short else 1)
            c.ball(fx, y + tall * 0.16, fw, tall * 0.84, p.skin)
            if self.cos > -0.1:
                self.face(fx, y, fw, tall)
        elif short:
            c.ball(x, y + tall * 0.7, r * 0.7, tall * 0.3, p.skin, 0.85)
        if p.style == "bun":
            c.ball(*self.at(0, 0.985, -0.035), 0.03 * self.size, 0.028 * self.size, p.hair)
        if p.hat:
            self.hat(x, y, r, tall)

    def face(self, x, y, w, tall):
        p, c = self.p, self.canvas
        for side in (-1, 1):
            ex = x + w * (0.42 * side * max(self.cos, 0.25) + 0.3 * self.sin)
            if abs(ex - x) < w * 0.85:
                c.mark(ex, y - tall * 0.03, w * 0.2, tall * 0.05, mix(p.hair, p.skin, 0.45))
                c.mark(ex, y + tall * 0.14, w * 0.13, tall * 0.08, mix(p.skin, (30, 15, 10), 0.7))
                if p.glasses:
                    c.paint.ellipse([ex - w * 0.3, y - tall * 0.02, ex + w * 0.3, y + tall * 0.3], outline=(60, 55, 52), width=1)
        mx = x + w * 0.3 * self.sin
        if p.beard:
            c.ball(mx, y + tall * 0.76, w * 0.72, tall * 0.26, p.hair)
        c.mark(mx, y + tall * 0.4, w * 0.12, tall * 0.06, mix(p.skin, (130, 70, 50), 0.35))
        c.mark(mx, y + tall * 0.63, w * 0.26, tall * 0.05, mix(p.skin, (160, 40, 45), 0.5))

    def back(self):
        """Draw long hair and a backpack: under the body from the front, over it from behind."""
        p, z = self.p, -0.09
        if p.style in ("long", "bob"):
            low = 0.74 if p.style == "long" else 0.85
            self.tube([(0, 0.96, -0.01), (0, 0.9, -0.02), (0, low, -0.035)],
                      [0.1 * p.head, self.girth(0.062, 0.06), self.girth(0.058, 0.035)], p.hair)
        elif p.style == "ponytail":
            self.tube([(0, 0.95, -0.055), (0, 0.9, -0.08), (0, 0.79, -0.065)], [0.03, 0.045, 0.022], p.hair)
        if p.bag == "backpack":
            rows = ((0.82, 0.05, 0.035), (0.78, 0.08, 0.05), (0.62, 0.085, 0.06), (0.57, 0.07, 0.05))
            self.body([(0, y, z, wide, deep) for y, wide, deep in rows], p.bag_colour, 0.95)
            if not self.front:
                self.body([(0, y, z - 0.03, 0.055, 0.02) for y in (0.67, 0.6)], darker(p.bag_colour, 0.3))

    def hat(self, x, y, r, tall):
        p, c = self.p, self.canvas
        dark = darker(p.hat_colour, 0.25)
        if p.hat == "brim":
            c.ball(x, y - tall * 0.42, r * 1.8, tall * 0.22, dark)
        rows = ((-1.22, 0.7), (-1.1, 1.45), (-0.85, 1.95), (-0.55, 2.2), (-0.3, 2.24))
        c.tube([(x, y + tall * up) for up, _ in rows], [r * wide for _, wide in rows], p.hat_colour, ends=False)
        if p.hat == "beanie":
            c.tube([(x, y - tall * 0.5), (x, y - tall * 0.24)], [r * 2.3] * 2, dark, ends=False)
        if p.hat == "cap" and self.cos > -0.6:
            peak = r * (0.55 + 0.35 * abs(self.cos))
            c.ball(x + self.sin * r * 1.05, y - tall * (0.28 - 0.1 * self.cos), peak, tall * 0.12, dark)

    def straps(self):
        p, a, dark = self.p, self.shoulder, darker(self.p.bag_colour, 0.2)
        if p.bag == "backpack" and self.front:
            for s in (-a, a):
                self.tube([(s * 0.55, 0.828, 0), (s * 0.6, 0.72, 0.065), (s * 0.75, 0.62, 0.04)], [0.022] * 3, dark)
        elif p.bag == "crossbody":
            z = 0.065 if self.front else -0.065
            self.tube([(-p.bag_side * a * 0.6, 0.825, 0), (0, 0.68, z), (p.bag_side * 0.1, 0.52, 0)], [0.016] * 3, dark)
        elif p.bag == "handbag" and p.bag_side * self.sin < 0.75:
            self.tube([(p.bag_side * a * 0.95, 0.815, 0), (p.bag_side * 0.115, 0.55, 0.01)], [0.014] * 2, dark)

    def handbag(self):
        p = self.p
        if p.bag in ("handbag", "crossbody") and p.bag_side * self.sin < 0.75:  # else the body hides it
            x, y = p.bag_side * 0.115, 0.55 if p.bag == "handbag" else 0.5
            self.body([(x, y, 0, 0.03, 0.06), (x, y - 0.11, 0, 0.04, 0.075)], p.bag_colour)


def _between(a, b, t):
    return tuple(u + (v - u) * t for u, v in zip(a, b))
