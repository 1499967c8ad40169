"""A stand-in for W&B's service on this machine: says yes to what a run asks, and keeps the rows that it sends."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

PROJECT = {"id": "project", "name": "v4train", "entity": {"id": "entity", "name": "me"}}
ANSWERS = {  # by a word of the query, as wandb 0.31.0 asks; it crashes where a part is missing
    "createRunFiles": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}},
    "RunResumeStatus": {"model": None},
    "serverInfo": {"serverInfo": {"features": []}},
    "viewer": {"viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
}


def run_made(name: str) -> dict:
    """Answer to `upsertBucket`: the run is there, under the name (W&B's id) that it came with."""
    bucket = {"id": name, "name": name, "displayName": name, "config": "{}", "project": PROJECT, "historyLineCount": 0}
    return {"upsertBucket": {"bucket": bucket, "inserted": True}}


class Service:
    """Context manager; `url` while it is entered, `rows` of the history that came, by run id."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict]] = {}
        self.came = threading.Event()  # a row has
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                answer = json.dumps(service.answer(self.path, json.loads(body or b"{}"))).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                """Not to stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, path: str, asked: dict) -> dict:
        if path.endswith("/file_stream"):
            history = asked.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.rows.setdefault(path.split("/")[-2], []).extend(map(json.loads, history))
            if history:
                self.came.set()
            return {}
        query = asked.get("query", "")
        if "upsertBucket" in query:
            return {"data": run_made(asked["variables"]["name"])}
        return {"data": next((answer for word, answer in ANSWERS.items() if word in query), {})}

    def __enter__(self) -> "Service":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
