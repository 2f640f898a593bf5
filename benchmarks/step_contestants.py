"""The contestants of benchmarks/step.py: the training step of dpo_jax, and PyTorch's loops."""

import contextlib
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
WARM_UP = 2
"""Steps before the clock starts, the first of which compiles."""


class Mode(NamedTuple):
    """A config with its batch sizes."""

    config: str
    batch_size: int
    """Pairs per optimizer step."""
    pairs: int
    """Pairs at a time in the step of dpo_jax."""
    dtype: str = "bfloat16"
    cells: int | None = None
    """Height and width of the latents of a random model; published models have their own."""

    @property
    def is_lora(self) -> bool:
        return ":lora" in self.config


MODES = {
    "sdxl-full": Mode("configs/sdxl.py", 16, 4),
    "sdxl-lora": Mode("configs/sdxl.py:lora", 16, 4),
    "sd15-full": Mode("configs/sd15.py", 64, 16),
    "sd15-lora": Mode("configs/sd15.py:lora", 64, 16),
    "tiny": Mode("configs/sdxl.py:tiny", 4, 4, "float32", 16),
    "tiny-sd15": Mode("configs/sd15.py:tiny", 4, 4, "float32", 8),
    "tiny-sd15-lora": Mode("configs/sd15.py:lora,tiny", 4, 4, "float32", 8),
}


def load(mode: Mode) -> Any:
    """Return the config for one device and stored encodings."""
    from dpo_jax.cli import load_config

    c = load_config(str(ROOT / mode.config))
    c.dtype = mode.dtype
    c.data.batch_size, c.data.micro_batch = mode.batch_size, mode.pairs
    c.data.encoded_views, c.data.random_flip, c.data.random_crop = 1, False, False
    c.data.path = "made up"
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 1, 1
    c.ema.decay = 0.0
    if mode.cells:
        c.data.resolution = 8 * mode.cells
    return c


def count_work(mode: Mode) -> float:
    """Return the floating point operations per pair, as the plan counts them."""
    from dpo_jax.planning.estimate import measure_work

    return measure_work(load(mode), "gpu").model_flops


def ceilings() -> dict[str, Any]:
    """Return the best rates of the device: products of large matrices, and copies of large arrays."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    size, dtype = (8192, jnp.bfloat16) if is_gpu else (1024, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys[:2])
    large = jax.random.normal(keys[2], (2**30 if is_gpu else 2**25,), jnp.bfloat16)

    def best(function: Callable[..., Any], *arguments: Any) -> float:
        jax.block_until_ready(function(*arguments))
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            jax.block_until_ready([function(*arguments) for _ in range(4)])
            seconds.append((time.perf_counter() - started) / 4)
        return min(seconds)

    product, copied = best(jax.jit(jnp.matmul), a, b), best(jax.jit(jnp.negative), large)
    return {
        "device": device.device_kind,
        "tflops": 2 * size**3 / product / 1e12,
        "copy_gb_s": 2 * large.nbytes / copied / 1e9,
    }


def timed(step: Callable[[int], Any], wait: Callable[[Any], float], seconds: float) -> dict[str, float]:
    """Return the steps per second after warming up. `wait` waits for the result of a step and returns its loss."""
    started = time.perf_counter()
    loss = wait(step(0))
    first = time.perf_counter() - started
    for number in range(1, WARM_UP):
        wait(step(number))
    started, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        wait(step(WARM_UP + steps))
        steps += 1
    return {"steps_a_second": steps / passed, "first_step_seconds": first, "loss": loss}


# Ours.


def ours(mode: Mode, seconds: float) -> dict[str, Any]:
    import jax

    from dpo_jax.planning.model_shapes import open_structure
    from dpo_jax.planning.synthetic import random_batch, random_state
    from dpo_jax.sharding import Placement, make_mesh, rules_of
    from dpo_jax.training.config import resolve
    from dpo_jax.training.experiment import compose

    device = jax.devices()[0]
    config = load(mode)
    pipeline = open_structure(config)
    placement = Placement(make_mesh(1, 1, 1, [device]), rules_of(config.mesh.rules))
    experiment = compose(config, resolve(config, device_count=1, process_count=1), pipeline, placement)
    state, frozen = random_state(experiment)
    batches = [random_batch(experiment, seed) for seed in range(4)]
    started = time.perf_counter()
    compiled = experiment.train_step().lower(state, frozen, batches[0]).compile()
    compile_seconds = time.perf_counter() - started

    def step(number: int) -> Any:
        nonlocal state
        state, metrics = compiled(state, frozen, batches[number % len(batches)])
        return metrics

    figures = timed(step, lambda metrics: float(metrics["train/loss"]), seconds)
    used = device.memory_stats() or {}
    return report(mode, figures, mode.pairs, compile_seconds, used.get("peak_bytes_in_use"))


def report(
    mode: Mode, figures: dict[str, float], pairs: int, compile_seconds: float, peak: int | None
) -> dict[str, Any]:
    memory = {} if peak is None else {"peak_gib": peak / 2**30}  # CPUs don't say
    return memory | {
        "pairs_a_second": figures["steps_a_second"] * mode.batch_size,
        "pairs_at_a_time": pairs,
        "compile_seconds": compile_seconds,
        "first_step_seconds": figures["first_step_seconds"],
        "loss": figures["loss"],
    }


# PyTorch's. What is published does the same for all: errors of policy and reference on two noisy latents.


def peer(name: str, mode: Mode, seconds: float) -> dict[str, Any]:
    """Run a peer; P2 halves its pairs at a time until they fit."""
    import torch

    sizes = [2**i for i in range(10, -1, -1) if mode.batch_size % 2**i == 0] if name == "P2" else [1]
    for pairs in sizes:
        torch.cuda.empty_cache()  # not in `except`, where what didn't fit is still held
        try:
            return run_peer(name, mode, pairs, seconds)
        except torch.OutOfMemoryError:
            continue
        except Exception as error:  # a table with a reason is worth more than none
            return {"failed": f"{type(error).__name__}: {error}"[:200]}
    return {"failed": "out of memory with one pair at a time"}


def run_peer(name: str, mode: Mode, pairs: int, seconds: float) -> dict[str, Any]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = {"bfloat16": torch.bfloat16, "float32": torch.float32}[mode.dtype]
    if name == "P0" and low != torch.float32:
        low = torch.float16
    torch.manual_seed(0)
    shapes = PeerShapes.of(mode)
    networks = PeerNetworks.make(name, mode, shapes, device, low)
    trained = [parameter for parameter in networks.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adafactor(trained, 1e-6) if shapes.adafactor else torch.optim.AdamW(trained, 1e-6)
    scaler = torch.amp.GradScaler(device.type, enabled=low == torch.float16)
    # Autocast as the scripts have it; P2's weights are of that dtype already, but for a LoRA's.
    cast = low != torch.float32 and (name != "P2" or mode.is_lora)
    micro_batches = mode.batch_size // pairs
    data = [shapes.inputs(pairs, device, low, networks.encoders is not None) for _ in range(4)]

    def step(number: int) -> Any:
        total = torch.zeros((), device=device)
        for i in range(micro_batches):
            with torch.autocast(device.type, low, enabled=cast):
                loss = networks.loss(data[(number + i) % len(data)], low) / micro_batches
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    figures = timed(step, lambda loss: float(loss), seconds)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    steady = 1 / figures["steps_a_second"]
    return report(mode, figures, pairs, max(0.0, figures["first_step_seconds"] - steady), peak)


class PeerNetworks(NamedTuple):
    """The networks that the loss of a peer runs."""

    unet: Any
    reference: Any
    """None if the reference is the UNet without its LoRA."""
    policy_forward: Callable[..., Any]
    reference_forward: Callable[..., Any]
    schedule: Any
    encoders: "PeerEncoders | None"

    @classmethod
    def make(cls, name: str, mode: Mode, shapes: "PeerShapes", device: Any, low: Any) -> "PeerNetworks":
        import diffusers
        import torch

        with device:
            unet = diffusers.UNet2DConditionModel.from_config(shapes.configs["unet"])
            encoders = PeerEncoders.make(shapes, low) if name == "P0" else None
        reference = None
        if mode.is_lora:
            add_lora(unet.requires_grad_(False).to(low), shapes.rank)
        else:
            reference = copy.deepcopy(unet).requires_grad_(False).to(low)
        if name == "P2":
            for network in filter(None, (unet, reference)):
                network.to(memory_format=torch.channels_last)
            if not mode.is_lora:
                unet.to(low)
        else:
            unet.enable_gradient_checkpointing()
        unet.train()
        compiled = torch.compile if name == "P2" else lambda network: network
        policy_forward = compiled(unet)
        reference_forward = policy_forward if reference is None else compiled(reference)
        schedule = diffusers.DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
        )
        return cls(unet, reference, policy_forward, reference_forward, schedule, encoders)

    def loss(self, inputs: dict[str, Any], low: Any) -> Any:
        """Return the loss of winners followed by losers; both of a pair have the same noise and timestep."""
        import torch

        with torch.no_grad():
            if self.encoders is not None:
                inputs = self.encoders(inputs, low)
            latents = inputs["latents"]
            noise = torch.randn_like(latents[: len(latents) // 2]).repeat(2, 1, 1, 1)
            t = torch.randint(0, 1000, (len(latents) // 2,), device=latents.device).repeat(2)
            noisy = self.schedule.add_noise(latents, noise, t)

        def errors(forward: Callable[..., Any]) -> Any:
            predicted = forward(noisy, t, inputs["context"], added_cond_kwargs=inputs["added"]).sample
            return (predicted.float() - noise.float()).square().mean(dim=(1, 2, 3)).chunk(2)

        winner, loser = errors(self.policy_forward)
        with torch.no_grad(), self.without_lora():
            winner_before, loser_before = errors(self.reference_forward)
        inside = -0.5 * 5000 * ((winner - loser) - (winner_before - loser_before))
        return -torch.nn.functional.logsigmoid(inside).mean()

    @contextlib.contextmanager
    def without_lora(self) -> Iterator[None]:
        if self.reference is None:
            self.unet.disable_adapters()
        yield
        if self.reference is None:
            self.unet.enable_adapters()


def add_lora(unet: Any, rank: int) -> None:
    """Add a LoRA to queries, keys, values and outputs of every attention layer, in float32."""
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class PeerShapes(NamedTuple):
    """The model and the inputs of a mode for diffusers."""

    configs: dict[str, dict[str, Any]]
    """Configs of the components that have weights, by the name of their folder."""
    cells: int
    tokens: int
    context: int
    pooled: int
    rank: int
    adafactor: bool

    @classmethod
    def of(cls, mode: Mode) -> "PeerShapes":
        from dpo_jax.models.families import PUBLISHED
        from dpo_jax.models.random_model import write_random_model
        from dpo_jax.planning.model_shapes import open_structure

        config = load(mode)
        pipeline = open_structure(config)
        unet, encoded = pipeline.denoiser.config, config.data.resolution // pipeline.vae_factor
        with tempfile.TemporaryDirectory() as temporary:
            folder = PUBLISHED / pipeline.family.name
            if config.model.startswith("random:"):
                folder = Path(temporary, "model")
                write_random_model(pipeline.family.name, folder)
            configs = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("*/config.json")}
        pooled = (unet.projection_class_embeddings_input_dim or 0) - 6 * (unet.addition_time_embed_dim or 0)
        return cls(
            configs,
            encoded,
            configs["text_encoder"]["max_position_embeddings"],
            unet.cross_attention_dim[0],
            pooled,
            config.lora.rank,
            config.optimizer.name == "adafactor",
        )

    def inputs(self, pairs: int, device: Any, dtype: Any, raw: bool) -> dict[str, Any]:
        """Return winners followed by losers, as images and captions if `raw`."""
        import torch

        n, size = 2 * pairs, 8 * self.cells
        added = {}
        if self.pooled:
            ids = torch.tensor([size, size, 0, 0, size, size], device=device, dtype=dtype).repeat(n, 1)
            added = {"text_embeds": torch.randn(n, self.pooled, device=device, dtype=dtype), "time_ids": ids}
        found = {"added": added}
        if raw:
            pixels = torch.rand(n, 3, size, size, device=device) * 2 - 1
            return found | {"pixels": pixels, "ids": torch.randint(0, 400, (n, self.tokens), device=device)}
        return found | {
            "latents": torch.randn(n, 4, self.cells, self.cells, device=device, dtype=dtype),
            "context": torch.randn(n, self.tokens, self.context, device=device, dtype=dtype),
        }


class PeerEncoders(NamedTuple):
    """VAE and text encoders, which run in every step, as in the scripts."""

    vae: Any
    texts: list[Any]

    @classmethod
    def make(cls, shapes: PeerShapes, dtype: Any) -> "PeerEncoders":
        import diffusers
        import transformers

        vae = diffusers.AutoencoderKL.from_config(shapes.configs["vae"])
        kinds = {"text_encoder": transformers.CLIPTextModel, "text_encoder_2": transformers.CLIPTextModelWithProjection}
        texts = [
            kind(transformers.CLIPTextConfig(**shapes.configs[name])).to(dtype).requires_grad_(False)
            for name, kind in kinds.items()
            if name in shapes.configs
        ]
        return cls(vae.to(dtype).requires_grad_(False), texts)

    def __call__(self, inputs: dict[str, Any], dtype: Any) -> dict[str, Any]:
        import torch

        latents = self.vae.encode(inputs["pixels"].to(dtype)).latent_dist.sample() * self.vae.config.scaling_factor
        found = [text(inputs["ids"], output_hidden_states=True) for text in self.texts]
        added = dict(inputs["added"])
        if len(self.texts) == 1 and not added:
            return {"latents": latents, "context": found[0].last_hidden_state, "added": added}
        added["text_embeds"] = found[-1].text_embeds
        context = torch.cat([output.hidden_states[-2] for output in found], dim=-1)
        return {"latents": latents, "context": context, "added": added}
