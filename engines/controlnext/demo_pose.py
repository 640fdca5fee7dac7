"""The pose part of the demo checkpoints: a drawn puppet, and two tiny ONNX files with DWPose's shapes that find it.

Each of COCO's 17 joints of the puppet has a disc of its own colour with a grey ring around it. The nets are not trained but
written by hand: a joint is where a solid patch of its colour lies beside that grey. `demo-weights.md`, section 5.

The colours differ enough that H.264 with its halved chroma does not confuse them. Discs have the colours at the RGB cube's
corners and at the middles of its edges and faces (levels 0, 128, 255), rings that of its centre. Everything else has the colours
at the centres of its eighths (levels 64, 192), 110 away from every disc's. Noise or a gradient may contain the discs' colours,
but not in solid patches beside that grey.

Limits: one person, in frames whose short side is at least 128 pixels after H.264 and 48 without. In smaller frames joints are
missed, and noise in frames below 64 may be taken for joints.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from PIL import Image

from engines.controlnext.config import DETECTOR_FILE, POSE_FILE
from engines.controlnext.pose import detector, keypoints
from engines.controlnext.pose.keypoints import BINS_PER_PIXEL, POINTS
from engines.media.video import encode_h264

Colour = tuple[int, int, int]
Floats = NDArray[np.float64]

JOINTS = 17
NOSE = 0
L_EYE, L_EAR, L_SHOULDER, L_ELBOW, L_WRIST, L_HIP, L_KNEE, L_ANKLE = 1, 3, 5, 7, 9, 11, 13, 15
"""Indices of the left joints in COCO's order; the right one is one more. Left is the puppet's own, on the picture's right."""

CODES: tuple[Colour, ...] = (
    *((255, 255, 128), (128, 255, 255), (255, 128, 128), (0, 0, 128), (128, 0, 0)),  # nose, eyes, ears
    *((0, 255, 0), (255, 0, 255), (0, 255, 255), (255, 0, 0), (0, 0, 255), (255, 255, 0)),  # shoulders, elbows, wrists
    *((0, 255, 128), (255, 0, 128), (0, 128, 255), (255, 128, 0), (128, 0, 255), (128, 255, 0)),  # hips, knees, ankles
)
RING: Colour = (128, 128, 128)

FRAMES_PER_DANCE = 24

# --- The puppet ---


@dataclass(frozen=True)
class Puppet:
    """Colours and proportions. Colours use the levels 64 and 192 only (see above); lengths are fractions of its height.

    head, disc: radii. shoulders, hips: half widths. torso, arm, leg: lengths; an arm or a leg is two equal parts. limb: half
    width. size: height as a fraction of the frame's, or less where the frame is narrow. floor: where the ground begins, as a
    fraction of the frame's height from the top.
    """

    shirt: Colour = (192, 64, 64)
    trousers: Colour = (64, 64, 192)
    skin: Colour = (192, 192, 64)
    wall: Colour = (192, 192, 192)
    ground: Colour = (64, 192, 64)
    head: float = 0.15
    shoulders: float = 0.13
    hips: float = 0.09
    torso: float = 0.3
    arm: float = 0.32
    leg: float = 0.46
    limb: float = 0.04
    disc: float = 0.036
    size: float = 0.72
    floor: float = 0.8


DRIVER = Puppet()
"""The puppet of `write_puppet_clip`."""

REFERENCE = Puppet(
    shirt=(64, 192, 192),
    trousers=(192, 64, 192),
    skin=(192, 192, 192),
    wall=(64, 64, 64),
    ground=(64, 64, 192),
    shoulders=0.15,
    hips=0.1,
    torso=0.28,
    leg=0.48,
    limb=0.045,
    size=0.64,
    floor=0.75,
)
"""The puppet of `puppet_image`: it differs from the clip's, and is smaller in its frame."""


@dataclass(frozen=True)
class Stance:
    """Angles in radians. lean: of the spine. arms, legs: the upper and the lower part of the left and of the right one, from
    straight down, outwards. shift: of the pelvis from the frame's middle, in heights of the puppet.
    """

    lean: float
    arms: tuple[tuple[float, float], tuple[float, float]]
    legs: tuple[tuple[float, float], tuple[float, float]]
    shift: tuple[float, float]


def dance(time: float) -> Stance:
    """A stance of the dance. time: in dances; a new dance begins at every whole number."""
    beat = 2 * np.pi * time
    crouch = 0.15 * (1 - np.cos(2 * beat))
    left, right = np.sin(beat), np.sin(beat + 2)  # the arms out of step
    return Stance(
        lean=0.1 * np.sin(beat),
        arms=((1.1 + 0.6 * left, 1.6 + 1.2 * left), (1.1 + 0.6 * right, 1.6 + 1.2 * right)),
        legs=((0.12 + crouch + 0.1 * left, 0.12 - crouch), (0.12 + crouch + 0.1 * right, 0.12 - crouch)),
        shift=(0.04 * np.sin(beat), 0.06 + 0.15 * crouch),
    )


def joints_of(puppet: Puppet, stance: Stance, height: int, width: int) -> Floats:
    """(17, 2): x and y in pixels of a frame of (height, width)."""
    lean = stance.lean
    spine, across = np.array((np.sin(lean), -np.cos(lean))), np.array((np.cos(lean), np.sin(lean)))
    joints = np.zeros((JOINTS, 2))  # in units from the pelvis, then in pixels
    neck = puppet.torso * spine
    head = neck + (puppet.head + 0.03) * spine
    joints[NOSE] = head - 0.15 * puppet.head * spine
    for right, side in ((0, 1.0), (1, -1.0)):
        (upper_arm, lower_arm), (upper_leg, lower_leg) = stance.arms[right], stance.legs[right]
        joints[L_EYE + right] = head + puppet.head * (0.42 * side * across + 0.42 * spine)
        joints[L_EAR + right] = head + puppet.head * 0.92 * side * across
        joints[L_SHOULDER + right] = neck + puppet.shoulders * side * across
        joints[L_ELBOW + right] = joints[L_SHOULDER + right] + puppet.arm / 2 * _down(upper_arm, side)
        joints[L_WRIST + right] = joints[L_ELBOW + right] + puppet.arm / 2 * _down(lower_arm, side)
        joints[L_HIP + right] = puppet.hips * side * across
        joints[L_KNEE + right] = joints[L_HIP + right] + puppet.leg / 2 * _down(upper_leg, side)
        joints[L_ANKLE + right] = joints[L_KNEE + right] + puppet.leg / 2 * _down(lower_leg, side)
    unit = _unit(puppet, height, width)
    return np.array((width / 2, height / 2)) + unit * (np.array(stance.shift) + joints)


def puppet_joints(puppet: Puppet, time: float, height: int, width: int) -> Floats:
    """`joints_of` at a time of its dance."""
    return joints_of(puppet, dance(time), height, width)


def puppet_frame(puppet: Puppet, time: float, height: int, width: int) -> NDArray[np.uint8]:
    """`picture_of` at a time of its dance."""
    return picture_of(puppet, puppet_joints(puppet, time, height, width), height, width)


def picture_of(puppet: Puppet, joints: Floats, height: int, width: int) -> NDArray[np.uint8]:
    """(height, width, 3), uint8, RGB: the puppet with its joints at these places, (17, 2) in pixels."""
    fine = 3  # drawn this many times finer, then averaged: smooth edges, and the same bytes everywhere
    unit = _unit(puppet, height, width) * fine
    joints = (joints + 0.5) * fine - 0.5
    picture = np.full((height * fine, width * fine, 3), puppet.wall, np.uint8)
    picture[round(puppet.floor * height * fine) :] = puppet.ground
    thick = round(2 * puppet.limb * unit)
    for right in (0, 1):
        _line(picture, joints[[L_HIP + right, L_KNEE + right, L_ANKLE + right]], puppet.trousers, thick)
    corners = joints[[L_SHOULDER, L_SHOULDER + 1, L_HIP + 1, L_HIP]]
    cv2.fillConvexPoly(picture, np.rint(corners).astype(np.int32), puppet.shirt)
    _line(picture, corners[[0, 1, 2, 3, 0]], puppet.shirt, thick)
    for right in (0, 1):
        _line(picture, joints[[L_SHOULDER + right, L_ELBOW + right, L_WRIST + right]], puppet.skin, thick)
    ears = joints[[L_EAR, L_EAR + 1]]
    _disc(picture, ears.mean(axis=0), puppet.head * unit, puppet.skin)
    for joint in joints:  # every ring before every disc, so that no ring cuts a disc
        _disc(picture, joint, 1.5 * puppet.disc * unit, RING)
    for joint, colour in zip(joints, CODES, strict=True):
        _disc(picture, joint, puppet.disc * unit, colour)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def write_puppet_clip(path: Path, frames: int, height: int, width: int, fps: int) -> None:
    """An mp4 of `DRIVER` dancing, `FRAMES_PER_DANCE` frames a dance. height, width: even, in pixels."""
    shots = (puppet_frame(DRIVER, i / FRAMES_PER_DANCE, height, width)[None] for i in range(frames))
    path.write_bytes(encode_h264(shots, height, width, fps)[0])


def puppet_image(height: int, width: int, time: float = 0.0) -> bytes:
    """A PNG of `REFERENCE`."""
    png = io.BytesIO()
    Image.fromarray(puppet_frame(REFERENCE, time, height, width)).save(png, format="PNG")
    return png.getvalue()


def _unit(puppet: Puppet, height: int, width: int) -> float:
    """The puppet's height in pixels; with arms stretched it is nearly as wide as high."""
    return puppet.size * min(height, 1.2 * width)


def _down(angle: float, side: float) -> Floats:
    """A direction `angle` radians from straight down, outwards on that side."""
    return np.array((side * np.sin(angle), np.cos(angle)))


def _line(picture: NDArray[np.uint8], points: Floats, colour: Colour, thickness: int) -> None:
    cv2.polylines(picture, [np.rint(points).astype(np.int32)], False, colour, max(thickness, 1))


def _disc(picture: NDArray[np.uint8], centre: Floats, radius: float, colour: Colour) -> None:
    x, y = np.rint(centre).astype(int).tolist()
    cv2.circle(picture, (x, y), max(round(radius), 1), colour, cv2.FILLED)


# --- The nets ---

_OPSET, _IR = 17, 8  # of 2022: old enough for every ONNX Runtime in use
_REACH = 60.0  # levels, of 255: how far from a colour still counts; colours are at least 110 apart
_STEEPNESS = 2.0  # similarity is full up to 0.7 of the reach
_MIN_JOINTS = 5  # fewer kinds of disc may be there by chance
_MARGIN = 1.2  # of the box around the discs, for what they do not cover: the top of the head, hands, feet
_LEVELS = 255.0


def write_demo_pose(folder: Path) -> None:
    """Write `yolox_l.onnx` and `dw-ll_ucoco_384.onnx`, the same bytes every time; `folder` is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DETECTOR_FILE).write_bytes(demo_detector().SerializeToString(deterministic=True))
    (folder / POSE_FILE).write_bytes(demo_keypoints().SerializeToString(deterministic=True))


def demo_detector() -> ModelProto:
    """A net with YOLOX-L's shapes: images (1, 3, 640, 640) to raw cells (1, 8400, 85).

    All cells are zero except the last, which is the box of all discs. With too few kinds of disc its objectness is 0. The net
    computes at half the resolution.
    """
    net = _Graph()
    side = detector.SIDE // 2
    half = net.add("AveragePool", "images", kernel_shape=[2, 2], strides=[2, 2])
    joints = _joint_maps(net, net.add("Div", half, net.const(_LEVELS)), erode=3, dilate=21)  # (1, 17, 320, 320)
    found = net.positive(net.add("ReduceMax", joints, axes=[2, 3], keepdims=0), 0.5)  # (1, 17)
    kinds = net.add("ReduceSum", found, net.ints(1), keepdims=1)  # (1, 1)
    objectness = net.positive(kinds, _MIN_JOINTS - 0.5)
    discs = net.positive(net.add("ReduceMax", joints, axes=[1], keepdims=0), 0.5)  # (1, 320, 320)
    up, down = net.const(np.arange(1, side + 1)), net.const(np.arange(side, 0, -1))
    centres, sizes = [], []
    for other in (1, 2):  # columns, then rows
        occupied = net.add("ReduceMax", discs, axes=[other], keepdims=0)  # (1, 320)
        end = net.add("ReduceMax", net.add("Mul", occupied, up), axes=[1], keepdims=1)  # (1, 1), half pixels
        start = net.add("Sub", net.const(side), net.add("ReduceMax", net.add("Mul", occupied, down), axes=[1], keepdims=1))
        cell = net.const(detector.STRIDES[-1] / 2)  # the coarsest stride, in half-size pixels
        middle = net.add("Mul", net.add("Add", start, end), net.const(0.5))
        extent = net.add("Max", net.add("Sub", end, start), net.const(1.0))
        last = net.const(detector.SIDE // detector.STRIDES[-1] - 1)  # the last cell's column and row, 19
        centres.append(net.add("Sub", net.add("Div", middle, cell), last))
        sizes.append(net.add("Log", net.add("Mul", net.add("Div", extent, cell), net.const(_MARGIN))))
    one = net.const(np.ones((1, 1)))
    row = net.add("Concat", *centres, *sizes, objectness, one, axis=1)  # (1, 6)
    cells = net.add("Unsqueeze", row, net.ints(1))  # (1, 1, 6)
    net.add("Pad", cells, net.ints(0, detector.CELLS - 1, 0, 0, 0, detector.VALUES - 6), name="output")
    return net.model({"images": (1, 3, detector.SIDE, detector.SIDE)}, {"output": (1, detector.CELLS, detector.VALUES)})


def demo_keypoints() -> ModelProto:
    """A net with DWPose's shapes: input (N, 3, 384, 288), normalised, to simcc_x (N, 133, 576) and simcc_y (N, 133, 768).

    The 17 body points peak at their discs' centres, with score m^2 / (m^2 + 4) for m pixels across, about 0.97. Clipping to 1
    instead would give a plateau without a middle. Points 17 to 132 are zero everywhere, which means absent.
    """
    net = _Graph()
    std, mean = (np.reshape(values, (1, 3, 1, 1)) / _LEVELS for values in (keypoints.STD, keypoints.MEAN))
    colours = net.add("Add", net.add("Mul", "input", net.const(std)), net.const(mean))
    joints = _joint_maps(net, colours, erode=3, dilate=33)  # (N, 17, 384, 288)
    triangle = np.convolve(np.ones(5), np.ones(5)) / 25
    blur = net.const(np.tile(triangle, (JOINTS, 1, 1)))
    for name, across in (("simcc_x", 2), ("simcc_y", 3)):
        mass = net.add("ReduceSum", joints, net.ints(across), keepdims=0)  # (N, 17, 288 or 384)
        smooth = net.add("Conv", mass, blur, group=JOINTS, pads=[4, 4])
        scales = net.const(np.array((1, 1, BINS_PER_PIXEL)))
        bins = net.add(
            "Resize", smooth, "", scales, mode="linear", coordinate_transformation_mode="asymmetric"
        )  # bin 2x is pixel x
        square = net.add("Mul", bins, bins)
        score = net.add("Div", square, net.add("Add", square, net.const(4.0)))
        net.add("Pad", score, net.ints(0, 0, 0, 0, POINTS - JOINTS, 0), name=name)
    return net.model(
        {"input": ("batch", 3, keypoints.HEIGHT, keypoints.WIDTH)},
        {
            "simcc_x": ("batch", POINTS, BINS_PER_PIXEL * keypoints.WIDTH),
            "simcc_y": ("batch", POINTS, BINS_PER_PIXEL * keypoints.HEIGHT),
        },
    )


def _joint_maps(net: "_Graph", colours: str, erode: int, dilate: int) -> str:
    """(N, 3, H, W) in [0, 1] to (N, 17, H, W): 1 inside joint k's disc, 0 elsewhere.

    Similarity to colour c is clip(s * (1 - |x - c|^2 / r^2), 0, 1), one 1x1 convolution of (x, x^2). Eroding removes seams, where
    two colours mix to a third. A patch without a ring's grey within half of `dilate` pixels is not a disc.
    """
    targets = np.array((*CODES, RING), np.float64) / _LEVELS
    steep = _STEEPNESS / (_REACH / _LEVELS) ** 2
    weights = np.concatenate([2 * steep * targets, np.full_like(targets, -steep)], axis=1)[..., None, None]  # (18, 6, 1, 1)
    bias = _STEEPNESS - steep * (targets**2).sum(axis=1)
    both = net.add("Concat", colours, net.add("Mul", colours, colours), axis=1)
    raw = net.add("Conv", both, net.const(weights), net.const(bias))
    like = net.add("Clip", raw, net.const(0.0), net.const(1.0))
    codes = net.add("Slice", like, net.ints(0), net.ints(JOINTS), net.ints(1))
    ring = net.add("Slice", like, net.ints(JOINTS), net.ints(JOINTS + 1), net.ints(1))
    solid = net.add("Neg", net.widen(net.add("Neg", codes), erode))
    return net.add("Mul", solid, net.widen(ring, dilate))


class _Graph:
    """Collects an ONNX graph's nodes in order, with their constants, and generates the names."""

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._constants: list[TensorProto] = []

    def add(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def const(self, values: NDArray[Any] | float) -> str:
        return self._constant(np.asarray(values, np.float32))

    def ints(self, *values: int) -> str:
        return self._constant(np.array(values, np.int64))

    def positive(self, values: str, threshold: float) -> str:
        """1.0 above the threshold, else 0.0."""
        return self.add("Cast", self.add("Greater", values, self.const(threshold)), to=TensorProto.FLOAT)

    def widen(self, values: str, window: int) -> str:
        """The maximum over a square window, odd, in two passes."""
        half = window // 2
        tall = self.add("MaxPool", values, kernel_shape=[window, 1], pads=[half, 0, half, 0])
        return self.add("MaxPool", tall, kernel_shape=[1, window], pads=[0, half, 0, half])

    def model(self, inputs: dict[str, Sequence[int | str]], outputs: dict[str, Sequence[int | str]]) -> ModelProto:
        takes, gives = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
            for values in (inputs, outputs)
        )
        graph = helper.make_graph(self._nodes, "puppet", takes, gives, self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR, producer_name="reelray")

    def _constant(self, values: NDArray[np.float32] | NDArray[np.int64]) -> str:
        name = f"constant_{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(values, name))
        return name
