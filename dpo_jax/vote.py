"""Serve a web page on which people compare generated images, and store their votes.

  python -m dpo_jax.vote --images=samples/base,samples/tuned --output=votes.sqlite

Each folder holds the images of one model with their prompts, as dpo_jax.sample writes them (prompts.jsonl), or with a
caption file beside each image. The page shows images of the same prompt and seed side by side. The command prints two
links. The first link is for raters: they give a name and vote, and nothing that they receive tells which folder an
image is from. The second link is for you: it shows the results and offers them as downloads. Every vote is on disk in
--output before the next question appears, and the same command continues an interrupted study.

A name belongs to the person who gave it first. To continue on another device, raters open their own link, which the
page shows when they click their name. --invite prints such links and lets nobody else vote.

By default only this machine can open the page. To let others in, set --host to an address of this machine; the raters'
link then contains a token. Votes become training data with

  python -m dpo_jax.vote --output=votes.sqlite --export=votes.jsonl
  python -m dpo_jax.prepare --source=jsonl --input=votes.jsonl --output=data/votes
"""

import importlib.util
import re
from pathlib import Path

from absl import flags

from dpo_jax import cli, locks
from dpo_jax.command_help import section
from dpo_jax.errors import UserError
from dpo_jax.voting.study import MODES, QUESTIONS, Question

PACKAGES = "starlette", "uvicorn", "jinja2", "krippendorff"

section("Images and votes")
IMAGES = flags.DEFINE_list("images", None, "Folders of images, one per model, comma-separated.")
OUTPUT = flags.DEFINE_string("output", None, "SQLite file of votes; created if it does not exist.", required=True)
PROMPTS = flags.DEFINE_string(
    "prompts", None, "List of prompts, for folders whose images are named by the number of their prompt (00012.png)."
)

section("Questions")
MODE = flags.DEFINE_enum(
    "mode",
    "pairs",
    list(MODES),
    "What raters see and answer.\n" + "\n".join(f"{name}: {mode.help}" for name, mode in MODES.items()),
)
QUESTION_NAMES = flags.DEFINE_list(
    "questions",
    None,
    "Questions to ask. Default: all of them for pairs, otherwise the first. With --export: the question to export.\n"
    + "\n".join(f"{name}: {question.text}" for name, question in QUESTIONS.items()),
)
TAGS = flags.DEFINE_list("tags", [], 'Faults to ask about (with --mode=tag), for example "distorted hand,unsafe".')
TIES = flags.DEFINE_bool("ties", False, 'Offer the answer "Both alike" (with --mode=pairs).')

section("Raters")
RATERS = flags.DEFINE_integer(
    "raters",
    5,
    "Votes per comparison; then nobody else is asked. The results count every vote, including those of a single rater.",
    1,
    2**20,
)
STOP_EARLY = flags.DEFINE_bool(
    "stop_early",
    False,
    "Stop asking about a comparison once further votes cannot change its majority (for example after 3 equal votes of "
    "5).",
)
INVITE = flags.DEFINE_list(
    "invite", [], "Names of raters, comma-separated: print a link for each of them and let nobody else vote."
)

section("Server")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve on; 0.0.0.0 for all addresses of this machine.")
PORT = flags.DEFINE_integer("port", 8000, "Port to serve on; 0 for a free port.", lower_bound=0, upper_bound=65535)
TOKEN = flags.DEFINE_string(
    "token", None, "Token in the raters' link. Default: none if only this machine is served, otherwise a random one."
)

section("Export, in place of serving")
EXPORT = flags.DEFINE_string(
    "export",
    None,
    "Write the votes to this file, in any folder, instead of serving the page: .jsonl for dpo_jax.prepare, .json for "
    "D3PO's feedback, .csv with every vote.",
)


def main() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"dpo_jax.vote needs packages that are not installed; run pip install {' '.join(missing)}")
    if not Path(OUTPUT.value).name:
        raise UserError(f"--output={OUTPUT.value} does not name a file; set it to a file such as votes.sqlite")
    questions = chosen_questions()
    if EXPORT.value is not None:
        export(Path(EXPORT.value), list(TAGS.value or QUESTION_NAMES.value or ()))
    elif IMAGES.value is None:
        raise UserError("--images is missing; set it to the folders of images: --images=DIR_A,DIR_B")
    else:
        serve([Path(path) for path in IMAGES.value], questions)


def chosen_questions() -> dict[str, Question]:
    """Return the questions by name, or one question per fault for --mode=tag."""
    tags = [tag.strip() for tag in TAGS.value or ()]
    if (MODE.value == "tag") != bool(tags) and EXPORT.value is None:
        raise UserError(
            "--mode=tag and --tags only work together; for example --mode=tag --tags='distorted hand,unsafe'"
        )
    if tags:
        return {tag: Question(f"{tag[:1].upper()}{tag[1:]}?") for tag in tags}
    names = QUESTION_NAMES.value or (list(QUESTIONS) if MODE.value == "pairs" else list(QUESTIONS)[:1])
    for name in names:
        if name not in QUESTIONS:
            raise UserError(f"--questions={name} is not a question; choose from {', '.join(QUESTIONS)}")
    return {name: QUESTIONS[name] for name in names}


def export(path: Path, questions: list[str]) -> None:
    from dpo_jax.voting.export import describe, export
    from dpo_jax.voting.store import open_votes

    with open_votes(Path(OUTPUT.value)) as store:
        exported, missing = export(store, path, questions)
    print(describe(path, exported, missing))


def serve(paths: list[Path], questions: dict[str, Question]) -> None:
    from dpo_jax.sampling.prompts import read_prompts
    from dpo_jax.voting.access import is_local
    from dpo_jax.voting.app import make_app, results_token
    from dpo_jax.voting.raters import MAX_NAME_LENGTH, Raters, clean_name, rater_link
    from dpo_jax.voting.server import link, listen, make_server
    from dpo_jax.voting.store import open_study
    from dpo_jax.voting.study import read_folder, warnings
    from dpo_jax.voting.survey import Survey

    if TOKEN.value is not None and not re.fullmatch(r"[\w-]{8,}", TOKEN.value, re.ASCII):
        raise UserError(
            "--token must have at least 8 characters (letters, digits, - and _), so that nobody can guess it"
        )
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"--images={','.join(IMAGES.value or ())} names a folder twice; remove one of them")
    for name in INVITE.value:
        if not clean_name(name):
            raise UserError(
                f"--invite: {name!r} is not a valid name; a name has 1 to {MAX_NAME_LENGTH} visible characters"
            )
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
        raters_each = "1 rater each" if RATERS.value == 1 else f"{RATERS.value} raters each"
        print(f"{len(store.tasks)} {store.rules.unit}, {raters_each}; votes are stored in {store.path}")
        for warning in warnings(folders, list(store.tasks.values()), store.rules.unit):
            print(f"warning: {warning}")
        if INVITE.value:
            raters = Raters(store)
            for name in map(clean_name, INVITE.value):
                print(f"{name}: {link(listener, rater_link(token, raters.invite(name)))}")
        print(f"vote:    {link(listener, f'/?token={token}' if token else '/')}")
        print(f"results: {link(listener, f'/results?token={results_token(store)}')}")
        print("Do not give raters the results link: the results tell the folders apart.", flush=True)
        try:
            make_server(app).run(sockets=[listener])
        except KeyboardInterrupt:
            print(f"\nStopped with {len(store.votes())} votes in {store.path}. The same command continues.")


if __name__ == "__main__":
    cli.run(main)
