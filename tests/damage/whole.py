"""Makes the whole files that are then damaged, for each subject."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .trial import ROOT, Runner

TINY = ROOT / "dpo_jax" / "tiny" / "model"
UNET = "unet/diffusion_pytorch_model.safetensors"
CAPTIONS = ("a red circle at the top left", "a blue square at the bottom right", "a green triangle at the top right")

Make = Callable[[Path, Runner], None]
"""Fills a folder with whole files."""


def noise(seed: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def tensors() -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(TINY / UNET)


def adapter() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A, B) by layer of the tiny UNet's attention, in PyTorch's axes."""
    rng, base = np.random.default_rng(0), tensors()
    layers = [name[:-7] for name in base if name.endswith(".weight") and base[name].ndim == 2 and "attn" in name]
    return {
        layer: (
            rng.standard_normal((4, base[f"{layer}.weight"].shape[1])).astype(np.float32) * 0.05,
            rng.standard_normal((base[f"{layer}.weight"].shape[0], 4)).astype(np.float32) * 0.05,
        )
        for layer in layers
    }


def save(tensors: dict[str, np.ndarray], file: Path, metadata: dict[str, str] | None = None) -> None:
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file, metadata=metadata)


def make_model(folder: Path, runner: Runner) -> None:
    shutil.copytree(TINY, folder / "model")


def make_single(folder: Path, runner: Runner) -> None:
    code, _, err = runner.command(
        "dpo_jax.export", [f"--model={TINY}", f"--output={folder / 'exported'}", "--format=single"]
    )
    assert code == 0, err
    (file,) = (folder / "exported").glob("*.safetensors")
    file.rename(folder / "single.safetensors")
    shutil.rmtree(folder / "exported")


def make_lora(folder: Path, runner: Runner) -> None:
    names = ("lora_A", "lora_B")
    named = {
        f"unet.{layer}.{part}.weight": x for layer, ab in adapter().items() for part, x in zip(names, ab, strict=True)
    }
    save(named, folder / "lora.safetensors", {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})})


def make_peft(folder: Path, runner: Runner) -> None:
    named = {
        f"base_model.model.{layer}.{part}.weight": x
        for layer, ab in adapter().items()
        for part, x in zip(("lora_A", "lora_B"), ab, strict=True)
    }
    (folder / "lora").mkdir()
    save(named, folder / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config, indent=1))


def make_pickapic(folder: Path, runner: Runner) -> None:
    table = {
        "jpg_0": [noise(2 * i, "JPEG") for i in range(6)],
        "jpg_1": [noise(2 * i + 1, "JPEG") for i in range(6)],
        "caption": [f"a thing number {i}" for i in range(6)],
        "label_0": [float(i % 2) for i in range(6)],
        "label_1": [1.0 - i % 2 for i in range(6)],
    }
    pq.write_table(pa.table(table), folder / "a.parquet")


def make_jsonl(folder: Path, runner: Runner) -> None:
    for i in range(6):
        (folder / f"{i}.png").write_bytes(noise(i))
    rows = [
        {"prompt": f"a thing {i}", "images": [f"{i}.png", f"{(i + 1) % 6}.png"], "preferred": i % 2} for i in range(6)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tar(folder: Path, runner: Runner) -> None:
    members = {f"{i}.jpg_{k}.jpg": noise(2 * i + k, "JPEG") for i in range(6) for k in range(2)}
    members |= {f"{i}.label_{k}.txt": str(float(i % 2 == k)).encode() for i in range(6) for k in range(2)}
    members |= {f"{i}.original_prompt.txt": f"a thing {i}".encode() for i in range(6)}
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in sorted(members.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def make_zipped(folder: Path, runner: Runner) -> None:
    (folder / "images").mkdir()
    with zipfile.ZipFile(folder / "images" / "0.zip", "w") as archive:
        for i in range(6):
            archive.writestr(f"{i}.png", noise(i))
    rows = [
        {"prompt_id": str(i // 2), "prompt": f"a thing {i // 2}", "image_path": f"images/0/{i}.png", "rank": i % 2 + 1}
        for i in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def make_hpdv3(folder: Path, runner: Runner) -> None:
    for i in range(6):
        (folder / f"{i}.png").write_bytes(noise(i))
    rows = [{"prompt": f"a thing {i}", "path1": f"{i}.png", "path2": f"{(i + 1) % 6}.png"} for i in range(6)]
    (folder / "pairs.json").write_text(json.dumps(rows, indent=1))


def make_pairs_folder(folder: Path, runner: Runner) -> None:
    for side, first in (("w", 0), ("l", 10)):
        (folder / "pairs" / side).mkdir(parents=True)
        for i in range(5):
            (folder / "pairs" / side / f"{i}.png").write_bytes(noise(first + i))
            (folder / "pairs" / side / f"{i}.txt").write_text(f"a thing {i}")


def make_images(folder: Path, runner: Runner) -> None:
    for number, name in enumerate(("a", "b")):
        (folder / name).mkdir()
        entries = []
        for i, caption in enumerate(CAPTIONS):
            (folder / name / f"{i}.png").write_bytes(noise(10 * number + i))
            entries.append({"image": f"{i}.png", "prompt": caption, "seed": 0, "category": "x"})
        (folder / name / "prompts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def make_captioned(folder: Path, runner: Runner) -> None:
    for number, name in enumerate(("a", "b")):
        (folder / name).mkdir()
        for i, caption in enumerate(CAPTIONS):
            (folder / name / f"{i}.png").write_bytes(noise(10 * number + i))
            (folder / name / f"{i}.txt").write_text(caption)


def make_listed(suffix: str) -> Make:
    """Images numbered by a list of prompts."""
    contents = {
        ".txt": "".join(f"{caption}\n" for caption in CAPTIONS),
        ".json": json.dumps(list(CAPTIONS)),
        ".jsonl": "".join(json.dumps({"prompt": caption, "category": "x"}) + "\n" for caption in CAPTIONS),
        ".tsv": "Prompt\tCategory\n" + "".join(f"{caption}\tx\n" for caption in CAPTIONS),
        ".csv": "Prompt,Category\n" + "".join(f'"{caption}, and so on",x\n' for caption in CAPTIONS),
    }

    def make(folder: Path, runner: Runner) -> None:
        for number, name in enumerate(("a", "b")):
            (folder / name).mkdir()
            for i in range(len(CAPTIONS)):
                (folder / name / f"{i:05d}.png").write_bytes(noise(10 * number + i))
        if suffix == ".parquet":
            pq.write_table(pa.table({"prompt": list(CAPTIONS)}), folder / "list.parquet")
        else:
            (folder / f"list{suffix}").write_text(contents[suffix])

    return make


def make_votes(folder: Path, runner: Runner) -> None:
    from dpo_jax.voting.store import open_study
    from dpo_jax.voting.study import read_folder

    make_listed(".jsonl")(folder, runner)
    for name in ("a", "b"):
        for number, caption in enumerate(CAPTIONS):
            (folder / name / f"{number:05d}.txt").write_text(caption)
    with open_study(folder / "study.sqlite", "points", [read_folder(folder / name) for name in ("a", "b")]) as store:
        for rater in ("ann", "bob"):
            store.join(rater, "a claim")
            for number, task in enumerate(store.tasks):
                store.add(rater, task, "preference", (1 + number, 5 - number), (0, 1))
        store.undo("bob", task, "preference")


def make_prepared(folder: Path, runner: Runner) -> None:
    make_pickapic(folder, runner)
    code, out, err = runner.command(
        "dpo_jax.prepare", [f"--input={folder / 'a.parquet'}", f"--output={folder / 'data'}", "--workers=0"]
    )
    assert code == 0, out + err
    (folder / "a.parquet").unlink()


RUN = (
    "--config=configs/tiny.py:tiny", f"--config.model={TINY}", "--config.data.batch_size=2", "--config.steps=2",
    "--config.checkpoint.every=1", "--config.validation.every=0", "--config.sample.every=0", "--config.lora.rank=2",
    "--config.optimizer.schedule=constant",
)  # fmt: skip


ENCODED = (
    *RUN,
    "--config.data.encoded_views=1",
    "--config.data.random_flip=False",
    "--config.data.caption_dropout=0.0",
)
_ROUNDS = (
    f"--config.model={TINY}", "--config.data.batch_size=2", "--config.online.prompts_per_round=2",
    "--config.online.prompts_at_a_time=2", "--config.online.candidates=2", "--config.online.sampling_steps=2",
    "--config.online.timesteps=1.0", "--config.lora.rank=2",
)  # fmt: skip
ONLINE = {
    "people": ("--config=configs/tiny_online.py:tiny", *_ROUNDS, "--config.online.judges=()"),
    "ddpo": ("--config=configs/tiny_online.py:ddpo,tiny", *_ROUNDS, "--config.online.judges=('jpeg_compressibility',)"),
    "spo": ("--config=configs/tiny_online.py:spo,tiny", *_ROUNDS, "--config.online.judges=('jpeg_compressibility',)"),
}
SAMPLE = (
    f"--model={TINY}", "--prompts={input}/prompts.txt", "--output={output}", "--steps=2", "--batch_size=2",
    "--init_image={input}/init",
)  # fmt: skip


def make_run(folder: Path, runner: Runner) -> None:
    code, out, err = runner.command("dpo_jax.train", [*RUN, f"--workdir={folder / 'run'}"])
    assert code == 0, out + err
    shutil.rmtree(folder / "run" / "compiled", ignore_errors=True)


def make_encoded(folder: Path, runner: Runner) -> None:
    make_prepared(folder, runner)
    code, out, err = runner.command("dpo_jax.prepare", ["--encode", f"--output={folder / 'data'}", *ENCODED])
    assert code == 0, out + err


def make_prompts(folder: Path, runner: Runner) -> None:
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in CAPTIONS[:2]))
    (folder / "init").mkdir()
    for i in range(2):
        (folder / "init" / f"{i:05d}.png").write_bytes(noise(i))


def make_drawn(folder: Path, runner: Runner) -> None:
    """A folder that `sample` goes on with, as one image is missing."""
    make_prompts(folder, runner)
    code, out, err = runner.command("dpo_jax.sample", [a.format(input=folder, output=folder / "drawn") for a in SAMPLE])
    assert code == 0, out + err
    next(iter(sorted((folder / "drawn").glob("0*.png")))).unlink()


def make_scores(folder: Path, runner: Runner) -> None:
    make_prepared(folder, runner)
    code, out, err = runner.command("dpo_jax.score", [f"--data={folder / 'data'}", "--judge=jpeg_compressibility"])
    assert code == 0, out + err


def make_nothing(folder: Path, runner: Runner) -> None:
    pass


def make_said(by: str) -> Make:
    """Scores that an outside judge wrote."""

    def make(folder: Path, runner: Runner) -> None:
        from dpo_jax.data.store.prepared import open_prepared

        make_prepared(folder, runner)
        data = open_prepared(folder / "data")
        digests, rows = data.sha256_I.to_pylist(), data.records.to_pylist()
        if by == "record":
            lines = [{"record": i, "scores": [0.5, i]} for i in range(len(rows))]
        else:
            pairs = [(row["caption"], digests[image].hex()) for row in rows for image in row["images"]]
            lines = [{"caption": text, "sha256": digest, "score": i} for i, (text, digest) in enumerate(pairs)]
        (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return make


def make_judges(folder: Path, runner: Runner) -> None:
    """A small CLIP with its tokenizer, and the head of LAION's predictor beside it."""
    from dpo_jax.models.score_head import PLACES, WIDTHS

    from ..rewards.conftest import TOKENIZER, small_clip

    make_images(folder, runner)
    clip = small_clip("gelu")
    clip.save_pretrained(folder / "clip")
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder / "clip")
    head, rng = {}, np.random.default_rng(0)
    for place, wide, narrow in zip(PLACES, (clip.config.projection_dim, *WIDTHS), WIDTHS, strict=False):
        head[f"layers.{place}.weight"] = rng.standard_normal((narrow, wide), np.float32) * 0.1
        head[f"layers.{place}.bias"] = np.zeros(narrow, np.float32)
    save(head, folder / "clip" / "head.safetensors")


def make_evaluated(folder: Path, runner: Runner) -> None:
    make_images(folder, runner)
    code, out, err = runner.command(
        "dpo_jax.evaluate",
        [f"--images={folder}/a,{folder}/b", "--judges=jpeg_compressibility", f"--output={folder / 'out'}"],
    )
    assert code == 0, out + err


def make_curves(folder: Path, runner: Runner) -> None:
    make_images(folder, runner)
    (folder / "run").mkdir()
    rows = [{"step": i, "train/loss": 0.7, "validation/pair_accuracy": 0.5 + i / 100} for i in range(1, 4)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model_and_prompts(folder: Path, runner: Runner) -> None:
    make_model(folder, runner)
    (folder / "prompts.txt").write_text(f"{CAPTIONS[0]}\n")


def make_rounds(who: str) -> Make:
    """A run that has learned from one round and sampled the next."""

    def make(folder: Path, runner: Runner) -> None:
        for number, stage in enumerate(("sample", "train", "sample")):
            code, out, err = runner.command(
                "dpo_jax.online", [*ONLINE[who], f"--workdir={folder / 'run'}", f"--stage={stage}"]
            )
            assert code == 0, out + err
            if who == "people" and stage == "sample":
                (folder / "run" / "rounds" / f"{number // 2:05d}" / "feedback.json").write_text("[[1, 2], [2.5, null]]")
        shutil.rmtree(folder / "run" / "compiled", ignore_errors=True)

    return make
