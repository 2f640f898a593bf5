"""Compares online methods on the tiny world: score against images judged and evaluations of the denoiser.

  python benchmarks/online.py --output=runs/online

Every method starts from the same base, the tiny model or the tiny flow model, and learns from the exact judge until the
judge has seen the same number of images. The methods also learn from the size of JPEG files, and D3PO with both of its
update rules on 7 candidates, with three seeds each. Then the bases and all models draw the held-out captions, and the
same judge scores them: means of all seeds with 95% confidence intervals over captions, and the rise of each seed, which
differ by more than that. CPU seconds are those of a whole run, with compilation; old rows have none.

Writes OUTPUT/online.json, OUTPUT/online.md and OUTPUT/online.png, which has the scores in training against evaluations;
the last results are committed beside this file. It takes about three hours on two CPU cores; the same command
continues. --only and --seeds run a part of it, and leave other rows in OUTPUT as they are.
"""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from dpo_jax import cli
from dpo_jax.errors import UserError

OUTPUT = flags.DEFINE_string("output", None, "Folder for the runs and the tables.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Training runs per method.", lower_bound=1)
DRAWN = flags.DEFINE_integer("drawn", 12, "Images per held-out caption and model.", lower_bound=1)
IMAGES = flags.DEFINE_integer("images", 1920, "Images that the judge sees in a run, without the last round.")
ONLY = flags.DEFINE_list("only", [], "Names of methods to run. Default: all.")

ROOT = Path(__file__).parents[1]
BASES = {"tiny": "dpo_jax/tiny/model", "tiny flow": "dpo_jax/tiny/flow_model"}
SAMPLERS = {"tiny": "ddim", "tiny flow": "flow_euler"}
SECONDS = "cpu_seconds.json"
"""The CPU seconds of the call that completed a run, in its work directory."""


class Method(NamedTuple):
    variants: str
    images_a_round: int
    """Images that the judge sees per round."""
    judge: str = "shapes"
    fields: tuple[str, ...] = ()
    share: float = 1.0
    """Share of --images that its judge sees."""
    model: str = "tiny"
    guidance: float = 2.5
    """Of the images that are compared, as of those that it learns from."""


SEVEN = ("--config.online.candidates=7", "--config.online.prompts_per_round=16", "--config.online.reference=round")
WINDOW = ("--config.online.window=2",)
BY_PAIR = ("--config.online.update_by=pair",)
METHODS = {
    "D3PO": Method("", 32 * 4),
    "DDPO": Method("ddpo", 32 * 4),
    "DPOK": Method("dpok", 32 * 4),
    "GRPO": Method("grpo", 32 * 4),
    "NFT": Method("nft", 32 * 4),
    "DGPO": Method("dgpo", 32 * 4),
    "SPO": Method("spo", 8 * (4 * 10 + 1), fields=("--config.online.prompts_per_round=8",)),
    "D3PO (small files)": Method("compressibility", 32 * 4, "jpeg_compressibility"),
    "DDPO (small files)": Method("compressibility,ddpo", 32 * 4, "jpeg_compressibility"),
    "D3PO of 7 (all pairs at once)": Method("", 16 * 7, fields=SEVEN),
    "D3PO of 7 (pair by pair)": Method("", 16 * 7, fields=(*SEVEN, *BY_PAIR), share=1 / 3),
    "D3PO of 7 (pair by pair at a seventh of the rate)": Method(
        "", 16 * 7, fields=(*SEVEN, *BY_PAIR, f"--config.optimizer.learning_rate={5e-5 / 7}"), share=1 / 3
    ),  # Adam's updates are as large as the rate, and there are seven times as many
    "D3PO, flow model": Method("flow", 32 * 4, model="tiny flow"),
    "DDPO, flow model": Method("flow,ddpo", 32 * 4, model="tiny flow"),
    "Flow-GRPO, flow model": Method("flow_grpo", 32 * 4, model="tiny flow"),
    "Flow-GRPO (window), flow model": Method("flow_grpo", 32 * 4, fields=WINDOW, model="tiny flow"),
    "NFT, flow model": Method("flow,nft", 32 * 4, model="tiny flow", guidance=1.0),
    "DGPO, flow model": Method("flow,dgpo", 32 * 4, model="tiny flow", guidance=1.0),
}


def main() -> None:
    output = Path(OUTPUT.value).absolute()
    output.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # configs name their folders from there
    unknown = set(ONLY.value) - set(METHODS)
    if unknown:
        raise UserError(f"--only={','.join(unknown)} is not a method. The methods are {'; '.join(METHODS)}")
    chosen = {name: method for name, method in METHODS.items() if not ONLY.value or name in ONLY.value}
    for seed in range(SEEDS.value):
        for name, method in chosen.items():
            learn(method, workdir(output, name, seed), seed)
    for seed in range(SEEDS.value):
        evaluate(output, chosen, seed)
    file = output / "online.json"
    known = {r["method"]: r for r in json.loads(file.read_text())} if file.exists() else {}
    known |= {name: row(output, name, method) for name, method in chosen.items()}
    rows = [known[name] for name in METHODS if name in known]
    file.write_text(json.dumps(rows, indent=2) + "\n")
    (output / "online.md").write_text(table(rows))
    draw(rows, output / "online.png")
    print(table(rows))


def workdir(output: Path | str, name: str, seed: int) -> Path:
    return Path(output) / f"{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}-{seed}"


def learn(method: Method, folder: Path, seed: int) -> None:
    rounds = -(-int(IMAGES.value * method.share) // method.images_a_round)
    config = f"configs/tiny_online.py{f':{method.variants}' if method.variants else ''}"
    fields = (f"--config.seed={seed}", f"--config.online.rounds={rounds}", *method.fields)
    seconds = run("dpo_jax.online", f"--config={config}", f"--workdir={folder}", *fields)
    if not (folder / SECONDS).exists():
        (folder / SECONDS).write_text(json.dumps(seconds))


def evaluate(output: Path, methods: dict[str, Method], seed: int) -> None:
    """Draw the same captions from the same noises with all models of a seed."""
    for model, guidance in sorted({(method.model, method.guidance) for method in methods.values()}):
        alike = {name: m for name, m in methods.items() if (m.model, m.guidance) == (model, guidance)}
        models = [f"{workdir('', name, seed).name}={workdir(output, name, seed)}" for name in alike]
        judges = sorted({method.judge for method in alike.values()}, reverse=True)
        run(
            "dpo_jax.evaluate",
            f"--models=base={BASES[model]},{','.join(models)}",
            "--prompts=tiny_heldout",
            f"--judges={','.join(judges)}",
            f"--seeds={DRAWN.value}",
            f"--seed={10**6 * (seed + 1)}",
            f"--sampler={SAMPLERS[model]}",
            "--steps=20",
            f"--guidance={guidance}",
            "--batch_size=58",
            f"--output={evaluation(output, next(iter(alike.values())), seed)}",
        )


def evaluation(output: Path, method: Method, seed: int) -> Path:
    return output / f"evaluation{seed}_{method.model.replace(' ', '_')}_{method.guidance:g}"


def row(output: Path, name: str, method: Method) -> dict[str, Any]:
    """Return the held-out scores before and after a run, and its cost."""
    from dpo_jax.evaluation.compare import match
    from dpo_jax.evaluation.winrate import mean_over_prompts

    base, tuned, prompts, rises = [], [], [], []
    for seed in range(SEEDS.value):
        folder, model = evaluation(output, method, seed), workdir("", name, seed).name
        contest = match({m: folder / "images" / m for m in ("base", model)})
        before, after = (
            np.array(json.loads((folder / "scores" / method.judge / f"{m}.json").read_text())["scores"])
            for m in ("base", model)
        )
        base.append(before)
        tuned.append(after)
        prompts.append(contest.prompt_N)
        rises.append(float((after - before).mean()))
    prompt_N, base_N, tuned_N = (np.concatenate(arrays) for arrays in (prompts, base, tuned))
    P = int(prompt_N.max()) + 1
    rise, low, high = mean_over_prompts([(tuned_N - base_N)[prompt_N == p] for p in range(P)])
    results = [json.loads((workdir(output, name, s) / "result.json").read_text()) for s in range(SEEDS.value)]
    curves = [[of_round["scores"][method.judge]["mean"] for of_round in result["rounds"]] for result in results]
    rounds = len(curves[0])
    seconds = [json.loads((workdir(output, name, s) / SECONDS).read_text()) for s in range(SEEDS.value)]
    return {
        "method": name,
        "model": method.model,
        "judge": method.judge,
        "base": float(base_N.mean()),
        "tuned": float(tuned_N.mean()),
        "rise": rise,
        "low": low,
        "high": high,
        "rises": rises,
        **{total: rounds * value for total, value in results[0]["a_round"].items()},
        "cpu_seconds": round(float(np.mean(seconds))),
        "curve": np.mean(curves, axis=0).round(4).tolist(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| method | judge | base | tuned | rise | of each seed | images judged | evaluations | updates | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rise = f"{r['rise']:+.3f} [{r['low']:+.3f}, {r['high']:+.3f}]"
        rises = " ".join(f"{value:+.3f}" for value in r["rises"])
        lines.append(
            f"| {r['method']} | {r['judge']} | {r['base']:.3f} | {r['tuned']:.3f} | {rise} | {rises} | "
            f"{r['images']:,} | {r['unet_evaluations']:,} | {r['updates']:,} | {r['cpu_seconds'] or '-'} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Plot the mean scores of the images of each round, by the exact judge, against the evaluations until then."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, model in zip(figure.subplots(1, 2), BASES, strict=True):
        for r in rows:
            if r["judge"] == "shapes" and r["model"] == model:
                rounds = np.arange(len(r["curve"]))
                axis.plot(rounds * r["unet_evaluations"] / len(rounds), r["curve"], marker=".", label=r["method"])
        axis.set_title(f"{model} model")
        axis.set_xlabel("evaluations of the denoiser")
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        axis.set_ylabel("score of the images sampled in training")
    figure.savefig(file, dpi=80)


def run(module: str, *arguments: str) -> float:
    """Run a command and return the CPU seconds that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    cli.run(main)
