"""GenEval's checks: does an image show the objects, numbers, colours and positions that its prompt asks for?

GenEval is Ghosh et al., arXiv 2310.11513. These are the rules and thresholds of its released
evaluation/evaluate_images.py (github.com/djghosh13/geneval), for detections of any detector. There, suppressing boxes
that overlap is switched off (max_overlap=1), so it is not done here either.

Boxes are (left, top, right, bottom) in pixels; right and bottom lie behind the last pixel.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic
from etils import epath

from dpo_jax.errors import UserError
from dpo_jax.files import read_json_lines

CLASSES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""The 80 classes of COCO in the order of its detectors, as GenEval names them (COCO's mouse is its computer mouse)."""
Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
Relation = Literal["left of", "right of", "above", "below"]

CONFIDENCE = 0.3
"""Detections count above this score."""
COUNTING_CONFIDENCE = 0.9
"""The same for prompts with the tag "counting"."""
MAX_OBJECTS = 16
"""Detections per class that count, the best first."""
MARGIN = 0.1
"""The share of both objects' sizes by which their centres must differ before their relative position counts."""


class Detection(NamedTuple):
    """An object that a detector found."""

    label: str
    """One of `CLASSES`."""
    score: float
    """The detector's confidence, from 0 to 1."""
    box: tuple[float, float, float, float]
    mask_HW: np.ndarray
    """bool, of the image's size: its pixels."""


def _known(name: str) -> str:
    if name not in CLASSES:
        raise ValueError("should be one of the 80 classes of COCO as GenEval names them")
    return name


def _as_pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value  # JSON has no tuples


class Clause(pydantic.BaseModel):
    """Objects that a prompt asks for, or rules out."""

    label: Annotated[str, pydantic.AfterValidator(_known)] = pydantic.Field(alias="class")
    count: Annotated[int, pydantic.Field(ge=1)]
    color: Color | None = None
    position: Annotated[tuple[Relation, int], pydantic.BeforeValidator(_as_pair)] | None = None
    """Where the objects are, seen from those of another clause of `include`, which its number names."""


class Task(pydantic.BaseModel):
    """What a prompt asks for: a line of GenEval's evaluation_metadata.jsonl."""

    prompt: str
    tag: str
    include: Annotated[list[Clause], pydantic.Field(min_length=1)]
    """All of them must be met."""
    exclude: list[Clause] = []
    """None of them may be met."""

    @pydantic.field_validator("include")
    @classmethod
    def _targets_come_before(cls, include: list[Clause]) -> list[Clause]:
        for number, clause in enumerate(include):
            if clause.position and not 0 <= clause.position[1] < number:
                raise ValueError(
                    f"entry {number} has a position relative to {clause.position[1]}, which is not before it"
                )
        return include


class Verdict(NamedTuple):
    is_correct: bool
    """GenEval's result."""
    partial: float
    """Flow-GRPO's reward, at most 1; see `check`."""
    reason: str
    """What is wrong; "" if nothing is."""


def read_tasks(path: epath.PathLike) -> dict[str, Task]:
    """Return the tasks of a file with the lines of GenEval's evaluation_metadata.jsonl, by their prompts.

    Raises UserError for a line that is not a task, and for two different tasks with one prompt; MissingFileError.
    """
    tasks: dict[str, Task] = {}
    lines: Iterator[tuple[int, Task]] = read_json_lines(path, Task)
    for number, task in lines:
        earlier = tasks.setdefault(task.prompt.strip(), task)
        if earlier != task:
            raise UserError(
                f"{path}, line {number} asks for something else than an earlier line with the prompt {task.prompt!r}; "
                "keep one of the two"
            )
    if not tasks:
        raise UserError(f"{path} has no line; it should be like GenEval's evaluation_metadata.jsonl")
    return tasks


def check(
    detections: Sequence[Detection], task: Task, name_colors: Callable[[str, Sequence[Detection]], list[Color]]
) -> Verdict:
    """Return whether an image shows what a prompt asks for, by the objects that were detected in it.

    Of each class, only as many of the surest objects as asked for must have the colour and the position. More objects
    than asked for are an error only where `exclude` says so, as it does for counting.

    The partial reward is that of Flow-GRPO (arXiv 2505.05470), a mean: for each class 1 - |found - asked| / asked,
    which is negative for more than twice the objects; and for each colour or position the share of objects that have
    it, or 0 if there are not exactly as many objects as asked for. Its code (github.com/yifan123/reward-server)
    averages in another 1 for every position that is looked at, even a wrong one, which is left out here.

    Args:
        detections: of one image, in any order.
        task: what the prompt asks for.
        name_colors: called with a class and detections of it, returns the colour of each.
    """
    found = _sure(detections, COUNTING_CONFIDENCE if task.tag == "counting" else CONFIDENCE)
    problems: list[str] = []
    rewards: list[float] = []
    matched: list[list[Detection] | None] = []  # by clause; None for one that is not met
    exact: list[bool] = []  # by clause: whether the number is exactly that asked for
    for clause in task.include:
        objects, label, count = found.get(clause.label, []), clause.label, clause.count
        chosen = objects[:count]
        problem = "" if len(chosen) == count else f"found {len(chosen)} of {count} {label}"
        exact.append(len(objects) == count)
        rewards.append(1 - abs(len(objects) - count) / count)
        if clause.color:
            colors = [] if problem else name_colors(label, chosen)
            right = colors.count(clause.color)
            if right < len(colors):
                problem = f"{right} of {count} {label} is {clause.color}; the colours are {', '.join(colors)}"
            rewards.append(right / count if exact[-1] else 0.0)
        if clause.position:
            relation, target = clause.position
            if not problem:
                problem = _misplaced(chosen, matched[target], relation, task.include[target].label)
            rewards.append(float(not problem and exact[-1] and exact[target]))
        matched.append(None if problem else chosen)
        problems += [problem] if problem else []
    for clause in task.exclude:
        number = len(found.get(clause.label, []))
        if number >= clause.count:
            problems.append(f"found {number} {clause.label}, fewer than {clause.count} expected")
    return Verdict(not problems, sum(rewards) / len(rewards), "; ".join(problems))


def relations(box: Sequence[float], other: Sequence[float]) -> set[Relation]:
    """Return where a box is, seen from another one: nothing, one direction, or two on a diagonal.

    Of the offset between the centres, `MARGIN` times the sum of both boxes' sizes does not count, in each direction. A
    direction holds if what is left of it is more than half of the whole offset.
    """
    ends = np.asarray([box, other], float).reshape(2, 2, 2)  # (box, end, x or y)
    offset = ends[0].mean(0) - ends[1].mean(0)
    sizes = np.abs(ends[:, 1] - ends[:, 0]).sum(0)
    clear = np.maximum(np.abs(offset) - MARGIN * sizes, 0) * np.sign(offset)
    if (np.abs(clear) < 1e-3).all():
        return set()
    x, y = clear / np.linalg.norm(offset)
    holds: dict[Relation, bool] = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, does in holds.items() if does}


def _sure(detections: Sequence[Detection], confidence: float) -> dict[str, list[Detection]]:
    """Return the detections that count, by class, the surest first."""
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda detection: -detection.score):
        of_class = found.setdefault(detection.label, [])
        if detection.score > confidence and len(of_class) < MAX_OBJECTS:
            of_class.append(detection)
    return found


def _misplaced(
    objects: Sequence[Detection], targets: Sequence[Detection] | None, relation: Relation, target: str
) -> str:
    """Return what is wrong with the position of objects; "" if every one has the relation to every target."""
    label = objects[0].label
    if targets is None:
        return f"there is no {target} that {label} could be {relation}"
    for one, other in itertools.product(objects, targets):
        held = relations(one.box, other.box)
        if relation not in held:
            return f"{label} is not {relation} {target}, but {' and '.join(sorted(held)) or 'too near'}"
    return ""
