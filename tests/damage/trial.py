"""One damaged input given to one command, in a process of its own, and what became of it."""

import dataclasses
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .damages import BYTES, SPECIAL

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "tests" / "command_server.py"
SECONDS = 60
"""A command that takes longer hangs: undamaged, none takes a tenth of it."""

DATE = re.compile(rb"20\d\d-\d\d-\d\dT[\d:.+]{8,}")
"""Of an export, in its metadata."""

ODD_TEXTS = (
    *("", "0", "-1", "1", "0.5", "nan", "inf", "-inf", "1e400", "9" * 400, "text", "None", "True", "()", "('a',)"),
    *("(1, 2)", "[", "(", "*", "../../x", "/dev/zero", "/dev/null", "/", ".", "~", "\u00e9\u4e2d", "a\nb", "x" * 5000),
    *("-", "--", "a,b", "a=b", "{}", "lambda: 0", "http://127.0.0.1:9/x"),
)
"""Values of flags and of a config's fields."""

VERDICTS = (
    "refused",  # one sentence that names the file
    "harmless",  # the same result as of the whole file
    "told",  # another result, and the damage is told
    "weights",  # another result from weights, a format that has no checksum
    "another",  # another result from another valid input: a text, an image, a setting
    "silent",
    "unnamed",  # one sentence, and not of which file
    "traceback",
    "hang",
)
NO_OTHER_INPUT = (
    *("empty", "all zeros", "noise alone", "Git LFS pointer", "web page", "pickle", "zip", "gzip", "UTF-16"),
    *("byte order mark", "CR LF", "absent", "a folder", "a pipe", "a link to /dev/zero", "a link to itself"),
)
"""Damages after which a file is not another valid one: it means the same, or is refused."""
BAD = ("silent", "unnamed", "traceback", "hang")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A command and what it reads.

    In `arguments` {input} and {output} stand for the folder of what is read and for that of what is written.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    files: tuple[str, ...]
    """Patterns of those that are damaged, in {input}."""
    ignored: tuple[str, ...] = ()
    """Patterns of files in {output} that are not part of the result, such as times."""
    results: tuple[str, ...] = ("*",)
    """Patterns of those that are."""
    valid: tuple[str, ...] = ()
    """Patterns of files where other contents may be just another valid input, and nothing can tell: people's own texts,
    images and settings, and weights."""
    flags: tuple[str, ...] = ()
    """Flags that get odd values, in place of damaged files."""
    names: tuple[str, ...] = ()
    """What else names a file in a message, beside its own name, such as the folder that it is of."""
    output_is_input: bool = False
    """The command goes on with what it finds in {input}."""
    share: int = 4
    """How many inputs it gets where others get four: fewer if it takes long."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a damaged input."""

    subject: str
    file: str
    damage: str
    verdict: str
    said: str


class Runner:
    """Runs commands in processes forked from one that has imported what they need."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._clean: dict[str, tuple[str, str]] = {}

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)

    def command(self, module: str, arguments: Sequence[str]) -> tuple[int, str, str]:
        """(exit status, stdout, stderr); -14 where it took longer than SECONDS."""
        files = {stream: self.folder / stream for stream in ("stdout", "stderr")}
        for file in files.values():
            file.write_text("")
        request = {"module": module, "arguments": list(arguments), "cwd": str(ROOT), "seconds": SECONDS}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request | {stream: str(file) for stream, file in files.items()}) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        return code, *(file.read_text(errors="replace") for file in files.values())

    def paths(self, subject: Subject) -> tuple[Path, Path]:
        place = self.folder / subject.name
        return place / "input", place / ("input" if subject.output_is_input else "output")

    def begin(self, subject: Subject, pristine: Path) -> None:
        """Lays out the undamaged input."""
        place = self.paths(subject)[0].parent
        shutil.rmtree(place, ignore_errors=True)  # also what an interrupted command left beside its output
        place.mkdir(parents=True)
        shutil.copytree(pristine, self.paths(subject)[0], symlinks=True)

    def run(self, subject: Subject, *more: str) -> tuple[int, str, str, str]:
        """(exit status, stdout, stderr, digest of the result)."""
        source, target = self.paths(subject)
        arguments = [argument.format(input=source, output=target) for argument in subject.arguments] + list(more)
        code, out, err = self.command(subject.module, arguments)
        return code, out, err, self._digest(target, subject)

    def clean(self, subject: Subject, pristine: Path) -> tuple[str, str]:
        """(stdout, digest) of the undamaged input."""
        if subject.name not in self._clean:
            self.begin(subject, pristine)
            code, out, err, digest = self.run(subject)
            assert code == 0, f"{subject.name} fails on whole files: {out}{err}"
            self._clean[subject.name] = out, digest
        return self._clean[subject.name]

    def try_one(self, subject: Subject, pristine: Path, seed: int) -> Result | None:
        """None where the damage that this seed draws does not apply to the file."""
        clean_out, clean_digest = self.clean(subject, pristine)
        self.begin(subject, pristine)
        rng = random.Random(f"{subject.name} {seed}")
        source = self.paths(subject)[0]
        if subject.flags:
            flag, value = rng.choice(subject.flags), rng.choice(ODD_TEXTS)
            code, out, err, _ = self.run(subject, f"{flag}={value}")
            named = any(
                part and part in err + out for part in (re.split(r"[.-]", flag)[-1], re.split(r"[\n,]", value[:100])[0])
            )
            # What is taken is a setting like others: whether it makes sense is for the tests of each.
            found = verdict(code, out, err, same=True, named=named, told=False, valid="")
            said = f"{code}: {(err or out).strip()[-600:]}"
            return Result(subject.name, flag, f"= {value[:40]!r}", found, said)
        file = rng.choice(sorted(path for pattern in subject.files for path in source.glob(pattern) if path.is_file()))
        name = str(file.relative_to(source))
        special = SPECIAL.get(file.suffix)
        damage = rng.choice(special) if special and rng.random() < 0.5 else BYTES[rng.choice(sorted(BYTES))]
        what = damage(file, rng)
        if what is None:
            return None
        code, out, err, digest = self.run(subject)
        valid = ""
        if what not in NO_OTHER_INPUT and any(Path(name).match(pattern) for pattern in subject.valid):
            valid = "weights" if file.suffix == ".safetensors" else "another"
        names = [name.format(input=source) for name in subject.names]
        named = any(part in out + err for part in (file.name, file.stem, *names))
        same = digest == clean_digest
        told = named or self._counts(out) != self._counts(clean_out)
        return Result(subject.name, name, what, verdict(code, out, err, same=same, named=named, told=told, valid=valid),
                      f"{code}: {(err or out).strip()[-600:]}")  # fmt: skip

    def _digest(self, folder: Path, subject: Subject) -> str:
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*")) if folder.exists() else ():
            name = path.relative_to(folder)
            is_result = any(map(name.match, subject.results)) and not any(map(name.match, subject.ignored))
            if path.is_file() and is_result:
                if path.stat().st_size > 2**28:
                    digest.update(f"{name} {path.stat().st_size}".encode())
                    continue
                content = DATE.sub(b"", path.read_bytes())
                if path.suffix in (".json", ".txt"):  # copies of what was read
                    content = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").rstrip(b"\n")
                digest.update(f"{name}\0".encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def _counts(self, out: str) -> list[str]:
        """What `prepare` says it left out."""
        return [line for line in out.splitlines() if re.match(r"(dropped|quarantined|records|rows read)", line)]


def verdict(code: int, out: str, err: str, *, same: bool, named: bool, told: bool, valid: str) -> str:
    if code == -14:
        return "hang"
    if "Traceback (most recent call last)" in err + out or code not in (0, 1, 2):
        return "traceback"
    if code:
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        return "refused" if len(errors) == 1 and named else "unnamed"
    if same:
        return "harmless"
    if told and ("warning" in err or not valid):
        return "told"
    return valid or "silent"
