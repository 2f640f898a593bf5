"""The tiny world: captioned images of shapes, their exact judge, and an SDXL and a flow model to tune on a laptop."""
