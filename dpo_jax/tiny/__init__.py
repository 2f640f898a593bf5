"""The embedded default: a small captioned world and an SDXL-shaped model of it, to tune on a laptop."""
