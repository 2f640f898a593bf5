"""What is damaged: for each command the files that it reads, and how it is called."""

from dpo_jax.cli import flatten, load_config

from . import whole
from .trial import ROOT, Subject

FIELDS = {
    config: tuple(f"--config.{field}" for field in flatten(load_config(f"{ROOT}/configs/{config}.py")))
    for config in ("sdxl", "tiny")
}
FLAGS: tuple[tuple[str, whole.Make, tuple[str, ...], str], ...] = (
    (
        "sample",
        whole.make_prompts,
        whole.SAMPLE,
        "seeds seed sampler steps guidance guidance_rescale eta resolution batch_size strength lora lora_scale dtype "
        "fsdp unet vae family model_config revision variant prompts model init_image workdir negative_prompt",
    ),
    (
        "evaluate",
        whole.make_images,
        ("--images={input}/a,{input}/b", "--judges=jpeg_compressibility", "--output={output}"),
        "images prompts judges seeds batch_size dtype features curves since models",
    ),
    (
        "prepare",
        whole.make_pickapic,
        ("--input={input}/a.parquet", "--output={output}", "--workers=0"),
        "input source validation_fraction max_damaged_fraction workers encode",
    ),
    (
        "export",
        whole.make_model,
        ("--model={input}/model", "--output={output}"),
        "model lora format dtype max_shard_gb family model_config revision variant vae license base_model workdir",
    ),
    (
        "vote",
        whole.make_votes,
        ("--output={input}/study.sqlite", "--export={output}/feedback.json"),
        "output mode questions tags raters host port token export",
    ),
)
"""(command, what it reads, arguments, flags)."""
EVALUATE = ("--judges=jpeg_compressibility", "--output={output}", "--batch_size=4")
TIMES = ("result.json", "report.html", "compiled/**/*", "compiled/*", "*.html")

SUBJECTS: dict[str, tuple[Subject, whole.Make]] = {
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
            whole.make_model,
        ),
        (
            Subject(
                "export a single file",
                "dpo_jax.export",
                ("--model={input}/single.safetensors", f"--model_config={whole.TINY}", "--output={output}"),
                ("single.safetensors",),
                ignored=("README.md",),
                valid=("*.safetensors",),
            ),
            whole.make_single,
        ),
        (
            Subject(
                "merge a LoRA",
                "dpo_jax.export",
                (f"--model={whole.TINY}", "--lora={input}/lora.safetensors", "--output={output}", "--format=unet"),
                ("lora.safetensors",),
                ignored=("README.md",),
                valid=("*.safetensors",),
            ),
            whole.make_lora,
        ),
        (
            Subject(
                "merge a LoRA of PEFT",
                "dpo_jax.export",
                (f"--model={whole.TINY}", "--lora={input}/lora", "--output={output}", "--format=unet"),
                ("lora/*",),
                ignored=("README.md",),
                valid=("*.safetensors", "*.json"),
            ),
            whole.make_peft,
        ),
        (
            Subject(
                "prepare Pick-a-Pic",
                "dpo_jax.prepare",
                ("--input={input}/a.parquet", "--output={output}", "--workers=0"),
                ("a.parquet",),
                valid=("*.parquet",),
            ),
            whole.make_pickapic,
        ),
        (
            Subject(
                "prepare JSONL",
                "dpo_jax.prepare",
                ("--source=jsonl", "--input={input}/pairs.jsonl", "--output={output}", "--workers=0"),
                ("*.jsonl", "*.jsonl", "0.png"),
                valid=("*.png", "*.jsonl"),
            ),
            whole.make_jsonl,
        ),
        (
            Subject(
                "prepare HPDv3",
                "dpo_jax.prepare",
                ("--source=hpdv3", "--input={input}/pairs.json", "--output={output}", "--workers=0"),
                ("pairs.json", "pairs.json", "0.png"),
                valid=("*.png", "*.json"),
            ),
            whole.make_hpdv3,
        ),
        (
            Subject(
                "prepare a folder of pairs",
                "dpo_jax.prepare",
                ("--source=pairs_folder", "--input={input}/pairs", "--output={output}", "--workers=0"),
                ("pairs/*/*",),
                valid=("*.png", "*.txt"),
            ),
            whole.make_pairs_folder,
        ),
        (
            Subject(
                "prepare tars of Pick-a-Pic",
                "dpo_jax.prepare",
                ("--source=pickapic_tar", "--input={input}/a.tar", "--output={output}", "--workers=0"),
                ("a.tar",),
                valid=("*.tar",),
                share=1,
            ),
            whole.make_tar,
        ),
        (
            Subject(
                "prepare ImageRewardDB",
                "dpo_jax.prepare",
                ("--source=imagerewarddb", "--input={input}/metadata.parquet", "--output={output}", "--workers=0"),
                ("metadata.parquet", "images/*.zip"),
                valid=("*.parquet", "*.zip"),
            ),
            whole.make_zipped,
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
            whole.make_images,
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
            whole.make_captioned,
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
                    share=1 if suffix in (".csv", ".parquet") else 4,
                ),
                whole.make_listed(suffix),
            )
            for suffix in (".txt", ".json", ".jsonl", ".tsv", ".csv", ".parquet")
        ),
        (
            Subject(
                "export what people said",
                "dpo_jax.vote",
                ("--output={input}/study.sqlite", "--export={output}/feedback.json"),
                ("study.sqlite",),
            ),
            whole.make_votes,
        ),
        (
            Subject(
                "sample with images to begin from",
                "dpo_jax.sample",
                whole.SAMPLE,
                ("prompts.txt", "init/*"),
                valid=("*.txt", "*.png"),
                names=("init",),
                share=1,
            ),
            whole.make_prompts,
        ),
        (
            Subject(
                "sample into a folder that was begun",
                "dpo_jax.sample",
                tuple(argument.replace("{output}", "{input}/drawn") for argument in whole.SAMPLE),
                ("drawn/*.json*", "drawn/0*.png"),
                valid=("*.png",),
                names=("drawn",),
                output_is_input=True,
                share=1,
            ),
            whole.make_drawn,
        ),
        (
            Subject(
                "train on a judge's scores",
                "dpo_jax.train",
                (
                    *(*whole.RUN, "--config.data.path={input}/data", "--workdir={output}"),
                    "--config.data.judges=('jpeg_compressibility',)",
                ),
                ("data/scores/*",),
                names=("data",),
                share=1,
            ),
            whole.make_scores,
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
                whole.make_nothing,
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
        *(
            (
                Subject(
                    f"import scores by {by}",
                    "dpo_jax.score",
                    ("--data={input}/data", "--judge=mine", "--scores={input}/scores.jsonl"),
                    ("scores.jsonl",),
                    results=("scores/*",),
                    valid=("*.jsonl",),
                    output_is_input=True,
                    share=4 if by == "record" else 1,
                ),
                whole.make_said(by),
            )
            for by in ("record", "image")
        ),
        (
            Subject(
                "verify prepared data",
                "dpo_jax.prepare",
                ("--verify", "--output={input}/data"),
                ("data/*.arrow", "data/*.json", "data/images/*"),
                output_is_input=True,
            ),
            whole.make_prepared,
        ),
        (
            Subject(
                "evaluate by judges from a folder",
                "dpo_jax.evaluate",
                (
                    *("--images={input}/a,{input}/b", "--output={output}", "--features=clip={input}/clip"),
                    "--judges=pickscore={input}/clip,aesthetic={input}/clip/head.safetensors",
                ),
                ("clip/*",),
                results=("scores/*/*",),
                valid=("*.safetensors", "*.json", "merges.txt"),
                names=("{input}/clip",),
                share=1,
            ),
            whole.make_judges,
        ),
        (
            Subject(
                "evaluate again",
                "dpo_jax.evaluate",
                ("--images={input}/a,{input}/b", *(a.replace("{output}", "{input}/out") for a in EVALUATE)),
                ("out/scores/*/*", "out/*.json"),
                results=("scores/*/*",),
                output_is_input=True,
                share=1,
            ),
            whole.make_evaluated,
        ),
        (
            Subject(
                "evaluate with curves",
                "dpo_jax.evaluate",
                ("--images={input}/a,{input}/b", "--curves={input}/run", *EVALUATE),
                ("run/metrics.jsonl",),
                results=("report.html",),
                valid=("*.jsonl",),
                share=1,
            ),
            whole.make_curves,
        ),
        (
            Subject(
                "sample by a model",
                "dpo_jax.sample",
                ("--model={input}/model", "--prompts={input}/prompts.txt", "--output={output}", "--steps=1"),
                ("model/**/*.json", "model/**/*.safetensors", "model/**/merges.txt", "model/*.json"),
                results=("*.png",),
                valid=("*.safetensors", "*.json", "merges.txt"),
                names=("model/tokenizer",),
                share=1,
            ),
            whole.make_model_and_prompts,
        ),
        *(
            (
                Subject(
                    f"go on with a round of {who}",
                    "dpo_jax.online",
                    (*whole.ONLINE[who], "--workdir={input}/run", "--stage=train"),
                    ("run/rounds/*/*.json", "run/rounds/00001/trajectories/*", *more),
                    results=("metrics.jsonl", "result.json"),
                    valid=("metrics.jsonl",),  # figures have no checksum
                    output_is_input=True,
                    share=1,
                ),
                whole.make_rounds(who),
            )
            for who, more in (("people", ("run/rounds/00001/feedback*",)), ("ddpo", ("run/*.json*",)), ("spo", ()))
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
            whole.make_prepared,
        ),
        (
            Subject(
                "train on prepared data",
                "dpo_jax.train",
                (*whole.RUN, "--config.data.path={input}/data", "--workdir={output}", "--config.data.resolution=32"),
                ("data/*.arrow", "data/*.json", "data/images/*"),
                ignored=("tensorboard/*", "metrics.jsonl", "compiled/*", "compiled/**/*", "checkpoints/**/*"),
                names=("data",),
                share=1,
            ),
            whole.make_prepared,
        ),
        (
            Subject(
                "train on encoded data",
                "dpo_jax.train",
                (*whole.ENCODED, "--config.data.path={input}/data", "--workdir={output}"),
                ("data/encoded/**/*",),
                names=("data",),
                share=1,
            ),
            whole.make_encoded,
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
            whole.make_run,
        ),
        (
            Subject(
                "resume a run",
                "dpo_jax.train",
                (*whole.RUN, "--config.steps=3", "--workdir={input}/run"),
                ("run/*.json*", "run/tensorboard/*", "run/checkpoints/2/**/*", "run/*.txt"),
                names=("checkpoints", "run"),
                output_is_input=True,
                share=1,
            ),
            whole.make_run,
        ),
    )
}
