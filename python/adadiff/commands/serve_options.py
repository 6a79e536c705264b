"""Options of `adadiff serve`."""

from pathlib import Path

from ..engine.admission import ADMISSIONS
from ..forward.two_stage import T_SWITCH
from ..pipelines.text import CLIP
from ..serving.settings import DEFAULT_STEPS
from . import serve
from .options import MODELS, Commands, add_command, add_decoder, add_device, add_execution
from .texts import POLICY_TABLE


def add_serve(commands: Commands) -> None:
    command = add_command(commands, "serve", serve.serve)
    command.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=f"models to draw with, each the name of one in the package ({MODELS}), a file, or NAME=FILE; requests "
        "that name no model get the first",
    )

    address = command.add_argument_group("where to listen")
    address.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 listens on all networks of this machine (default: 127.0.0.1)",
    )
    address.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    address.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="file of API keys, one a line; requests must send one of them. The environment variable "
        f"{serve.KEY_VARIABLE} adds one (default: none)",
    )

    limits = command.add_argument_group("limits")
    limits.add_argument("--max-images", type=int, default=16, metavar="N", help="most images per request (default: 16)")
    limits.add_argument("--max-steps", type=int, default=250, metavar="N", help="most steps of an image (default: 250)")
    limits.add_argument(
        "--max-body", type=int, default=65536, metavar="BYTES", help="largest body of a request (default: 65536)"
    )
    limits.add_argument(
        "--queue",
        type=int,
        default=256,
        metavar="N",
        help="images that may wait for a slot; requests beyond are told to come again later (default: 256)",
    )

    drawing = command.add_argument_group("how to draw", POLICY_TABLE)
    drawing.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"steps of requests that name none (default: {DEFAULT_STEPS}, or --max-steps if that is less)",
    )
    drawing.add_argument(
        "--policy",
        action="append",
        metavar="NAME=SPELLING",
        help="policy that clients may ask for by NAME; unlike a client's own, it may read files and import classes. "
        "Requests without a policy get the one named default; repeat the option for several (default: none)",
    )

    drawing.add_argument(
        "--shallow-model",
        action="append",
        metavar="NAME=FILE",
        help="shallower model that replaces the model NAME at noisy timesteps, for all requests, as in DuoDiff; FILE "
        "alone will do if a single model is served; repeat the option for several (default: none)",
    )
    drawing.add_argument(
        "--t-switch",
        type=float,
        metavar="T",
        help="timestep, between 0 (least noise) and 1000 (most noise): shallow models run at T and above; needs "
        f"--shallow-model (default: {T_SWITCH:g})",
    )

    outside = command.add_argument_group("text and latents")
    outside.add_argument(
        "--text-encoder",
        type=Path,
        metavar="FOLDER",
        help="text encoder (CLIP) for text-to-image models, a folder or a name on the Hugging Face hub "
        f"(default: {CLIP}, if such a model is served)",
    )
    add_decoder(outside)

    operation = command.add_argument_group("logs and end")
    operation.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="format of the log on stderr (default: text)"
    )
    operation.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time for requests in flight after SIGTERM or Ctrl-C; then they are cancelled (default: 30)",
    )

    execution = command.add_argument_group("execution")
    execution.add_argument(
        "--capacity",
        type=lanes,
        default=64,
        metavar="LANES",
        help="most lanes in one forward pass of each model (a guided image takes two), or the memory that they may "
        "take, as in 2GiB (default: 64)",
    )
    execution.add_argument(
        "--admission",
        choices=ADMISSIONS,
        default="arrival",
        help="order of waiting requests: arrival, first come, first served; work, the least expected work first, which "
        "answers most of them sooner and long ones later (default: arrival)",
    )
    add_device(execution)
    add_execution(execution)


def lanes(text: str) -> int | str:
    """Capacity for `Engine`: an int for a number of lanes; other text, such as "2GiB", as it is."""
    return int(text) if text.isdecimal() else text
