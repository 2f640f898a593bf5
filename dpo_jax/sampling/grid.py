"""PNG files, written whole or not at all."""

from etils import epath
from PIL import Image

from dpo_jax.files import writing


def save_png(path: epath.PathLike, image: Image.Image) -> None:
    """Write the image, whole or not at all, and create its folder if needed."""
    with writing(path) as file:
        image.save(file, format="PNG")
