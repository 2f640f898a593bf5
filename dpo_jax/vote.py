"""Serve a web page on which people compare generated images, and keep their votes.

  python -m dpo_jax.vote --images=samples/base,samples/tuned --output=votes.sqlite

Each folder holds images and their prompts, as dpo_jax.sample writes them (prompts.jsonl), or a caption beside each
image. Images of the same prompt and seed are compared. Two links are printed. The first opens the page to vote on:
raters give a name there, and nothing that they are sent tells which folder an image is from. The second opens the
results, which do tell: keep it to yourself. A vote is on the disk in --output as soon as it is given, and the same
command continues an interrupted study.

A name belongs to the person who gave it first. To come back on another device, raters open the link of their own that
the page shows when they click on their name. --invite prints such links, and admits nobody else.

By default only this machine can open the page. To let others in, give an address of this machine with --host; the link
then has a token. Votes become training data with

  python -m dpo_jax.vote --output=votes.sqlite --export=votes.jsonl
  python -m dpo_jax.prepare --source=jsonl --input=votes.jsonl --output=data/votes
"""

import importlib.util
import re
import socket
from pathlib import Path

from absl import flags

from dpo_jax import cli, locks
from dpo_jax.errors import UserError
from dpo_jax.voting.study import MODES, QUESTIONS, Question

IMAGES = flags.DEFINE_list("images", None, "Folders of images, comma-separated.")
OUTPUT = flags.DEFINE_string("output", None, "SQLite file of votes; begun if it does not exist.", required=True)
MODE = flags.DEFINE_enum(
    "mode", "pairs", list(MODES), "How to ask.\n" + "\n".join(f"{name}: {mode.help}" for name, mode in MODES.items())
)
ASKED = flags.DEFINE_list(
    "questions",
    None,
    "Questions to ask. Default: all of them for pairs, otherwise the first. With --export: the question to export.\n"
    + "\n".join(f"{name}: {question.text}" for name, question in QUESTIONS.items()),
)
TAGS = flags.DEFINE_list("tags", [], 'Faults to ask for (with --mode=tag), for example "distorted hand,unsafe".')
TIES = flags.DEFINE_bool("ties", False, "Let raters say that both images are alike (with --mode=pairs).")
RATERS = flags.DEFINE_integer(
    "raters", 5, "Votes per comparison, after which it is finished and not asked again.", 1, 2**20
)
STOP_EARLY = flags.DEFINE_bool(
    "stop_early", False, "Finish a comparison once further votes can't change its majority: 3 of 5 instead of all 5."
)
INVITE = flags.DEFINE_list(
    "invite", [], "Names of raters, comma-separated: print a link for each of them, and let nobody else begin to vote."
)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "List of prompts, for folders whose images are named by the number of their prompt (00012.png)."
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve; 0.0.0.0 for all addresses of this machine.")
PORT = flags.DEFINE_integer("port", 8000, "Port to serve; 0 for a free one.", lower_bound=0, upper_bound=65535)
TOKEN = flags.DEFINE_string(
    "token", None, "Token of the raters' link. Default: none if only this machine is served, otherwise a random one."
)
EXPORT = flags.DEFINE_string(
    "export", None, "Write the votes to this file instead: .jsonl for dpo_jax.prepare, .json for D3PO's feedback."
)


def main() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "jinja2", "krippendorff")):
        raise UserError('the page to vote on needs a few more packages: pip install -c constraints.txt -e ".[vote]"')
    if not Path(OUTPUT.value).name:
        raise UserError(f"--output={OUTPUT.value} names no file; take one such as --output=votes.sqlite")
    questions = asked()
    if EXPORT.value is not None:
        export(Path(EXPORT.value), list(TAGS.value or ASKED.value or ()))
    elif IMAGES.value is None:
        raise UserError("--images is missing; name the folders of images, as --images=DIR_A,DIR_B")
    else:
        serve([Path(path) for path in IMAGES.value], questions)


def asked() -> dict[str, Question]:
    """The questions by name."""
    tags = [tag.strip() for tag in TAGS.value or ()]
    if (MODE.value == "tag") != bool(tags) and EXPORT.value is None:
        raise UserError("--mode=tag and --tags need each other; for example --mode=tag --tags='distorted hand,unsafe'")
    if tags:
        return {tag: Question(f"{tag[:1].upper()}{tag[1:]}?") for tag in tags}
    names = ASKED.value or (list(QUESTIONS) if MODE.value == "pairs" else list(QUESTIONS)[:1])
    for name in names:
        if name not in QUESTIONS:
            raise UserError(f"--questions={name}: the questions are {', '.join(QUESTIONS)}")
    return {name: QUESTIONS[name] for name in names}


def export(path: Path, questions: list[str]) -> None:
    from dpo_jax.voting.export import describe, export
    from dpo_jax.voting.store import open_votes

    with open_votes(Path(OUTPUT.value)) as store:
        rows, left_out = export(store, path, questions)
    print(describe(path, rows, left_out))
    if path.suffix == ".json" and left_out:
        print("Images without a vote are null there, which D3PO's own scripts can't read; ask for their votes first")


def serve(paths: list[Path], questions: dict[str, Question]) -> None:
    from dpo_jax.sampling.prompts import read_prompts
    from dpo_jax.voting.access import is_local
    from dpo_jax.voting.app import make_app, results_token
    from dpo_jax.voting.raters import Raters, clean_name, rater_link
    from dpo_jax.voting.server import make_server
    from dpo_jax.voting.store import open_study
    from dpo_jax.voting.study import read_folder, warnings
    from dpo_jax.voting.survey import Survey

    if TOKEN.value is not None and not re.fullmatch(r"[\w-]{8,}", TOKEN.value, re.ASCII):
        raise UserError("--token must have at least 8 letters, digits, - and _, so that nobody can guess it")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("--images names a folder twice")
    for name in INVITE.value:
        if not clean_name(name):
            raise UserError(f"--invite: {name!r} is not a name; a name has one to 64 visible characters")
    prompts = read_prompts(PROMPTS.value, repeated=True) if PROMPTS.value else ()
    folders = [read_folder(path, prompts) for path in paths]
    listener = listen(HOST.value, PORT.value)
    votes = Path(OUTPUT.value)
    with (
        listener,
        open_study(votes, MODE.value, folders) as store,
        locks.locked(votes.parent, "python -m dpo_jax.vote", f".{votes.name}.lock", what=votes),
    ):
        token = TOKEN.value or (None if is_local(HOST.value) else store.opaque("token", "raters"))
        survey = Survey(store, questions, ties=TIES.value, raters=RATERS.value, stop_early=STOP_EARLY.value)
        app = make_app(survey, token, is_open=not INVITE.value)
        print(f"{len(store.tasks)} {store.how.unit}, {RATERS.value} raters each; votes are kept in {store.path}")
        for warning in warnings(folders, list(store.tasks.values()), store.how.unit):
            print(f"warning: {warning}")
        if INVITE.value:
            raters = Raters(store)
            for name in map(clean_name, INVITE.value):
                print(f"{name}: {link(listener, rater_link(token, raters.invite(name)))}")
        print(f"vote:    {link(listener, f'/?token={token}' if token else '/')}")
        print(f"results: {link(listener, f'/results?token={results_token(store)}')}")
        print("Keep the link to the results to yourself: they tell which folder an image is from.", flush=True)
        try:
            make_server(app).run(sockets=[listener])
        except KeyboardInterrupt:
            print(f"\nstopped with {len(store.votes())} votes in {store.path}; the same command continues")


def listen(host: str, port: int) -> socket.socket:
    """Raises ValueError, with the reason, where that address can't be served."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # Python repeats the address
        raise UserError(f"{host}:{port} can't be served ({reason}); choose another --port or --host") from error


def link(listener: socket.socket, path: str) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


if __name__ == "__main__":
    cli.run(main)
