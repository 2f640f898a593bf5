"""Files that are there whole or not at all, whatever stops the program."""

from etils import epath


def write_whole(path: epath.PathLike, text: str) -> None:
    """Writes a text file, in place of what was there, and its folder where there is none."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
