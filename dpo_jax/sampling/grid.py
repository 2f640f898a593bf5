"""PNG files, written whole or not at all."""

from etils import epath
from PIL import Image

from dpo_jax.files import writing


def save_png(path: epath.PathLike, image: Image.Image) -> None:
    """Writes the image, and its folder where there is none: whole, or not at all."""
    with writing(path) as file:
        image.save(file, format="PNG")
