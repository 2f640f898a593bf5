"""What is damaged: for each command the files that it reads, whole."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dpo_jax.cli import flatten, load_config

from .trial import ROOT, Runner, Subject

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
    }

    def make(folder: Path, runner: Runner) -> None:
        for number, name in enumerate(("a", "b")):
            (folder / name).mkdir()
            for i in range(len(CAPTIONS)):
                (folder / name / f"{i:05d}.png").write_bytes(noise(10 * number + i))
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


SAMPLE = (
    f"--model={TINY}", "--prompts={input}/prompts.txt", "--output={output}", "--steps=2", "--batch_size=2",
    "--init_image={input}/init",
)  # fmt: skip
FIELDS = {
    config: tuple(f"--config.{field}" for field in flatten(load_config(f"{ROOT}/configs/{config}.py")))
    for config in ("sdxl", "tiny")
}
FLAGS: tuple[tuple[str, Make, tuple[str, ...], str], ...] = (
    (
        "sample",
        make_prompts,
        SAMPLE,
        "seeds seed sampler steps guidance guidance_rescale eta resolution batch_size strength lora lora_scale dtype "
        "fsdp unet vae family model_config revision variant prompts model init_image workdir negative_prompt",
    ),
    (
        "evaluate",
        make_images,
        ("--images={input}/a,{input}/b", "--judges=jpeg_compressibility", "--output={output}"),
        "images prompts judges seeds batch_size dtype features curves since models",
    ),
    (
        "prepare",
        make_pickapic,
        ("--input={input}/a.parquet", "--output={output}", "--workers=0"),
        "input source validation_fraction max_damaged_fraction workers encode",
    ),
    (
        "export",
        make_model,
        ("--model={input}/model", "--output={output}"),
        "model lora format dtype max_shard_gb family model_config revision variant vae license base_model workdir",
    ),
    (
        "vote",
        make_votes,
        ("--output={input}/study.sqlite", "--export={output}/feedback.json"),
        "output mode questions tags raters host port token export",
    ),
)
"""(command, what it reads, arguments, flags)."""
ENCODED = (
    *RUN,
    "--config.data.encoded_views=1",
    "--config.data.random_flip=False",
    "--config.data.caption_dropout=0.0",
)
EVALUATE = ("--judges=jpeg_compressibility", "--output={output}", "--batch_size=4")
TIMES = ("result.json", "report.html", "compiled/**/*", "compiled/*", "*.html")

SUBJECTS: dict[str, tuple[Subject, Make]] = {
    subject.name: (subject, make)
    for subject, make in (
        (
            Subject(
                "export a model folder",
                "dpo_jax.export",
                ("--model={input}/model", "--output={output}"),
                ("model/**/*.json", "model/**/*.safetensors", "model/**/merges.txt", "model/*.json"),
                ignored=("README.md",),
                valid=("*.safetensors", "*.json", "merges.txt"),
                names=("model/tokenizer",),
            ),
            make_model,
        ),
        (
            Subject(
                "export a single file",
                "dpo_jax.export",
                ("--model={input}/single.safetensors", f"--model_config={TINY}", "--output={output}"),
                ("single.safetensors",),
                ignored=("README.md",),
                valid=("*.safetensors",),
            ),
            make_single,
        ),
        (
            Subject(
                "merge a LoRA",
                "dpo_jax.export",
                (f"--model={TINY}", "--lora={input}/lora.safetensors", "--output={output}", "--format=unet"),
                ("lora.safetensors",),
                ignored=("README.md",),
                valid=("*.safetensors",),
            ),
            make_lora,
        ),
        (
            Subject(
                "merge a LoRA of PEFT",
                "dpo_jax.export",
                (f"--model={TINY}", "--lora={input}/lora", "--output={output}", "--format=unet"),
                ("lora/*",),
                ignored=("README.md",),
                valid=("*.safetensors", "*.json"),
            ),
            make_peft,
        ),
        (
            Subject(
                "prepare Pick-a-Pic",
                "dpo_jax.prepare",
                ("--input={input}/a.parquet", "--output={output}", "--workers=0"),
                ("a.parquet",),
                valid=("*.parquet",),
            ),
            make_pickapic,
        ),
        (
            Subject(
                "prepare JSONL",
                "dpo_jax.prepare",
                ("--source=jsonl", "--input={input}/pairs.jsonl", "--output={output}", "--workers=0"),
                ("*.jsonl", "*.jsonl", "0.png"),
                valid=("*.png", "*.jsonl"),
            ),
            make_jsonl,
        ),
        (
            Subject(
                "prepare HPDv3",
                "dpo_jax.prepare",
                ("--source=hpdv3", "--input={input}/pairs.json", "--output={output}", "--workers=0"),
                ("pairs.json", "pairs.json", "0.png"),
                valid=("*.png", "*.json"),
            ),
            make_hpdv3,
        ),
        (
            Subject(
                "prepare a folder of pairs",
                "dpo_jax.prepare",
                ("--source=pairs_folder", "--input={input}/pairs", "--output={output}", "--workers=0"),
                ("pairs/*/*",),
                valid=("*.png", "*.txt"),
            ),
            make_pairs_folder,
        ),
        (
            Subject(
                "evaluate images",
                "dpo_jax.evaluate",
                ("--images={input}/a,{input}/b", *EVALUATE),
                ("a/*",),
                ignored=TIMES,
                valid=("*.png", "*.jsonl"),
            ),
            make_images,
        ),
        (
            Subject(
                "evaluate captioned images",
                "dpo_jax.evaluate",
                ("--images={input}/a,{input}/b", *EVALUATE),
                ("a/*.txt",),
                ignored=TIMES,
                valid=("*.txt",),
            ),
            make_captioned,
        ),
        *(
            (
                Subject(
                    f"evaluate by a list in {suffix}",
                    "dpo_jax.evaluate",
                    ("--images={input}/a,{input}/b", f"--prompts={{input}}/list{suffix}", *EVALUATE),
                    ("list.*",),
                    ignored=TIMES,
                    valid=("list.*",),
                ),
                make_listed(suffix),
            )
            for suffix in (".txt", ".json", ".jsonl", ".tsv")
        ),
        (
            Subject(
                "export what people said",
                "dpo_jax.vote",
                ("--output={input}/study.sqlite", "--export={output}/feedback.json"),
                ("study.sqlite",),
            ),
            make_votes,
        ),
        (
            Subject(
                "sample with images to begin from",
                "dpo_jax.sample",
                SAMPLE,
                ("prompts.txt", "init/*"),
                valid=("*.txt", "*.png"),
                names=("init",),
                share=1,
            ),
            make_prompts,
        ),
        (
            Subject(
                "sample into a folder that was begun",
                "dpo_jax.sample",
                tuple(argument.replace("{output}", "{input}/drawn") for argument in SAMPLE),
                ("drawn/*.json*", "drawn/0*.png"),
                valid=("*.png",),
                names=("drawn",),
                output_is_input=True,
                share=1,
            ),
            make_drawn,
        ),
        (
            Subject(
                "train on a judge's scores",
                "dpo_jax.train",
                (
                    *(*RUN, "--config.data.path={input}/data", "--workdir={output}"),
                    "--config.data.judges=('jpeg_compressibility',)",
                ),
                ("data/scores/*",),
                names=("data",),
                share=1,
            ),
            make_scores,
        ),
        *(
            (
                Subject(
                    f"plan {config} with odd fields",
                    "dpo_jax.plan",
                    (f"--config=configs/{config}.py", "--topology=v5e:4x4"),
                    (),
                    flags=fields,
                    share=6 if config == "tiny" else 1,
                ),
                make_nothing,
            )
            for config, fields in FIELDS.items()
        ),
        *(
            (
                Subject(
                    f"odd flags of {name}",
                    f"dpo_jax.{name}",
                    arguments,
                    (),
                    flags=tuple(f"--{flag}" for flag in names.split()),
                    share=3,
                ),
                make,
            )
            for name, make, arguments, names in FLAGS
        ),
        (
            Subject(
                "score prepared data",
                "dpo_jax.score",
                ("--data={input}/data", "--judge=jpeg_compressibility"),
                ("data/*.arrow", "data/*.json", "data/images/*"),
                names=("data",),
                output_is_input=True,
            ),
            make_prepared,
        ),
        (
            Subject(
                "train on prepared data",
                "dpo_jax.train",
                (*RUN, "--config.data.path={input}/data", "--workdir={output}", "--config.data.resolution=32"),
                ("data/*.arrow", "data/*.json", "data/images/*"),
                ignored=("tensorboard/*", "metrics.jsonl", "compiled/*", "compiled/**/*", "checkpoints/**/*"),
                names=("data",),
                share=1,
            ),
            make_prepared,
        ),
        (
            Subject(
                "train on encoded data",
                "dpo_jax.train",
                (*ENCODED, "--config.data.path={input}/data", "--workdir={output}"),
                ("data/encoded/**/*",),
                names=("data",),
                share=1,
            ),
            make_encoded,
        ),
        (
            Subject(
                "export a run",
                "dpo_jax.export",
                ("--workdir={input}/run", "--output={output}", "--format=lora"),
                ("run/*.json*", "run/checkpoints/2/**/*"),
                ignored=("README.md",),
                names=("checkpoints", "run/config.json"),
            ),
            make_run,
        ),
        (
            Subject(
                "resume a run",
                "dpo_jax.train",
                (*RUN, "--config.steps=3", "--workdir={input}/run"),
                ("run/*.json*", "run/tensorboard/*", "run/checkpoints/2/**/*", "run/*.txt"),
                names=("checkpoints", "run"),
                output_is_input=True,
                share=1,
            ),
            make_run,
        ),
    )
}
