"""The tiny world: captioned images of shapes, their exact judge, and an SDXL-shaped model to tune on a laptop."""
