"""The server of vision-language models: each kind of score against a direct computation, and what it refuses.

The models are a Qwen2-VL with random weights, a few tokens and layers. The processor is that of Qwen2-VL, but for
videos, whose part needs torchvision.
"""

import base64
import contextlib
import importlib.util
import io
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import uvicorn
from etils import epath
from PIL import Image
from safetensors.torch import load_file, save_file

from dpo_jax.models.random_tokenizers import write_qwen_tokenizer
from dpo_jax.rewards import open_judge
from dpo_jax.voting.server import link, listen

SPEC = importlib.util.spec_from_file_location("judge_server", Path(__file__).parents[2] / "launch" / "judge_server.py")
assert SPEC is not None
assert SPEC.loader is not None
server = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(server)

VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = (64, 64), (32, 64), (90, 50)
CAPTIONS = ["a red circle", "", "a photo of {braces} and <tags>"]
WIDTH = 32


def _noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), np.uint8))


IMAGES = [_noise(size) for size in SIZES]
ARRAYS = [np.asarray(image) for image in IMAGES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Qwen2-VL that writes digits only, with `HPSv3.safetensors` for the same config in a folder of its own."""
    path = tmp_path_factory.mktemp("model")
    write_qwen_tokenizer(epath.Path(path))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(VISION, special_tokens=True)
    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 1, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 1},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(
            transformers.Qwen2VLProcessor, "get_attributes", classmethod(lambda cls: ["image_processor", "tokenizer"])
        )
        processor = transformers.Qwen2VLProcessor(
            transformers.AutoImageProcessor.from_pretrained(_image_config(path)), tokenizer, chat_template=CHAT_TEMPLATE
        )
        processor.save_pretrained(path)
        model: Any = transformers.Qwen2VLForConditionalGeneration(config)
        digits = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
        model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - digits)
        model.save_pretrained(path)
        model.resize_token_embeddings(len(tokenizer) + 1)  # of <|Reward|>
        model.save_pretrained(path / "resized")
        state = load_file(path / "resized" / "model.safetensors")
        layers = torch.nn.Linear(WIDTH, 1024), torch.nn.Linear(1024, 16), torch.nn.Linear(16, 2)
        for i, layer in zip((0, 3, 5), layers, strict=True):
            state |= {f"rm_head.{i}.{name}": 4 * value for name, value in layer.state_dict().items()}
        (path / "hpsv3").mkdir()
        save_file(state, path / "hpsv3" / "HPSv3.safetensors")
        yield path


def _image_config(path: Path) -> Path:
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor"}))
    return path


def opened(folder: Path, *arguments: str) -> Any:
    """The judge of the command line."""
    return server.open_judge(server.parse([f"--model={folder}", *arguments]))


@pytest.fixture(scope="module")
def parts(folder: Path) -> SimpleNamespace:
    """The model and the processor, loaded without the server."""
    model: Any = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder)
    return SimpleNamespace(model=model.eval(), processor=transformers.AutoProcessor.from_pretrained(folder))


def prompted(processor: Any, image: Image.Image, text: str) -> dict[str, torch.Tensor]:
    """The model's inputs for one image, so without padding, from a prompt that is written out."""
    prompt = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    return dict(processor(text=[prompt], images=[image], return_tensors="pt"))


@torch.inference_mode()
def probability(parts: SimpleNamespace, image: Image.Image, text: str) -> float:
    logits_V = parts.model(**prompted(parts.processor, image, text)).logits[0, -1]
    yes, no = (logits_V[parts.processor.tokenizer.convert_tokens_to_ids(first)].exp() for first in "YN")
    return float(yes / (yes + no))


def test_yes_no_is_a_softmax_over_two_tokens(folder: Path, parts: SimpleNamespace) -> None:
    judge = opened(folder, "--kind=yes_no", "--batch_size=2")
    questions = [f'Does this figure show "{caption}"? Please answer yes or no.' for caption in CAPTIONS]
    expected = [probability(parts, image, text) for image, text in zip(IMAGES, questions, strict=True)]
    assert judge.score(IMAGES, CAPTIONS) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3  # it depends on what is asked
    assert judge.about.startswith(f"{folder} (cpu, float32); a score is the probability, from 0 to 1, of yes as ")


def test_number_reads_what_the_model_writes(folder: Path, parts: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "task.txt").write_text("Rate it for {caption}.\n")
    judge = opened(
        folder, "--kind=number", f"--template={tmp_path / 'task.txt'}", r"--pattern=(\d)\d(\d)$", "--new_tokens=3"
    )
    expected = []
    digits = parts.processor.tokenizer.convert_tokens_to_ids(list("0123456789"))
    for image, caption in zip(IMAGES, CAPTIONS, strict=True):
        text, written = f"Rate it for {caption}.", ""
        for _ in range(3):
            inputs = prompted(parts.processor, image, text)
            added = parts.processor.tokenizer(written, return_tensors="pt").input_ids.long()
            inputs["input_ids"] = torch.cat([inputs["input_ids"], added], 1)
            for name in ("attention_mask", "mm_token_type_ids"):
                inputs[name] = torch.cat([inputs[name], torch.full_like(added, name == "attention_mask")], 1)
            with torch.inference_mode():
                written += str(int(parts.model(**inputs).logits[0, -1, digits].argmax()))
        expected.append((int(written[0]) + int(written[2])) / 2)
    assert judge.score(IMAGES, CAPTIONS) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("dog (object): 1\nFinal Score: 3.5", 3.5),
        ("Final Score: 1 to 5\n**Final Score:** 4", 4),
        ("Final Score: high", None),
        ("", None),
    ],
)
def test_the_last_number_after_final_score_counts(answer: str, score: float | None) -> None:
    vlm = SimpleNamespace(answers=lambda images, texts, new_tokens: [answer])
    find = server.read_pattern(server.PATTERN)
    assert server.number(vlm, "{caption}", find, 9, -1.0)(IMAGES[:1], ["a"]) == [-1 if score is None else score]
    if score is None:
        with pytest.raises(ValueError, match=r"^--pattern finds no number in the answer '.*' for the caption 'a'$"):
            server.number(vlm, "{caption}", find, 9, None)(IMAGES[:1], ["a"])


def test_hpsv3_is_mu_at_the_reward_token(folder: Path, parts: SimpleNamespace, tmp_path: Path) -> None:
    """Two steps of the original: Pillow resizes to some 256 tokens, and the processor leaves the size as it is."""
    (tmp_path / "task.txt").write_text("Judge {caption}: <|Reward|>\n\nEND\n\n")
    weights = folder / "hpsv3"
    flags = ("--kind=hpsv3", f"--base={folder}", f"--template={tmp_path / 'task.txt'}", "--batch_size=2")
    judge = opened(weights, *flags)

    state = load_file(weights / "HPSv3.safetensors")
    processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    backbone = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder / "resized").eval().model
    expected = []
    for image, caption, size in zip(IMAGES, CAPTIONS, [(448, 448), (644, 336), (336, 616)], strict=True):
        resized = image.resize(size, Image.Resampling.BICUBIC)
        inputs = prompted(processor, resized, f"Judge {caption}: <|Reward|>\n\nEND\n")
        assert inputs["image_grid_thw"].tolist() == [[1, size[1] // 14, size[0] // 14]]
        tokens = inputs["input_ids"][0]
        positions = torch.arange(len(tokens)).expand(3, 1, -1)
        with torch.inference_mode():
            hidden_LD = backbone(**inputs, position_ids=positions).last_hidden_state[0]
        (place,) = torch.nonzero(tokens == len(processor.tokenizer) - 1)
        values = hidden_LD[int(place)].double().numpy()
        for i in (0, 3, 5):
            values = np.maximum(values, 0) if i else values
            weight, bias = (state[f"rm_head.{i}.{name}"].double().numpy() for name in ("weight", "bias"))
            values = weight @ values + bias
        expected.append(values[0])
    assert judge.score(IMAGES, CAPTIONS) == pytest.approx(expected, abs=1e-3)
    assert np.ptp(expected) > 0.1
    assert "a score is HPSv3's mu" in judge.about


COLUMNS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
TABLE = f"""{COLUMNS}
x1,"a dog,  on a rug",,1,0,entity,whole,entity - whole (dog),Is there a dog?
x1,"a dog,  on a rug",,2,1,attribute,color,attribute - color (dog),Is it brown?
x1,"a dog,  on a rug",,3,0,entity,whole,entity - whole (rug),Is there a rug?
x1,"a dog,  on a rug",,4,"1, 3",relation,spatial,relation - spatial (on),Is it on the rug?
x1,"a dog,  on a rug",,5,4,other,count,other - count (legs),Are its legs seen?
x2,a cat,,1,7,entity,whole,entity - whole (cat),Is there a cat?
"""


@pytest.mark.parametrize(
    ("yes", "share"),
    [
        ({1, 2, 3, 4, 5}, 1),
        ({1, 2, 3, 4}, 4 / 5),
        ({2, 3, 4, 5}, 1 / 5),  # no dog: neither brown, nor on the rug, so its legs do not count either
        ({1, 2, 4, 5}, 2 / 5),
        ({1, 2, 3, 5}, 3 / 5),
        (set(), 0),
    ],
)
def test_a_question_counts_only_if_those_above_it_do(tmp_path: Path, yes: set[int], share: float) -> None:
    (tmp_path / "dpg.csv").write_text(TABLE)
    questions = server.read_questions(tmp_path / "dpg.csv")
    dog = questions["a dog, on a rug"]
    assert {number: question.parents for number, question in dog.items()} == {1: (), 2: (1,), 3: (), 4: (1, 3), 5: (4,)}
    assert server.share_of_yes(dog, {number: number in yes for number in dog}) == pytest.approx(share)


def test_questions_are_answered_by_the_model(folder: Path, parts: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "dpg.csv").write_text(TABLE)
    judge = opened(folder, "--kind=yes_no", f"--questions={tmp_path / 'dpg.csv'}", "--batch_size=4")
    questions = server.read_questions(tmp_path / "dpg.csv")
    captions = ["a cat", "a dog, on a rug"]
    expected = []
    for image, caption in zip(IMAGES, captions, strict=False):
        asked = {n: f"{question.text} Please answer yes or no." for n, question in questions[caption].items()}
        is_yes = {n: probability(parts, image, text) > 0.5 for n, text in asked.items()}
        expected.append(server.share_of_yes(questions[caption], is_yes))
    assert judge.score(IMAGES[:2], captions) == expected
    with pytest.raises(ValueError, match=r"^--questions has none about the caption ''; judge images of its captions$"):
        judge.score(IMAGES[:1], [""])


def test_the_answers_go_to_their_images(tmp_path: Path) -> None:
    (tmp_path / "dpg.csv").write_text(TABLE)
    questions = server.read_questions(tmp_path / "dpg.csv")
    asked: list[tuple[Any, str]] = []

    def probabilities(images: Any, texts: Any) -> list[float]:
        asked.extend(zip(images, texts, strict=True))
        return [0.4, *[0.9] * (len(texts) - 1)]

    vlm = SimpleNamespace(yes_probabilities=probabilities)
    score = server.yes_share(vlm, "{question}", questions)
    assert score(IMAGES[:2], ["a cat", "a dog, on a rug"]) == [0, 1]
    assert [text for _, text in asked[:2]] == ["Is there a cat?", "Is there a dog?"]
    assert [image is IMAGES[0] for image, _ in asked] == [True, *[False] * 5]


@pytest.mark.parametrize(
    ("arguments", "files", "message"),
    [
        (["--kind=hpsv3"], {}, "--template is missing; for --kind=hpsv3 set it to a file with HPSv3's text"),
        (["--kind=hpsv3", "--template=t"], {"t": "{caption}"}, "--template=t has no <|Reward|>; write it where"),
        (["--kind=yes_no", "--template=t"], {"t": "Is it good?"}, "--template=t has no {caption}"),
        (["--kind=number", "--questions=q"], {}, "are answered with yes or no; set --kind=yes_no, not number"),
        (["--kind=number", "--pattern=(", "--model=m"], {}, "--pattern=( is not a regular expression"),
        (["--kind=number", r"--pattern=\d"], {}, r"--pattern=\d has no group; put the number into parentheses"),
        (["--kind=yes_no", "--model=./m"], {}, "--model=./m cannot be opened: "),
        (["--kind=yes_no", "--questions=q"], {"q": "text,proposition_id\n"}, "q has no column dependency"),
        (["--kind=yes_no", "--questions=q"], {"q": COLUMNS}, "q has no questions"),
        (
            ["--kind=yes_no", "--questions=q"],
            {"q": TABLE.replace(",7,", ",one,")},
            "q, line 7: proposition_id='1', dependency='one' must be whole numbers",
        ),
    ],
)
def test_what_cannot_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], files: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).write_text(text)
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(message)}[^\n]*\Z"):
        server.open_judge(server.parse(["--model=m", *arguments]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("rm_head.3.bias"), "does not hold HPSv3: it has no rm_head.3.bias"),
        (lambda state: state.pop("model.norm.weight"), "1 names differ, for example language_model.norm.weight"),
        (
            lambda state: state.update({"model.embed_tokens.weight": torch.zeros(9, WIDTH)}),
            "has embeddings [9, 32], but --base={folder} means",
        ),
    ],
)
def test_other_weights_than_hpsv3(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    state = load_file(folder / "hpsv3" / "HPSv3.safetensors")
    change(state)
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=re.escape(message.format(folder=folder))):
        server.load_hpsv3(str(tmp_path), str(folder), "{caption} <|Reward|>", 1)


@contextlib.contextmanager
def serving(judge: Any) -> Iterator[str]:
    """The address of a judge that is served."""
    with listen("127.0.0.1", 0) as listener:
        running = uvicorn.Server(uvicorn.Config(server.make_app(judge), log_level="critical"))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield link(listener, "/")
        finally:
            running.should_exit = True
            thread.join(30)


def test_dpo_jax_asks_it(folder: Path) -> None:
    judge = opened(folder, "--kind=yes_no")
    with serving(judge) as address:
        scores = open_judge(f"http={address}", timeout=60).score(ARRAYS, CAPTIONS)
        with urllib.request.urlopen(address, timeout=60) as response:
            assert response.read().decode() == f"{judge.about}\n"
    assert scores.tolist() == pytest.approx(judge.score(IMAGES, CAPTIONS), abs=1e-5)


def test_one_request_at_a_time_is_with_the_model() -> None:
    at_once, most = [], []

    def score(images: Any, captions: Any) -> list[float]:
        at_once.append(1)
        most.append(len(at_once))
        threading.Event().wait(0.05)
        at_once.pop()
        return [float(len(caption)) for caption in captions]

    with serving(server.Judge(score, "")) as address:
        asked = open_judge(f"http={address}", timeout=60)
        found: list[float] = []
        threads = [
            threading.Thread(target=lambda n=n: found.extend(asked.score(ARRAYS[:1], ["x" * n]))) for n in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(found) == [0, 1, 2, 3]
    assert most == [1] * 4


def _fail(error: Exception) -> Callable[..., list[float]]:
    def score(images: Any, captions: Any) -> list[float]:
        raise error

    return score


PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n and no more").decode()


@pytest.mark.parametrize(
    ("score", "body", "status", "message"),
    [
        (None, "{", 400, "the request is not valid JSON (Expecting property name enclosed in double quotes"),
        (None, "[]", 400, "the request: the whole: input should be a valid dictionary"),
        (None, '{"images": [{"png_base64": ""}]}', 400, "the request: images.0.caption: field required"),
        (None, '{"images": [{"png_base64": "?", "caption": ""}]}', 400, "images.0.png_base64 cannot be read"),
        (None, f'{{"images": [{{"png_base64": "{PNG}", "caption": ""}}]}}', 400, "images.0.png_base64 cannot be read"),
        (_fail(server.UserError("not in\nthe list")), '{"images": []}', 422, "not in the list"),
        (_fail(KeyError("layer")), '{"images": []}', 500, "KeyError: 'layer'"),
        (_fail(torch.OutOfMemoryError("x")), '{"images": []}', 500, "start the server with a smaller --batch_size"),
    ],
)
def test_what_fails_is_told_in_a_sentence(
    score: Callable[..., list[float]] | None, body: str, status: int, message: str
) -> None:
    with serving(server.Judge(score, "")) as address, pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(address, body.encode()), timeout=60)
    assert caught.value.code == status
    assert message in caught.value.read().decode()


def test_a_score_that_is_not_finite_reaches_the_trainer_as_an_error() -> None:
    with serving(server.Judge(lambda images, captions: [float("nan")], "")) as address:
        judge = open_judge(f"http={address}", timeout=60)
        with pytest.raises(
            OSError, match="answers with status 422: the model gives nan for the caption 'a'; check its"
        ):
            judge.score(ARRAYS[:1], ["a"])
