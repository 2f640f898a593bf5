"""A web page on which people compare generated images.

  python -m dpo_jax.vote --images=samples/base,samples/tuned --output=votes.sqlite

Each folder has images and their prompts, as dpo_jax.sample writes them (prompts.jsonl), or with a caption beside each
image; images of the same prompt and seed are compared. Raters don't learn which folder an image is from. Votes are
safe in --output as soon as they are given; the same command continues. Results so far are at /results.

Only this machine is served unless --host names an address of it; raters then need the link that is printed, which has a
token. What they said becomes data for training with

  python -m dpo_jax.vote --output=votes.sqlite --export=votes.jsonl
  python -m dpo_jax.prepare --source=jsonl --input=votes.jsonl --output=data/votes
"""

import importlib.util
import re
import secrets
import socket
from pathlib import Path

from absl import flags

from dpo_jax import cli, locks
from dpo_jax.voting.study import MODES, QUESTIONS, Question

IMAGES = flags.DEFINE_list("images", None, "Folders of images, comma-separated.")
OUTPUT = flags.DEFINE_string("output", None, "SQLite file of votes, to begin or to continue.", required=True)
MODE = flags.DEFINE_enum(
    "mode", "pairs", list(MODES), "How to ask.\n" + "\n".join(f"{name}: {mode.help}" for name, mode in MODES.items())
)
ASKED = flags.DEFINE_list(
    "questions",
    None,
    "What to ask; of pairs all of these if not given, of more images the first. With --export whose answers to write.\n"
    + "\n".join(f"{name}: {question.text}" for name, question in QUESTIONS.items()),
)
TAGS = flags.DEFINE_list("tags", [], 'With --mode=tag: the faults to ask for, such as "distorted hand,unsafe".')
TIES = flags.DEFINE_bool("ties", False, "With --mode=pairs: let raters say that both images are alike.")
RATERS = flags.DEFINE_integer("raters", 5, "Votes after which a pair is finished and not asked again.", lower_bound=1)
STOP_EARLY = flags.DEFINE_bool(
    "stop_early", False, "Finish a pair once the votes still to come can't change the majority: 3 of 5, not all 5."
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "List of prompts, for folders whose images have but a number in it (00012.png) to tell theirs."
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve; 0.0.0.0 for all of this machine's.")
PORT = flags.DEFINE_integer("port", 8000, "Port to serve; 0 for a free one.", lower_bound=0, upper_bound=65535)
TOKEN = flags.DEFINE_string(
    "token", None, "What the link must have; made at random if not given and --host is not this machine alone."
)
EXPORT = flags.DEFINE_string(
    "export", None, "Write the votes to this file instead: .jsonl for dpo_jax.prepare, .json for D3PO's scores."
)


def main() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "jinja2", "krippendorff")):
        raise ValueError('the page needs a few more packages: pip install -c constraints.txt -e ".[vote]"')
    questions = asked()
    if EXPORT.value is not None:
        export(Path(EXPORT.value), list(TAGS.value or ASKED.value or ()))
    elif IMAGES.value is None:
        raise ValueError("--images is missing; name the folders of images, as --images=DIR_A,DIR_B")
    else:
        serve([Path(path) for path in IMAGES.value], questions)


def asked() -> dict[str, Question]:
    """The questions by name."""
    tags = [tag.strip() for tag in TAGS.value or ()]
    if (MODE.value == "tag") != bool(tags) and EXPORT.value is None:
        raise ValueError("--mode=tag and --tags go together: --tags='distorted hand,unsafe' names what to ask for")
    if tags:
        return {tag: Question(f"{tag[:1].upper()}{tag[1:]}?") for tag in tags}
    names = ASKED.value or (list(QUESTIONS) if MODE.value == "pairs" else list(QUESTIONS)[:1])
    for name in names:
        if name not in QUESTIONS:
            raise ValueError(f"--questions={name}: the questions are {', '.join(QUESTIONS)}")
    return {name: QUESTIONS[name] for name in names}


def export(path: Path, questions: list[str]) -> None:
    from dpo_jax.voting.export import export
    from dpo_jax.voting.store import open_votes

    with open_votes(Path(OUTPUT.value)) as store:
        rows, left_out = export(store, path, questions)
    print(f"{rows} prompts or pairs with votes written to {path}; {left_out} have none, or not for all images")


def serve(paths: list[Path], questions: dict[str, Question]) -> None:
    import uvicorn

    from dpo_jax.evaluation.prompts import read_prompts
    from dpo_jax.voting.app import make_app
    from dpo_jax.voting.guard import is_local
    from dpo_jax.voting.store import open_study
    from dpo_jax.voting.study import read_folder
    from dpo_jax.voting.survey import Survey

    token = TOKEN.value or (None if is_local(HOST.value) else secrets.token_urlsafe(16))
    if token is not None and not re.fullmatch(r"[\w-]{8,}", token, re.ASCII):
        raise ValueError("--token has at least 8 letters, digits, - and _, so that it can't be guessed")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("--images names a folder twice")
    prompts = read_prompts(PROMPTS.value, repeated=True) if PROMPTS.value else ()
    folders = [read_folder(path, prompts) for path in paths]
    listener = listen(HOST.value, PORT.value)
    votes = Path(OUTPUT.value)
    with (
        listener,
        open_study(votes, MODE.value, folders) as store,
        locks.locked(votes.parent, "python -m dpo_jax.vote", f".{votes.name}.lock", what=votes),
    ):
        survey = Survey(store, questions, ties=TIES.value, raters=RATERS.value, stop_early=STOP_EARLY.value)
        app = make_app(survey, token)
        print(f"{len(store.tasks)} of them to show, each to {RATERS.value} raters; votes are kept in {store.path}")
        print(f"vote:    {link(listener, '/', token)}\nresults: {link(listener, '/results', token)}", flush=True)
        # One sort of HTTP parser whatever else is installed; nothing here needs web sockets.
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_level="error", server_header=False, proxy_headers=False
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:
            print(f"\nstopped with {len(store.votes())} votes in {store.path}; the same command continues")


def listen(host: str, port: int) -> socket.socket:
    """Raises ValueError, with the reason, where that address can't be served."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python repeats the address
        raise ValueError(f"can't serve {host}:{port} ({reason}); take another --port or --host") from error


def link(listener: socket.socket, path: str, token: str | None) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}{f'?token={token}' if token else ''}"


if __name__ == "__main__":
    cli.run(main)
