"""GenEval as a judge: a Mask2Former finds the objects, a CLIP names their colours, and `geneval.check` decides.

Both networks are transformers', in PyTorch and float32. GenEval runs the same architectures through mmdetection and
OpenCLIP. Its CLIP is OpenAI's ViT-L/14, as here; its Mask2Former (Swin-S, COCO's instances) has weights of
mmdetection's own training, which transformers does not read. The default here is Meta's, so scores may differ slightly
from published ones.

Axes: Q queries of the detector, L classes, h x w cells of its masks, H x W pixels, N objects, P projected width, K
colours.
"""

import os
import re
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from etils import epath
from PIL import Image
from transformers import CLIPModel, Mask2FormerForUniversalSegmentation

from dpo_jax.data.tokenizer_files import TokenizerSpec
from dpo_jax.data.tokenizers import load_tokenizers
from dpo_jax.errors import UserError
from dpo_jax.files import read_json
from dpo_jax.models.clip_vision import IMAGE_MEAN, IMAGE_STD
from dpo_jax.rewards import Images, Reward, Settings
from dpo_jax.rewards.files import find_weights
from dpo_jax.rewards.geneval import CLASSES, CONFIDENCE, Color, Detection, Verdict, check, read_tasks
from dpo_jax.rewards.images import crop_like_torchvision
from dpo_jax.weights.io import tensor_names, weight_files

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
DEVICE = "DPO_JAX_TORCH_DEVICE"
"""Environment variable: PyTorch's device for these networks, such as cuda:1. Default: cpu, since JAX takes nearly all
memory of the GPUs that it sees."""
SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32
"""The detector sees images at this size: as mmdetection scales them (GenEval's config), with both sides rounded up as
transformers does it."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""ImageNet's mean and standard deviation of pixels from 0 to 255, by which the detector's images are normalised."""
GREY = 153
"""The colour around an object when its own colour is named."""
COLORS: tuple[Color, ...] = typing.get_args(Color)
TEMPLATES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")


def open_geneval(source: str, settings: Settings) -> Reward:
    """Open GenEval: 1 for an image that shows all that its prompt asks for, otherwise 0.

    The source is `METADATA`, `METADATA:DETECTOR` or `METADATA:DETECTOR:CLIP`: lines like those of GenEval's
    evaluation_metadata.jsonl, and folders or hub ids in transformers' layout.
    """
    judge = GenEval(source)
    return lambda images, captions: np.asarray([v.is_correct for v in judge.verdicts(images, captions)], np.float32)


def open_geneval_partial(source: str, settings: Settings) -> Reward:
    """Open the reward that Flow-GRPO trains on: the share of what a prompt asks for, see `geneval.check`."""
    judge = GenEval(source)
    return lambda images, captions: np.asarray([v.partial for v in judge.verdicts(images, captions)], np.float32)


class GenEval:
    """Judges images by GenEval's checks, and says what is wrong with them.

    Raises UserError or MissingFileError where the metadata or a network cannot be read.
    """

    def __init__(self, source: str):
        # The colon of gs://bucket does not count.
        given = re.split(r":(?!//)", source)
        if len(given) > 3 or not all(given):
            raise UserError(
                f"GenEval's source {source!r} should be METADATA, METADATA:DETECTOR or METADATA:DETECTOR:CLIP"
            )
        sources = [*given, *[DETECTOR, CLIP][len(given) - 1 :]]
        metadata, detector, clip = sources
        self._metadata, self._tasks = metadata, read_tasks(metadata)
        device = _device()
        self._detect = Detector(detector, device)
        self._name_colors = ColorNamer(clip, device)

    def verdicts(self, images: Images, captions: Sequence[str]) -> list[Verdict]:
        """Return the verdict on each image; raises UserError for a caption that is not in the metadata."""
        for caption in captions:
            if caption.strip() not in self._tasks:
                raise UserError(
                    f"{self._metadata} has no line with the prompt {caption!r}, so GenEval cannot judge its images; "
                    "draw the prompts of that file"
                )
        verdicts = []
        for image_HWC, caption in zip(images, captions, strict=True):

            def name_colors(label: str, objects: Sequence[Detection], image_HWC: np.ndarray = image_HWC) -> list[Color]:
                return self._name_colors(image_HWC, label, objects)

            verdicts.append(check(self._detect(image_HWC), self._tasks[caption.strip()], name_colors))
        return verdicts


class Detector:
    """A Mask2Former of COCO's 80 classes: (uint8 image [H, W, 3]) -> detections above `CONFIDENCE`."""

    def __init__(self, source: str, device: torch.device):
        folder = _find(source, "mask2former", "Mask2FormerForUniversalSegmentation")
        self._network = _load(Mask2FormerForUniversalSegmentation, folder, device)
        labels = self._network.config.id2label
        if len(labels) != len(CLASSES) or (labels[0], labels[len(CLASSES) - 1]) != (CLASSES[0], CLASSES[-1]):
            raise UserError(
                f"{folder} is not a detector of COCO's {len(CLASSES)} classes, person to toothbrush: it has "
                f"{len(labels)} classes, {labels[0]} to {labels[len(labels) - 1]}; use one such as {DETECTOR}"
            )

    def __call__(self, image_HWC: np.ndarray) -> list[Detection]:
        pixels_1CHW = torch.from_numpy(detector_input(image_HWC))[None].to(self._network.device)
        with torch.inference_mode():
            output = self._network(pixel_values=pixels_1CHW)
        return segment(output.class_queries_logits[0], output.masks_queries_logits[0], image_HWC.shape[:2])


def detector_input(image_HWC: np.ndarray) -> np.ndarray:
    """Return an image as the detector reads it: scaled (bilinear) and normalised, float32 [3, h, w]."""
    height, width = image_HWC.shape[:2]
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    height, width = (max(-(-round(side * scale) // DIVISOR), 1) * DIVISOR for side in (height, width))
    resized = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.BILINEAR)
    return _normalised(np.asarray(resized), MEAN, STD)


def segment(class_logits_QL: torch.Tensor, mask_logits_Qhw: torch.Tensor, size: tuple[int, int]) -> list[Detection]:
    """Return the detections above `CONFIDENCE` in an image of this size (H, W).

    They are those of `Mask2FormerImageProcessor.post_process_instance_segmentation`, except that masks are scaled to
    the image, as in the original and in mmdetection, and not first to a grid of 384 x 384 cells.

    Args:
        class_logits_QL: the last of the L classes means "no object".
        mask_logits_Qhw: of the whole image.
        size: height and width of the image.
    """
    scores_QL = class_logits_QL.float().softmax(-1)[:, :-1]
    best = scores_QL.flatten().topk(len(scores_QL))
    likely = best.indices[best.values > CONFIDENCE]  # the score is at most this, so other masks need no scaling
    queries, labels = likely // scores_QL.shape[1], likely % scores_QL.shape[1]
    detections = []
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        logits_HW = torch.nn.functional.interpolate(
            mask_logits_Qhw[query].float()[None, None], size, mode="bilinear", align_corners=False
        )[0, 0]
        mask_HW = logits_HW > 0
        if not mask_HW.any():
            continue
        score = (scores_QL[query, label] * logits_HW[mask_HW].sigmoid().mean()).item()
        if score > CONFIDENCE:
            pixels_HW = mask_HW.cpu().numpy()
            detections.append(Detection(CLASSES[label], score, box_of(pixels_HW), pixels_HW))
    return detections


def box_of(mask_HW: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box of a mask's pixels: left, top, and, behind the last ones, right and bottom."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class ColorNamer:
    """Names objects' colours by a CLIP, zero-shot: (image [H, W, 3], their class, detections) -> the colour of each."""

    def __init__(self, source: str, device: torch.device):
        folder = _find(source, "clip", "CLIPModel")
        self._network = _load(CLIPModel, folder, device)
        text = self._network.config.text_config
        spec = TokenizerSpec(".", num_tokens=text.vocab_size, num_positions=text.max_position_embeddings)
        self._tokenizer = load_tokenizers(str(folder), [spec])
        self._text_features: dict[str, torch.Tensor] = {}

    def __call__(self, image_HWC: np.ndarray, label: str, objects: Sequence[Detection]) -> list[Color]:
        size = self._network.config.vision_config.image_size
        crops = []
        for detection in objects:
            left, top, right, bottom = map(int, detection.box)
            cut_out = np.where(detection.mask_HW[..., None], image_HWC, np.uint8(GREY))[top:bottom, left:right]
            pixels_HWC = crop_like_torchvision(cut_out, size)
            crops.append(_normalised(pixels_HWC, 255 * np.asarray(IMAGE_MEAN), 255 * np.asarray(IMAGE_STD)))
        with torch.inference_mode():
            pixels_NCHW = torch.from_numpy(np.stack(crops)).to(self._network.device)
            pooled = self._network.vision_model(pixel_values=pixels_NCHW).pooler_output
            image_NP = self._network.visual_projection(pooled)
            best_N = (image_NP @ self.text_features(label).T).argmax(-1)
        return [COLORS[best] for best in best_N.tolist()]

    def text_features(self, label: str) -> torch.Tensor:
        """Return the features [K, P] of a class in each colour: the mean over `TEMPLATES`."""
        if label not in self._text_features:
            texts = [template.format(color=color, label=label) for color in COLORS for template in TEMPLATES]
            ids = torch.from_numpy(self._tokenizer(texts).astype(np.int64)).to(self._network.device)
            pooled = self._network.text_model(input_ids=ids).pooler_output
            features = _unit(self._network.text_projection(pooled)).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._text_features[label] = _unit(features.mean(1))
        return self._text_features[label]


def _normalised(pixels_HWC: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """Return pixels from 0 to 255 as float32 [3, H, W], normalised."""
    pixels = (pixels_HWC.astype(np.float32) - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features, dim=-1)


def _device() -> torch.device:
    name = os.environ.get(DEVICE) or "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # of a name that PyTorch does not know, or of a missing GPU
        reason = str(error).splitlines()[0]
        raise UserError(f"{DEVICE}={name} is not a device of PyTorch here ({reason}); set it to cpu or cuda") from None


def _find(source: str, model_type: str, class_name: str) -> epath.Path:
    """Return the folder of a network in transformers' layout; raises as `find_weights`, UserError for another kind."""
    folder = find_weights(source, class_name)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file; name the folder of a {class_name}, with config.json and model.safetensors"
        )
    config: dict[str, Any] = read_json(folder / "config.json", dict[str, Any])
    if config.get("model_type") != model_type:
        raise UserError(
            f"{folder} holds a model of the type {config.get('model_type')!r}, and {model_type!r} is needed"
        )
    return folder


def _load(network: Any, folder: epath.Path, device: torch.device) -> Any:
    """Return a network with the weights of a folder, in float32; raises UserError for missing or damaged weights."""
    for file in weight_files(folder):
        tensor_names(file)  # says what is wrong with a damaged file, which transformers would not
    transformers.logging.disable_progress_bar()  # it would cross the command's own
    try:
        loaded, found = network.from_pretrained(
            str(folder), dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except RuntimeError as error:  # weights of other shapes
        raise UserError(f"the weights in {folder} do not fit its config.json; download it again") from error
    missing = found["missing_keys"]
    odd = [name for name, x in loaded.named_parameters() if name in missing or not x.isfinite().all()]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise UserError(f"the weights {odd[0]}{more} in {folder} are missing, NaN or infinite; download it again")
    return loaded.to(device).eval()
