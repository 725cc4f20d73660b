"""Drawn people with names like Market-1501's: a dataset without a download, and pictures that show no real person.

A person is a set of traits (body, hair, clothes, bags), a camera a scene, a light and a lens; a crop shows one person
walking before one camera. Everything is drawn with Python's own random generator, seeded by (seed, pid), (seed, camera) or
the name of the file, so that it is the same on every machine and does not depend on what else is drawn.
"""

import io
import math
import random
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from reid.data.figure import SCALE, Canvas, Figure, mix

WIDTH, HEIGHT = 64, 128  # pixels of a crop, as in Market-1501
CAMERAS = range(1, 7)
SEQUENCES, SEQUENCE_FRAMES, FPS = 3, 60_000, 25
TRAIN_SHARE = 4 / 7

SKIN = ["#f3d3bd", "#ecc0a0", "#e0ac84", "#c98e63", "#a56a43", "#7b4a2d", "#57331f"]
HAIR = ["#17120f", "#1f1713", "#2d1e15", "#4a2f1d", "#6d4526", "#9a6b35", "#cfa561", "#8d8a86", "#7c2f1c"]
CLOTH = ["#f2f0ea", "#dcdcd8", "#9da2a6", "#5d636b", "#2b2d33", "#18191d", "#20304f", "#2f5597", "#7fb0dc", "#c3352f",
         "#8c1f2b", "#e88fa7", "#f3c64b", "#e8832f", "#3f8f52", "#26543a", "#8fc49a", "#6d4a92", "#c8ab82", "#7b5538",
         "#2a8c92", "#f0dcc0"]
BOTTOM = ["#18191d", "#23262d", "#20304f", "#2f4a75", "#5b7aa6", "#9db3cc", "#5d636b", "#9da2a6", "#c8ab82", "#8a7a5c",
          "#4d3a2c", "#e9e6de", "#4b5a3a", "#8c1f2b"]
SHOES = ["#f4f3f0", "#dddddd", "#1c1c1f", "#2b2320", "#6b4a30", "#c3352f", "#2f5597", "#e7b64a"]
BAGS = ["#1d1e22", "#20304f", "#8c1f2b", "#3d6b47", "#7b5538", "#c8ab82", "#d9572f", "#5d636b", "#3b86b8", "#d98ba6"]


def rgb(colour, rng=None, spread=10):
    """Return '#rrggbb' as a tuple, shifted at random by up to `spread` if there is a generator."""
    shift = [rng.randint(-spread, spread) for _ in range(3)] if rng else (0, 0, 0)
    return tuple(min(255, max(0, int(colour[i : i + 2], 16) + s)) for i, s in zip((1, 3, 5), shift))


def make_person(seed, pid):
    """Return the traits of one identity."""
    rng = random.Random(f"person {seed} {pid}")
    female = rng.random() < 0.5
    p = SimpleNamespace(pid=pid, female=female, build=rng.uniform(0.9, 1.18), head=rng.uniform(0.95, 1.1))
    p.skin, p.hair = rgb(rng.choice(SKIN), rng), rgb(rng.choice(HAIR), rng, 6)
    p.style = rng.choice(["long", "long", "ponytail", "bob", "bun", "short"] if female else
                         ["short", "short", "short", "crop", "bald", "bob"])
    p.hat = rng.choice(["cap", "beanie", "brim"]) if rng.random() < 0.22 else None
    p.hat_colour = rgb(rng.choice(CLOTH), rng)
    p.glasses = rng.random() < 0.2
    p.beard = not female and rng.random() < 0.2
    p.top, p.top2 = (rgb(c, rng) for c in rng.sample(CLOTH, 2))
    p.pattern = rng.choice(["plain"] * 6 + ["stripes", "stripes", "plaid", "dots", "print", "print", "blocks", "vertical"])
    p.layer = rng.choice(["shirt"] * 5 + ["jacket", "jacket", "hoodie", "coat"])
    p.sleeve = rng.choice(["short", "short", "long"] + ["none"] * female) if p.layer == "shirt" else "long"
    p.inner = rgb(rng.choice(CLOTH), rng)
    p.bottom = rgb(rng.choice(BOTTOM), rng)
    p.legs = rng.choice(["trousers", "jeans", "shorts", "skirt", "skirt", "longskirt", "dress", "leggings"] if female else
                        ["trousers", "trousers", "jeans", "jeans", "shorts", "shorts"])
    if p.legs == "dress":
        p.bottom = p.top
    p.tights = rgb(rng.choice(["#18191d", "#5d636b"]), rng) if p.legs in ("skirt", "dress") and rng.random() < 0.35 else None
    p.socks = rgb(rng.choice(["#f0f0ee", "#1c1c1f", "#9da2a6"]))
    p.shoes = rgb(rng.choice(SHOES), rng)
    p.bag = rng.choice([None, None, "backpack", "backpack", "crossbody", "handbag", "tote"])
    p.bag_side = rng.choice([-1, 1])
    p.bag_colour = rgb(rng.choice(BAGS), rng)
    p.stride = rng.uniform(0.75, 1.15) * {"longskirt": 0.5, "skirt": 0.85, "dress": 0.85}.get(p.legs, 1)
    p.speed = rng.lognormvariate(math.log(1.3), 0.12)  # metres a second
    return p


def make_camera(seed, camid):
    """Return the scene, light and lens of one camera."""
    rng = random.Random(f"camera {seed} {camid}")
    c = SimpleNamespace(camid=camid, light=rng.choice([-1, 1]) * rng.uniform(0.5, 1), pitch=rng.uniform(0.08, 0.24))
    c.heading = rng.choice([0, 30, 60, 90, 120, 150]) + 10  # degrees between the path and the camera; people go both ways
    c.place = (rng.uniform(0, 120), rng.uniform(0, 120))  # metres
    warm = rng.uniform(-0.1, 0.1)
    c.gain = np.array([1 + warm, 1 + rng.uniform(-0.05, 0.05), 1 - warm]) * rng.uniform(0.78, 1.12)
    c.gamma, c.saturation = rng.uniform(0.8, 1.25), rng.uniform(0.65, 1.1)
    c.haze, c.blur, c.noise = rng.uniform(0, 22), rng.uniform(0.1, 0.5), rng.uniform(1.5, 4.5)
    c.scene = _scene(rng, camid)
    return c


def _scene(rng, camid):
    """Draw a street of 800 x 512 pixels, twice the scale of a crop: a backdrop, a floor, and things in between."""
    w, h, horizon = 800, 512, rng.randint(150, 210)
    ground = rgb(rng.choice(["#a9a69d", "#8d9091", "#b7ab97", "#77797a", "#c4bfb3", "#93a08a"]), rng)
    wall = rgb(rng.choice(["#b8aa96", "#8f6f5c", "#c9c6bd", "#7d8790", "#a0896c", "#d7cfbf"]), rng)
    image = Image.new("RGB", (w, h), wall)
    draw = ImageDraw.Draw(image)
    far, near = mix(ground, (255, 255, 255), 0.18), mix(ground, (0, 0, 0), 0.12)
    for y in range(horizon, h):
        draw.line([(0, y), (w, y)], fill=mix(far, near, (y - horizon) / (h - horizon)))
    _backdrop(draw, rng, ["shop", "green", "brick", "glass", "cars", "houses"][camid % 6], w, horizon, wall)
    joint = mix(ground, (0, 0, 0), 0.22)
    if camid % 3:  # paving, in perspective
        for i in range(-40, 41):
            draw.line([(w / 2 + i * 24, horizon), (w / 2 + i * 130, h)], fill=joint, width=2)
        y, step = horizon + 4.0, 5.0
        while y < h:
            draw.line([(0, y), (w, y)], fill=joint, width=1 + int(step > 20))
            y, step = y + step, step * 1.25
    else:  # a lawn's or a road's edge
        edge = rgb(rng.choice(["#5d7f45", "#6b8d52", "#5b5d60"]), rng)
        draw.polygon([(0, horizon + 20), (w, horizon + 4), (w, horizon + 60), (0, horizon + 120)], fill=edge)
        draw.line([(0, horizon + 122), (w, horizon + 62)], fill=(205, 203, 196), width=5)
    for _ in range(5):  # posts, signs and bins
        x, width = rng.randint(0, w), rng.choice([6, 8, 10, 26])
        top, foot = (horizon - rng.randint(60, 150), horizon + rng.randint(20, 70))
        top = max(top, foot - 60) if width > 20 else top
        draw.rectangle([x, top, x + width, foot], fill=rgb(rng.choice(["#3c4146", "#6f757a", "#2f5d4a", "#8a3a2c"]), rng))
    image = image.filter(ImageFilter.GaussianBlur(1.6))
    grain = _noise(rng, (h // 4, w // 4, 1), 5).repeat(4, 0).repeat(4, 1)
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.9))


def _backdrop(draw, rng, kind, w, horizon, wall):
    if kind in ("shop", "glass", "houses"):
        x = 0
        while x < w:
            width = rng.randint(50, 110)
            pane = rgb(rng.choice(["#4a5a66", "#77909c", "#d8c88f", "#384047", "#93a7ad"]), rng, 16)
            top = rng.randint(10, 40) if kind != "houses" else horizon - 90
            foot = horizon - (4 if kind == "glass" else rng.randint(14, 34))
            draw.rectangle([x, top, x + width, foot], fill=pane, outline=mix(wall, (0, 0, 0), 0.4), width=4)
            draw.line([(x + width * 0.3, foot), (x + width * 0.6, top)], fill=mix(pane, (255, 255, 255), 0.35), width=7)
            if kind == "shop":
                sign = rgb(rng.choice(["#b5372e", "#2f6fa8", "#e3b23c", "#3b7d4f"]), rng)
                draw.rectangle([x - 6, top - 26, x + width + 6, top + 14], fill=sign)
            x += width + rng.randint(8, 40)
    elif kind == "brick":
        for row, y in enumerate(range(0, horizon, 14)):
            for x in range(-30 + (row % 2) * 20, w, 40):
                draw.rectangle([x, y, x + 37, y + 11], fill=mix(wall, (120, 60, 40), rng.uniform(0.2, 0.6)))
    else:
        draw.rectangle([0, 0, w, horizon], fill=rgb("#b9c7cf", rng) if kind == "green" else mix(wall, (60, 70, 60), 0.4))
        for _ in range(150):
            x, y, r = rng.randint(0, w), rng.randint(0, horizon), rng.randint(10, 34)
            draw.ellipse([x - r, y - r, x + r, y + r], fill=mix((46, 74, 40), (126, 152, 84), rng.random()))
        for x in range(rng.randint(0, 90), w, 230) if kind == "cars" else ():
            paint, y = rgb(rng.choice(["#c9ccd0", "#2b2d33", "#8c1f2b", "#dfe0dd", "#2f4a75"]), rng), horizon + 12
            windows = [(x + 28, y - 48), (x + 56, y - 84), (x + 130, y - 84), (x + 160, y - 48)]
            draw.rounded_rectangle([x, y - 50, x + 180, y], 16, fill=paint)
            draw.polygon(windows, fill=mix(paint, (30, 40, 50), 0.7))
            for wheel in (x + 40, x + 142):
                draw.ellipse([wheel - 18, y - 20, wheel + 18, y + 16], fill=(32, 32, 34))


def _noise(rng, shape, sigma):
    return np.random.RandomState(rng.getrandbits(32)).normal(0, sigma, shape)


def draw_crop(person, camera, rng, yaw=0.0, phase=0.0, strangers=(), shift=(0.0, 0.0), zoom=1.0):
    """Draw one detection as a PIL image of 64 x 128 pixels.

    person: traits, or None for a false detection; yaw: degrees, 0 faces the camera; phase of the step: radians; strangers:
    traits of those who may pass behind or before; shift (fractions of the crop's size) and zoom: of a bad detection.
    """
    w, h = WIDTH * SCALE, HEIGHT * SCALE
    part = rng.uniform(0.85, 1.15) * 2  # pixels of the scene for one of the crop
    cw, ch = int(WIDTH * part), int(HEIGHT * part)
    x, y = rng.randint(0, camera.scene.width - cw), rng.randint(0, 60)
    background = camera.scene.crop((x, y, x + cw, y + ch)).resize((w, h), Image.Resampling.NEAREST)
    canvas = Canvas(background, camera.light)

    def stranger(places, foot, size):
        who, x, yaw, phase = rng.choice(strangers), w * rng.choice(places), rng.uniform(0, 360), rng.uniform(0, 6)
        Figure(canvas, who, x, h * foot, h * size, yaw, phase, camera.pitch).draw()

    size, foot = h * rng.uniform(0.84, 0.93) * zoom, h * (rng.uniform(0.94, 0.985) + shift[1])
    middle = w * (0.5 + rng.uniform(-0.06, 0.06) + shift[0])
    if strangers and rng.random() < 0.2:
        stranger([0.05, 0.95], 0.86, 0.72)
    if person:
        Figure(canvas, person, middle, foot, size, yaw, phase, camera.pitch).draw()
    if strangers and rng.random() < 0.08:
        stranger([0.02, 0.98], 1.08, 0.95)
    elif person and rng.random() < 0.07:  # a lamp post before them
        x, grey = w * rng.uniform(0.2, 0.8), rng.randint(50, 120)
        canvas.tube([(x, 0), (x, h)], [w * 0.07] * 2, (grey, grey, grey + 6), ends=False)
    return _photograph(canvas.render(), camera, rng)


def _photograph(pixels, camera, rng):
    """Apply the lens and sensor of a camera to a view (float [h, w, 3], 0 to 255)."""
    grey = pixels.mean(2, keepdims=True)
    pixels = (grey + (pixels - grey) * camera.saturation) * camera.gain * rng.uniform(0.9, 1.1)
    pixels = 255 * (pixels.clip(0, 255) / 255) ** camera.gamma
    pixels = camera.haze + pixels * (1 - camera.haze / 255)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(camera.blur))
    noisy = image + _noise(rng, (HEIGHT, WIDTH, 1), camera.noise) + _noise(rng, (HEIGHT, WIDTH, 3), camera.noise / 3)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def dataset(num_ids, seed):
    """Yield (split, folder, name, JPEG bytes) of `num_ids` people, the first 4/7 of them for training, the rest for testing.

    num_ids: at least 4, two for training and two for testing. As in Market-1501, each person passes some of six cameras, one
    image per camera and test identity is a query, and the gallery has junk (-1, bad detections) and distractors (0000,
    strangers and bare background) as well. The time between two cameras follows from their distance; names contain camera,
    sequence and frame (25 per second).
    """
    cameras = {camid: make_camera(seed, camid) for camid in CAMERAS}
    strangers = [make_person(seed, f"stranger {i}") for i in range(12)]
    names = set()

    def crop(split, pid, camid, seq, frame, box, person, bad=False, yaw=None):
        pid = "-1" if pid == -1 else f"{pid:04d}"
        while (name := f"{pid}_c{camid}s{seq}_{frame:06d}_{box:02d}.jpg") in names:
            frame += 1
        names.add(name)
        rng = random.Random(f"crop {seed} {name}")
        place = {"shift": (rng.uniform(-0.45, 0.45), rng.uniform(-0.3, 0.5)), "zoom": rng.uniform(1, 1.7)} if bad else {}
        yaw = rng.uniform(0, 360) if yaw is None else yaw + rng.gauss(0, 7)
        image = draw_crop(person, cameras[camid], rng, yaw, rng.uniform(0, 2 * math.pi), strangers, **place)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        return split, pid, name, file.getvalue()

    for pid in range(1, num_ids + 1):
        person, train = make_person(seed, pid), pid <= round(num_ids * TRAIN_SHARE)
        rng = random.Random(f"walk {seed} {pid}")
        for camid, seq, frames, yaw in _walk(person, cameras, rng):
            query = None if train else rng.choice(frames)
            for box, frame in enumerate(frames, 1):
                split = "train" if train else "query" if frame == query else "gallery"
                yield crop(split, pid, camid, seq, frame, 0 if split == "query" else box, person, yaw=yaw)
            if not train and rng.random() < 0.4:
                yield crop("gallery", -1, camid, seq, frames[-1] + rng.randint(1, 9), 9, person, bad=True)
        if not train:
            for stranger in (None, rng.choice(strangers)):
                camid, seq, frame = rng.choice(CAMERAS), rng.randint(1, SEQUENCES), rng.randrange(SEQUENCE_FRAMES)
                yield crop("gallery", 0, camid, seq, frame, 5, stranger)


def _walk(person, cameras, rng):
    """Yield (camera, sequence, frames, yaw) of each camera that a person passes on a straight way."""
    angle = rng.uniform(0, 2 * math.pi)
    passed = sorted(rng.sample(list(cameras.values()), rng.choice([2, 3, 4, 4, 5, 5, 6])),
                    key=lambda camera: camera.place[0] * math.cos(angle) + camera.place[1] * math.sin(angle))
    seq, time, last = rng.randint(1, SEQUENCES), rng.uniform(0, 0.75) * SEQUENCE_FRAMES / FPS, passed[0]
    for camera in passed:
        time += math.dist(last.place, camera.place) / person.speed + rng.uniform(3, 9)
        step = rng.randint(15, 30)
        frames = [int(time * FPS) + i * step for i in range(rng.choice([2, 3, 3, 4, 5]))]
        yield camera.camid, seq, frames, camera.heading + rng.choice([0, 180])
        last = camera
