"""Serve a vision-language model as a judge of dpo_jax: VQAScore, DPG-Bench's questions, UnifiedReward, HPSv3.

  python launch/judge_server.py --kind=yes_no --model=Qwen/Qwen2.5-VL-7B-Instruct
  dpo_jax score --data=data/mine --judge=http=http://127.0.0.1:8000/ --name=vqascore

The model runs in PyTorch: in bfloat16 on a GPU if there is one, otherwise in float32. It may run on another machine, or
in another environment, than the training: `pip install -e ".[judge-server]"` installs what it needs. There is no
password. Only this machine can ask, unless --host says otherwise; `ssh -N -L 8000:127.0.0.1:8000 MACHINE` lets another
machine ask this one.

Kinds of scores:

  yes_no   The probability of "Yes" as the answer to a question about the caption, in which "Yes" and "No" share all
           probability (VQAScore, arXiv 2404.01291). --questions=FILE.csv asks a list's questions about each caption
           instead (DPG-Bench, arXiv 2403.05135; DSG, arXiv 2310.18235). The score is then the share of questions that
           are answered with "Yes". A question counts as "No" if one that it depends on does.
  number   The number in an answer that the model writes (UnifiedReward, arXiv 2503.05236). --pattern says where it is.
  hpsv3    HPSv3 (arXiv 2508.03789): mu, the mean of the reward's distribution.
"""

import argparse
import asyncio
import base64
import binascii
import contextlib
import csv
import functools
import io
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from typing_extensions import TypedDict

from dpo_jax import cli
from dpo_jax.data.images import DamagedImage, decode
from dpo_jax.errors import UserError
from dpo_jax.files import conform, decode_text, parse_json, read_text
from dpo_jax.hub import errors_told

try:
    import torch
    import transformers
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    from dpo_jax.voting.server import link, listen
except ModuleNotFoundError as missing:
    sys.exit(f'error: the package {missing.name} is not installed; run pip install -e ".[judge-server]"')

YES_NO = 'Does this figure show "{caption}"? Please answer yes or no.'
"""The question of VQAScore."""
QUESTION = "{question} Please answer yes or no."
RATING = (
    'This image was made for the caption "{caption}". Rate from 1 to 5 how well it shows what the caption says and how '
    'good it looks. End with "Final Score: " and the number.'
)
PATTERN = r"Final Score:\W*(\d+(?:\.\d+)?)"
HPSV3_FILE = "HPSv3.safetensors"
HPSV3_BASE = "Qwen/Qwen2-VL-7B-Instruct"
HPSV3_PIXELS = 256 * 28 * 28
REWARD = "<|Reward|>"

Scorer = Callable[[Sequence[Image.Image], Sequence[str]], list[float]]
"""A function (RGB images, one caption per image) -> one score per image. Raises UserError for what it cannot judge."""


class Judge(NamedTuple):
    """What is served."""

    score: Scorer
    about: str
    """The model and what a score means, in one line."""


class Vlm:
    """A vision-language model of transformers with its processor."""

    def __init__(self, model: Any, processor: Any, batch_size: int, pixels: int | None = None):
        """Keep a model on its device.

        Args:
            model: of transformers, in evaluation mode.
            processor: with a chat template.
            batch_size: images at a time.
            pixels: area that Qwen2-VL's processor resizes every image to. Default: the processor's own bounds.
        """
        self.model, self.processor, self.batch_size = model, processor, batch_size
        size = {"shortest_edge": pixels, "longest_edge": pixels}
        self._images: dict[str, Any] = {} if pixels is None else {"images_kwargs": {"size": size}}
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token

    def batches(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Iterator[Mapping[str, torch.Tensor]]:
        """Yield the model's inputs for the messages of a user, each an image and a text, before the answer begins."""
        for start in range(0, len(texts), self.batch_size):
            part = slice(start, start + self.batch_size)
            contents = [
                [{"type": "image", "image": image}, {"type": "text", "text": text}]
                for image, text in zip(images[part], texts[part], strict=True)
            ]
            inputs = self.processor.apply_chat_template(
                [[{"role": "user", "content": content}] for content in contents],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left", **self._images},
            )
            yield inputs.to(self.model.device, dtype=self.model.dtype)

    def yes_probabilities(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Return P(Yes) / (P(Yes) + P(No)) for the first token of each answer."""
        tokens = [self.processor.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No")]
        found = []
        for inputs in self.batches(images, texts):
            answer = self._generate(inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
            found += answer.logits[0][:, tokens].float().softmax(-1)[:, 0].tolist()
        return found

    def answers(self, images: Sequence[Image.Image], texts: Sequence[str], new_tokens: int) -> list[str]:
        """Return the most probable answers, token by token, of at most `new_tokens` tokens."""
        found = []
        for inputs in self.batches(images, texts):
            tokens_BL = self._generate(inputs, max_new_tokens=new_tokens)
            written_BL = tokens_BL[:, inputs["input_ids"].shape[1] :]
            found += self.processor.tokenizer.batch_decode(written_BL, skip_special_tokens=True)
        return found

    @torch.inference_mode()
    def _generate(self, inputs: Mapping[str, torch.Tensor], **settings: Any) -> Any:
        return self.model.generate(**inputs, do_sample=False, **settings)


def yes_no(vlm: Vlm, template: str) -> Scorer:
    """Return VQAScore with any model (arXiv 2404.01291), normalised over "Yes" and "No".

    Args:
        vlm: answers the questions.
        template: the question, with {caption} in it.
    """

    def score(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        return vlm.yes_probabilities(images, [template.replace("{caption}", caption) for caption in captions])

    return score


class Question(NamedTuple):
    text: str
    parents: tuple[int, ...]
    """Numbers of the questions that it depends on."""


Questions = Mapping[str, Mapping[int, Question]]
"""The questions about each caption, by their numbers. Captions are written with single spaces."""


def yes_share(vlm: Vlm, template: str, questions: Questions) -> Scorer:
    """Return the score of DPG-Bench (as dpg_bench/compute_dpg_bench.py of github.com/TencentQQGYLab/ELLA) from 0 to 1.

    Args:
        vlm: answers the questions, with "Yes" where that is more probable than "No".
        template: how a question is asked, with {question} in it.
        questions: about all captions that can be judged.
    """

    def score(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        asked = []
        for caption in captions:
            if (known := questions.get(" ".join(caption.split()))) is None:
                raise UserError(
                    f"--questions has none about the caption {caption[:80]!r}; judge images of its captions"
                )
            asked.append(known)
        shown = [image for image, known in zip(images, asked, strict=True) for _ in known]
        texts = [template.replace("{question}", question.text) for known in asked for question in known.values()]
        answers = iter([probability > 0.5 for probability in vlm.yes_probabilities(shown, texts)])
        return [share_of_yes(known, {number: next(answers) for number in known}) for known in asked]

    return score


def share_of_yes(questions: Mapping[int, Question], is_yes: Mapping[int, bool]) -> float:
    """Return the share of questions whose answer is yes, and that of every question that they depend on."""
    counted = dict(is_yes)
    while refuted := [n for n, yes in counted.items() if yes and not all(counted[p] for p in questions[n].parents)]:
        counted |= dict.fromkeys(refuted, False)
    return sum(counted.values()) / len(counted)


def read_questions(path: Path) -> Questions:
    """Return the questions of a CSV file in the form of DPG-Bench and DSG.

    It has one question per row, in the columns text (the caption), proposition_id (its number), dependency (numbers of
    other questions about the caption, or 0 for none) and question_natural_language. Of two questions with one number
    the first counts, and dependencies on questions that are not in the file are ignored.

    Raises UserError for a file without these columns, or a number that is none.
    """
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    columns = ("text", "proposition_id", "dependency", "question_natural_language")
    if missing := [name for name in columns if name not in (rows.fieldnames or ())]:
        raise UserError(f"{path} has no column {missing[0]}; a list of questions has the columns {', '.join(columns)}")
    found: dict[str, dict[int, Question]] = {}
    for row in rows:
        caption, number, parents, text = (row[name] or "" for name in columns)
        try:
            question = Question(text, tuple(int(parent) for parent in parents.split(",") if parent.strip()))
            found.setdefault(" ".join(caption.split()), {}).setdefault(int(number), question)
        except ValueError:
            place = f"{path}, line {rows.line_num}"
            raise UserError(
                f"{place}: proposition_id={number!r}, dependency={parents!r} must be whole numbers"
            ) from None
    if not found:
        raise UserError(f"{path} has no questions; it has one per row")
    return {
        caption: {n: q._replace(parents=tuple(p for p in q.parents if p in known)) for n, q in known.items()}
        for caption, known in found.items()
    }


def number(vlm: Vlm, template: str, pattern: re.Pattern[str], new_tokens: int, unmatched: float | None) -> Scorer:
    """Return the number that the model writes; the mean, if the pattern has several groups.

    Args:
        vlm: writes the answer.
        template: the task, with {caption} in it.
        pattern: its groups are numbers; of several matches the last counts.
        new_tokens: length of the longest answer.
        unmatched: score of an answer that the pattern does not match. By default that is an error.
    """

    def score(images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        texts = [template.replace("{caption}", caption) for caption in captions]
        answers = vlm.answers(images, texts, new_tokens)
        return [read(answer, caption) for answer, caption in zip(answers, captions, strict=True)]

    def read(answer: str, caption: str) -> float:
        with contextlib.suppress(TypeError, ValueError):  # a group that is not in the match, or is not a number
            if matches := list(pattern.finditer(answer)):
                values = [float(group) for group in matches[-1].groups()]
                return sum(values) / len(values)
        if unmatched is not None:
            return unmatched
        end = answer if len(answer) <= 80 else f"...{answer[-80:]}"
        raise UserError(f"--pattern finds no number in the answer {end!r} for the caption {caption[:40]!r}")

    return score


class Hpsv3:
    """HPSv3's reward (arXiv 2508.03789, github.com/MizzenAI/HPSv3), as a `Scorer`.

    The backbone is Qwen2-VL-7B without its language head. An image is resized to about 256 tokens. The text ends with
    the token <|Reward|>, which is added to the tokenizer; three linear layers with ReLU between them, in float32, make
    mu and sigma of the hidden state there (hpsv3/model/qwen2vl_trainer.py, config/HPSv3_7B.yaml). The reward model
    passes embeddings to the backbone, not tokens, so that positions simply count the tokens and images have no
    two-dimensional positions (M-RoPE).

    The tests load small random weights in the layout of that code. They do not compare scores of the published weights.
    """

    def __init__(self, vlm: Vlm, head: Sequence[tuple[torch.Tensor, torch.Tensor]], template: str):
        """Keep the parts.

        Args:
            vlm: the backbone, whose tokenizer knows <|Reward|>.
            head: weights [outputs, inputs] and biases [outputs] of the linear layers, in float32.
            template: the text, with {caption} and <|Reward|> in it.
        """
        self.vlm, self.head, self.template = vlm, head, template
        self.reward_token = vlm.processor.tokenizer.convert_tokens_to_ids(REWARD)

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        texts = [self.template.replace("{caption}", caption) for caption in captions]
        return [mu for inputs in self.vlm.batches(images, texts) for mu in self._mu_B(inputs).tolist()]

    def _mu_B(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tokens_BL = inputs["input_ids"]
        positions_BL = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        hidden_BLD = self.vlm.model(**inputs, position_ids=positions_BL.expand(3, -1, -1)).last_hidden_state
        is_reward_BL = tokens_BL == self.reward_token
        last_B = tokens_BL.shape[1] - 1 - is_reward_BL.flip(-1).int().argmax(-1)
        values = hidden_BLD[torch.arange(len(last_B), device=last_B.device), last_B].float()
        for layer, (weight, bias) in enumerate(self.head):
            values = torch.nn.functional.linear(values.relu() if layer else values, weight, bias)
        return values[:, 0]


def load_vlm(name: str, batch_size: int) -> Vlm:
    """Load any model of transformers' class AutoModelForImageTextToText; raises UserError where there is none."""
    device, dtype = place()
    with told("--model", name):
        processor = transformers.AutoProcessor.from_pretrained(name)
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    return Vlm(model.to(device).eval(), processor, batch_size)


def load_hpsv3(name: str, base: str, template: str, batch_size: int) -> Hpsv3:
    """Load the published file of HPSv3, which holds all weights.

    Args:
        name: the file, its folder, or its repository on the hub.
        base: folder or hub id of the Qwen2-VL whose config and processor it needs.
        template: see `Hpsv3`.
        batch_size: images at a time.

    Raises UserError where one of them does not exist or they do not fit.
    """
    from safetensors.torch import load_file

    device, dtype = place()
    path = find_hpsv3(name)
    with told("--base", base):
        processor = transformers.AutoProcessor.from_pretrained(base)
        config = transformers.AutoConfig.from_pretrained(base)
    if config.model_type != "qwen2_vl":
        raise UserError(f"--base={base} is a {config.model_type}, but HPSv3 is a Qwen2-VL; set it to {HPSV3_BASE}")
    with told("--model", str(path)):
        state = load_file(path)
    layers = [
        (f"rm_head.{i}.weight", f"rm_head.{i}.bias") for i in (0, 3, 5)
    ]  # activations and dropout have numbers too
    embeddings = state.get("model.embed_tokens.weight")
    absent = [key for pair in layers for key in pair if key not in state]
    if embeddings is None or absent:
        raise UserError(f"{path} does not hold HPSv3: it has no {(absent or ['model.embed_tokens.weight'])[0]}")
    processor.tokenizer.add_tokens([REWARD], special_tokens=True)
    sizes = len(processor.tokenizer), config.text_config.hidden_size
    if embeddings.shape != sizes:
        raise UserError(
            f"{path} has embeddings [{embeddings.shape[0]}, {embeddings.shape[1]}], but --base={base} means "
            f"[{sizes[0]}, {sizes[1]}]; set --base to the model that was trained from"
        )
    head = [(state.pop(weight).to(device).float(), state.pop(bias).to(device).float()) for weight, bias in layers]
    state.pop("lm_head.weight", None)  # next tokens are not asked for
    config.text_config.vocab_size = sizes[0]
    backbone: Any = transformers.Qwen2VLModel
    model, info = backbone.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise UserError(f"{path} does not hold HPSv3: {len(wrong)} names differ, for example {min(wrong)}")
    return Hpsv3(Vlm(model.to(device).eval(), processor, batch_size, HPSV3_PIXELS), head, template)


def find_hpsv3(name: str) -> Path:
    path = Path(name)
    if path.exists():
        return path / HPSV3_FILE if path.is_dir() else path
    from huggingface_hub import hf_hub_download

    download = f"hf download {name} {HPSV3_FILE} --local-dir models/HPSv3, and give --model=models/HPSv3"
    with errors_told(f"--model={name}", name, "model", revision=None, download=download):
        return Path(hf_hub_download(name, HPSV3_FILE))


def place() -> tuple[str, torch.dtype]:
    """Return the device and the dtype that models run in."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


@contextlib.contextmanager
def told(flag: str, name: str) -> Iterator[None]:
    """Raise a UserError in one sentence where transformers cannot open a flag's model."""
    try:
        yield
    except Exception as error:  # of many classes, for names, files, versions and missing packages
        raise UserError(f"{flag}={name} cannot be opened: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


class _Image(TypedDict):
    png_base64: str
    caption: str


class _Request(TypedDict):
    images: list[_Image]


def read_request(body: bytes) -> tuple[list[Image.Image], list[str]]:
    """Return the RGB images and the captions of a request; raises UserError if it is not one."""
    fields: _Request = conform(parse_json(decode_text(body, "the request"), "the request"), _Request, "the request")
    images = []
    for i, entry in enumerate(fields["images"]):
        try:
            images.append(decode(base64.b64decode(entry["png_base64"], validate=True)))
        except (DamagedImage, binascii.Error) as error:
            raise UserError(f"the request: images.{i}.png_base64 cannot be read: {error}") from None
    return images, [entry["caption"] for entry in fields["images"]]


def make_app(judge: Judge) -> Starlette:
    """Return the app: POST / scores images, one request at a time, and GET / says what a score means.

    An error is one sentence: with status 400 if a request is not valid, 422 if the judge cannot judge it, 500 if the
    model fails.
    """
    lock = asyncio.Lock()

    async def about(request: Request) -> Response:
        return PlainTextResponse(f"{judge.about}\n")

    async def score(request: Request) -> Response:
        try:
            images, captions = await run_in_threadpool(read_request, await request.body())
        except UserError as error:
            return PlainTextResponse(one_line(error), 400)
        try:
            async with lock:
                scores = await run_in_threadpool(judge.score, images, captions)
            for value, caption in zip(scores, captions, strict=True):
                if not math.isfinite(value):
                    raise UserError(f"the model gives {value} for the caption {caption[:80]!r}; check its weights")
            return JSONResponse({"scores": scores})
        except UserError as error:
            return PlainTextResponse(one_line(error), 422)
        except torch.OutOfMemoryError:
            return PlainTextResponse("the GPU has too little memory; start the server with a smaller --batch_size", 500)
        except Exception as error:
            traceback.print_exc()
            return PlainTextResponse(f"{type(error).__name__}: {one_line(error)}", 500)

    return Starlette(routes=[Route("/", about, methods=["GET"]), Route("/", score, methods=["POST"])])


def open_judge(flags: argparse.Namespace) -> Judge:
    """Return the judge that the flags describe; raises UserError for what cannot be used."""
    default = {"yes_no": QUESTION if flags.questions else YES_NO, "number": RATING, "hpsv3": ""}[flags.kind]
    template = read_text(flags.template).removesuffix("\n") if flags.template else default
    needed = ["{question}" if flags.questions else "{caption}", *([REWARD] if flags.kind == "hpsv3" else [])]
    if flags.questions and flags.kind != "yes_no":
        raise UserError(f"--questions are answered with yes or no; set --kind=yes_no, not {flags.kind}")
    if not template:
        raise UserError(
            "--template is missing; for --kind=hpsv3 set it to a file with HPSv3's text, see docs/evaluation.md"
        )
    for part in needed:
        if part not in template:
            raise UserError(f"--template={flags.template} has no {part}; write it where it belongs in the text")
    vlm = functools.partial(load_vlm, flags.model, flags.batch_size)
    score: Scorer
    if flags.kind == "hpsv3":
        score, means = load_hpsv3(flags.model, flags.base, template, flags.batch_size), "HPSv3's mu"
    elif flags.kind == "number":
        pattern = read_pattern(flags.pattern)
        score = number(vlm(), template, pattern, flags.new_tokens, flags.unmatched)
        means = f"the number in the answer, found by {flags.pattern}"
    elif flags.questions:
        questions = read_questions(flags.questions)
        score = yes_share(vlm(), template, questions)
        means = f"the share, from 0 to 1, of yes among the questions of {flags.questions} about the caption"
    else:
        score, means = yes_no(vlm(), template), f"the probability, from 0 to 1, of yes as the answer to {template}"
    device, dtype = place()
    kind = f"{device}, {str(dtype).removeprefix('torch.')}"
    return Judge(score, " ".join(f"{flags.model} ({kind}); a score is {means}".split()))


def read_pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise UserError(f"--pattern={text} is not a regular expression: {error}") from None
    if not pattern.groups:
        raise UserError(f"--pattern={text} has no group; put the number into parentheses, as in {PATTERN}")
    return pattern


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = functools.partial(parser.add_argument, metavar="...")
    parser.add_argument("--kind", choices=("yes_no", "number", "hpsv3"), required=True, help="Kind of the scores.")
    add("--model", required=True, help=f"Folder or hub id; with --kind=hpsv3 also the file {HPSV3_FILE}.")
    add(
        "--template",
        help="Text file of the question or task, with {caption} in it ({question} with --questions), without the line "
        "end at its end. --kind=hpsv3 needs it, also with <|Reward|> in it. Default: VQAScore's question, or a rating "
        "from 1 to 5.",
    )
    add("--questions", help="With --kind=yes_no: CSV file of questions about each caption (DPG-Bench, DSG).")
    add("--pattern", default=PATTERN, help="With --kind=number: regular expression; a group is the number. %(default)s")
    add("--new_tokens", type=int, default=512, help="With --kind=number: length of the longest answer. %(default)s")
    add("--unmatched", type=float, help="With --kind=number: score without a number in the answer. Default: an error.")
    add("--base", default=HPSV3_BASE, help="With --kind=hpsv3: folder or hub id of its processor. %(default)s")
    add("--batch_size", type=int, default=8, help="Images (or questions) at a time. %(default)s")
    add("--host", default="127.0.0.1", help="Address to serve on. %(default)s")
    add("--port", type=int, default=8000, help="Port; 0 for a free port. %(default)s")
    flags = parser.parse_args([cli.expand_path(argument) for argument in arguments])
    for name in ("batch_size", "new_tokens"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    transformers.logging.set_verbosity_error()
    try:
        with listen(flags.host, flags.port) as listener:
            judge = open_judge(flags)
            print(f"judge: http={link(listener, '/')}\nmodel: {judge.about}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                uvicorn.Server(uvicorn.Config(make_app(judge), log_level="error")).run(sockets=[listener])
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
