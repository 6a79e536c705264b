"""Start the HTTP service, ask it for images, and read what they cost.

    python examples/http_service.py

The service speaks OpenAI's images API; its client works, too: adadiff/serving/README.md. This script needs Python alone
as client, and `pip install -e '.[serve]'` in the clone for the service, which it starts on a free port and stops again.

Takes 6 s of CPU time, writes http_service_0.png and http_service_1.png and prints:

    digits: 8x8, 13 blocks
    full       0% of the blocks left out
    exit:0.1  36% of the blocks left out
    quick     54% of the blocks left out
    the service ended with exit code 0
"""

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

SERVE = ["-m", "adadiff", "serve", "digits", "--port", "0", "--log-format", "json", "--policy", "quick=exit:depth=6"]


def wait_for(server: subprocess.Popen[str], event: str) -> dict[str, Any]:
    """The line of the log that tells of it."""
    for line in server.stderr:
        if line.startswith("{") and (told := json.loads(line))["event"] == event:
            return told
    raise RuntimeError(f"the service ended before it said {event!r}")


def ask(address: str, **body: Any) -> dict[str, Any]:
    request = Request(
        f"{address}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=60) as reply:
        return json.load(reply)


def main() -> None:
    server = subprocess.Popen([sys.executable, *SERVE], stderr=subprocess.PIPE, text=True)
    try:
        address = wait_for(server, "serving")["address"]
        wait_for(server, "model is ready")
        with urlopen(f"{address}/v1/models") as reply:
            (model,) = json.load(reply)["data"]
        print(f"{model['id']}: {model['adadiff']['size']}, {model['adadiff']['num_layers']} blocks")
        for policy in ("full", "exit:0.1", "quick"):
            reply = ask(address, class_label=7, seed=1, n=2, num_inference_steps=20, policy=policy)
            print(f"{policy:8} {reply['adadiff']['share_left_out']:4.0%} of the blocks left out")
        for i, image in enumerate(reply["data"]):
            Path(f"http_service_{i}.png").write_bytes(base64.b64decode(image["b64_json"]))
    finally:
        server.terminate()  # finishes what is in flight
        server.communicate()
    print(f"the service ended with exit code {server.returncode}")


if __name__ == "__main__":
    main()
