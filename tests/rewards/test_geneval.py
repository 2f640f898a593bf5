"""GenEval's checks on drawn scenes whose right verdicts are known, and at the edges of its thresholds."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from dpo_jax.errors import UserError
from dpo_jax.rewards.geneval import Color, Detection, Task, Verdict, check, read_tasks, relations

SIZE = 96
PAINTS: tuple[Color, ...] = ("red", "blue", "yellow", "green", "black")
LEFT, RIGHT, TOP, BOTTOM = (4, 40, 24, 60), (70, 40, 90, 60), (36, 4, 56, 24), (36, 70, 56, 90)


class Scene:
    """A drawing, the detections that are true of it, and a reader of its colours."""

    def __init__(self, *objects: tuple[Any, ...]):
        """Draw (class, colour, box, score if not 0.95): dogs and cars as ellipses, other classes as rectangles."""
        self.image = Image.new("RGB", (SIZE, SIZE), "white")
        self.detections = [self._draw(*given) for given in objects]

    def _draw(self, label: str, color: str, box: tuple[int, ...], score: float = 0.95) -> Detection:
        left, top, right, bottom = box
        mask = Image.new("1", (SIZE, SIZE))
        shape = "ellipse" if label in ("dog", "car") else "rectangle"
        for canvas, ink in ((self.image, color), (mask, 1)):
            getattr(ImageDraw.Draw(canvas), shape)((left, top, right - 1, bottom - 1), fill=ink)
        return Detection(label, score, (left, top, right, bottom), np.asarray(mask))

    def name_colors(self, label: str, objects: Sequence[Detection]) -> list[Color]:
        """The paint that is nearest to the mean of each object's pixels."""
        pixels, paints = np.asarray(self.image, float), np.asarray([ImageColor.getrgb(paint) for paint in PAINTS])
        means = [pixels[each.mask_HW].mean(0) for each in objects]
        return [PAINTS[int(np.abs(paints - mean).sum(1).argmin())] for mean in means]

    def verdict(self, task: Task) -> Verdict:
        return check(self.detections, task, self.name_colors)


def task(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> Task:
    return Task.model_validate({"tag": tag, "prompt": "a photo", "include": list(include), "exclude": list(exclude)})


def asked(label: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": label, "count": count} | more


SINGLE = task("single_object", asked("bench"))
TWO = task("two_object", asked("bench"), asked("dog"))
THREE = task("counting", asked("dog", 3), exclude=[asked("dog", 4)])
BLUE = task("colors", asked("car", color="blue"))
LEFT_OF = task("position", asked("bench"), asked("dog", position=["left of", 0]))
ATTRIBUTES = task("color_attr", asked("car", color="red"), asked("bench", color="blue"))

bench, dog = ("bench", "yellow", RIGHT), ("dog", "black", LEFT)
dogs = [("dog", "black", box) for box in (LEFT, RIGHT, TOP, BOTTOM)]


@pytest.mark.parametrize(
    ("asks", "objects", "partial", "reason"),
    [
        (SINGLE, [bench], 1, ""),
        (SINGLE, [dog], 0, "found 0 of 1 bench"),
        (TWO, [bench, dog], 1, ""),
        (TWO, [dog], 0.5, "found 0 of 1 bench"),
        (THREE, dogs[:3], 1, ""),
        (THREE, dogs[:2], 2 / 3, "found 2 of 3 dog"),
        (THREE, dogs, 2 / 3, "found 4 dog, fewer than 4 expected"),
        (BLUE, [("car", "blue", LEFT)], 1, ""),
        (BLUE, [("car", "red", LEFT)], 0.5, "0 of 1 car is blue; the colours are red"),
        (BLUE, [], 0, "found 0 of 1 car"),
        (LEFT_OF, [bench, dog], 1, ""),
        (LEFT_OF, [("bench", "red", LEFT), ("dog", "red", RIGHT)], 2 / 3, "dog is not left of bench, but right of"),
        (LEFT_OF, [("bench", "red", BOTTOM), ("dog", "red", TOP)], 2 / 3, "dog is not left of bench, but above"),
        (LEFT_OF, [("bench", "red", LEFT), ("dog", "red", LEFT)], 2 / 3, "dog is not left of bench, but too near"),
        (LEFT_OF, [dog], 1 / 3, "found 0 of 1 bench; there is no bench that dog could be left of"),
        (ATTRIBUTES, [("car", "red", LEFT), ("bench", "blue", RIGHT)], 1, ""),
        (
            ATTRIBUTES,
            [("car", "blue", LEFT), ("bench", "red", RIGHT)],
            0.5,
            "0 of 1 car is red; the colours are blue; 0 of 1 bench is blue; the colours are red",
        ),
        (
            ATTRIBUTES,
            [("car", "red", LEFT), ("bench", "red", RIGHT)],
            3 / 4,
            "0 of 1 bench is blue; the colours are red",
        ),
    ],
)
def test_scenes(asks: Task, objects: list[tuple[Any, ...]], partial: float, reason: str) -> None:
    verdict = Scene(*objects).verdict(asks)
    assert verdict == (not reason, pytest.approx(partial), reason)


def test_more_objects_than_asked_for_are_only_wrong_where_the_task_says_so() -> None:
    crowd = [("bench", "red", box) for box in (LEFT, RIGHT, TOP)]
    assert Scene(*crowd).verdict(SINGLE) == (True, -1, "")  # 1 - |3 - 1| / 1
    to_the_left = Scene(dog, bench, ("bench", "red", TOP, 0.5)).verdict(LEFT_OF)  # the surer bench counts
    assert to_the_left == (True, pytest.approx((0 + 1 + 0) / 3), "")


def test_the_surest_objects_must_have_the_colour() -> None:
    for sure, is_correct in ((0.8, True), (0.6, False)):
        verdict = Scene(("car", "blue", LEFT, sure), ("car", "red", RIGHT, 0.7)).verdict(BLUE)
        assert (verdict.is_correct, verdict.partial) == (is_correct, 0)


@pytest.mark.parametrize(("asks", "threshold"), [(SINGLE, 0.3), (task("counting", asked("bench")), 0.9)])
def test_scores_must_be_above_the_threshold_of_the_tag(asks: Task, threshold: float) -> None:
    at, above = (Scene(("bench", "red", LEFT, score)) for score in (threshold, threshold + 1e-6))
    assert (at.verdict(asks).is_correct, above.verdict(asks).is_correct) == (False, True)


def test_sixteen_objects_of_a_class_count() -> None:
    crowd = [("dog", "black", LEFT)] * 20
    assert Scene(*crowd).verdict(task("counting", asked("dog", 16), exclude=[asked("dog", 17)])).is_correct
    assert Scene(*crowd).verdict(task("counting", asked("dog", 17))).reason == "found 16 of 17 dog"


def box_at(x: float, y: float, width: float = 20, height: float = 20) -> tuple[float, ...]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (8, 0, set()),  # the margin is 0.1 x (20 + 20) = 4, and (8 - 4) / 8 = 0.5 is not more than a half
        (8.01, 0, {"right of"}),
        (-9, 0, {"left of"}),
        (0, -9, {"above"}),
        (0, 9, {"below"}),
        (4, -4, set()),  # nothing is left beyond the margin
        (30, 30, {"right of", "below"}),  # 26 / 42.4 = 0.61
        (-30, 12, {"left of"}),  # 8 / 32.3 = 0.25
        (0, 0, set()),
    ],
)
def test_relations_and_their_margin(x: float, y: float, expected: set[str]) -> None:
    assert relations(box_at(50 + x, 50 + y), box_at(50, 50)) == expected


def test_wide_boxes_have_wide_margins() -> None:
    far, wide = box_at(65, 50), box_at(50, 50, width=100)
    assert relations(far, box_at(50, 50)) == {"right of"}
    assert relations(far, wide) == set()  # 15 - 0.1 x (20 + 100) = 3, a fifth of 15


def test_metadata_is_read_by_prompt(tmp_path) -> None:
    lines = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "position",
            "include": [{"class": "tv remote", "count": 1}, {"class": "cow", "count": 1, "position": ["below", 0]}],
            "prompt": "a photo of a cow below a tv remote",
        },
        {
            "tag": "counting",
            "include": [{"class": "cup", "count": 2}],
            "exclude": [{"class": "cup", "count": 3}],
            "prompt": "a photo of two cups",
        },
    ]
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    tasks = read_tasks(file)
    assert list(tasks) == [line["prompt"] for line in lines]
    assert tasks["a photo of a cow below a tv remote"].include[1].position == ("below", 0)
    assert [(clause.label, clause.count) for clause in tasks["a photo of two cups"].exclude] == [("cup", 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"include": [{"class": "unicorn", "count": 1}]}, "include.0.class: should be one of the 80 classes of COCO"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "include.0.color: input should be 'red', "),
        ({"include": [{"class": "dog", "count": 1, "position": "left of"}]}, "include.0.position: "),
        ({"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]}, "include: entry 0 has a position "),
        ({"include": [{"class": "dog", "count": 0}]}, "include.0.count: "),
        ({"include": []}, "include: "),
        ({"prompt": "a photo of a bench"}, "asks for something else than an earlier line with the prompt 'a photo of "),
    ],
)
def test_lines_that_are_no_task_are_named(tmp_path, changes: dict[str, Any], message: str) -> None:
    good = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    wrong = good | {"include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"} | changes
    file = tmp_path / "metadata.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(wrong)}\n")
    with pytest.raises(UserError) as told:
        read_tasks(file)
    assert str(told.value).startswith(f"{file}, line 2")
    assert message in str(told.value)


def test_a_file_without_lines_is_refused(tmp_path) -> None:
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"has no line; it should be like GenEval's evaluation_metadata\.jsonl"):
        read_tasks(tmp_path / "metadata.jsonl")
