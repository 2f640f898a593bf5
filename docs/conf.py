"""Settings of the documentation: `python -m sphinx -W -b html docs runs/docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import reference  # the pages that are made of the code

import dpo_jax

project = "dpo_jax"
version = release = dpo_jax.__version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"dpo_jax {release}"
myst_heading_anchors = 3
smartquotes = False  # a flag begins with two hyphens
pygments_style = "friendly"


def setup(app):
    """Write the pages of commands and fields before Sphinx reads the folder."""
    reference.write_pages(Path(__file__).parent / "reference")
