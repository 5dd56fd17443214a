"""Runs `resolve` in a process of its own: huggingface_hub reads its environment when it is imported.

Reads a line of JSON (resolve's arguments), answers with one: the path or the error, the log, the sockets used.
"""

import json
import logging
import sys

connections: list[str] = []
sys.addaudithook(lambda event, _: connections.append(event) if event.startswith("socket.") else None)

from fastsd.checkpoints import open_autoencoder, open_folder, resolve, resolve_autoencoder  # noqa: E402
from fastsd.checkpoints.lora import find_lora  # noqa: E402
from fastsd.errors import FastSDError  # noqa: E402

records: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger("fastsd").addHandler(handler)
logging.getLogger("fastsd").setLevel(logging.INFO)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        connections.clear()
        records.clear()
        answer: dict[str, object] = {}
        try:
            if request.pop("lora", False):
                path = find_lora(request.pop("name"), **request)
            elif request.pop("autoencoder", False):
                path = resolve_autoencoder(request.pop("name"), **request)
                open_autoencoder(path, variant=request.get("variant"))
            else:
                path = resolve(request.pop("name"), **request)
                open_folder(path, variant=request.get("variant"))
            answer["path"] = str(path)
        except FastSDError as error:
            answer |= {"error": type(error).__name__, "message": str(error)}
        except BaseException as error:
            answer |= {"error": f"LEAKED {type(error).__name__}", "message": str(error)}
        print(json.dumps(answer | {"log": list(records), "sockets": list(connections)}), flush=True)


main()
