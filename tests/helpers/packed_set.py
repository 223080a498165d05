"""A small packed set for tests of streaming: WebDataset shards in a random order, row i of the index is sample i; a tiny S3."""
import atexit
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.index.tar import fingerprint
from pipeline.index.header import Archive, ClassInfo, content_sha256
from pipeline.index.sample_index import FORMATS, SAMPLE, SampleIndex
from pipeline.index.writer import write_index


def write_packed(folder: Path, blobs: list[bytes], per_shard: int, *, classes: int = 5, crc32: bool = True,
                 labelled: bool = True, excluded: tuple[int, ...] = ()) -> SampleIndex:
    """`folder`/train-00000.tar … of `per_shard` samples each, and `folder`/index. Without `labelled` no sample has a .cls member
    (the index has the labels nevertheless)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.zeros(len(blobs), SAMPLE)
    order = np.random.default_rng(0).permutation(len(blobs))
    archives = []
    for first in range(0, len(blobs), per_shard):
        path = folder / f"train-{first // per_shard:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for id in order[first:first + per_shard].tolist():
                add(tar, f"{id:08d}.jpg", blobs[id])
                row = rows[id]
                row["offset"] = tar.offset - -(-len(blobs[id]) // 512) * 512
                row["size"], row["header_blocks"], row["archive"] = len(blobs[id]), 1, first // per_shard
                row["crc32"], row["label"] = zlib.crc32(blobs[id]) if crc32 else 0, id % classes
                row["format"], row["channels"], row["excluded"] = FORMATS.index("jpeg"), 3, id in excluded
                try:
                    row["width"], row["height"] = Image.open(io.BytesIO(blobs[id])).size
                except OSError:  # not an image; the test says why it is there
                    row["width"], row["height"] = 76, 76
                if labelled:
                    add(tar, f"{id:08d}.cls", b"%d" % (id % classes))
        archives.append(Archive(path, path.stat().st_size, fingerprint(path), "tar"))
    write_index(folder / "index", rows, classes=[ClassInfo(f"n{i:08d}", f"class {i}") for i in range(classes)],
                archives=archives, splits=["train"], preset="webdataset", crc32=crc32)
    file = folder / "index" / "index.json"
    header = json.loads(file.read_text())
    header["packed"] = {"square_px": 76}
    header["sha256"] = content_sha256(header)
    file.write_text(json.dumps(header))
    return SampleIndex.load(folder / "index")


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


S3_SERVER = '''
import http.server, pathlib, sys
root, log = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def answer(self, body):
        span = self.headers.get("Range")
        with open(log, "a") as file:
            file.write(f"{self.command} {self.path} {span}\\n")
        signed = self.headers.get("authorization", "").startswith("AWS4-HMAC-SHA256 Credential=key/")
        path = root / self.path.lstrip("/")
        if not signed or not path.is_file():
            self.send_response(404 if signed else 403)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = path.read_bytes()
        if span:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                return self.end_headers()
            part = data[first:last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        if body:
            self.wfile.write(part)
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
'''


class TinyS3:
    """A server of the files of `root` that speaks as much S3 as a reader needs (path style, HEAD, GET with Range), in a process
    of its own: a client that holds the GIL while it waits would wait for ever for a thread. `requests`: what it was asked."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.root, self._log = folder, folder / "root", folder / "log"
        self.root.mkdir()
        self._log.write_text("")
        command = [sys.executable, "-c", S3_SERVER, str(self.root), str(self._log)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    @property
    def requests(self) -> list[tuple[str, str, str]]:
        return [tuple(line.split()) for line in self._log.read_text().splitlines()]  # type: ignore[misc]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self._folder)


@functools.cache
def tiny_s3() -> TinyS3:
    """One server for all tests of this process: DALI's client reads the environment once, when the process first uses it."""
    server = TinyS3(Path(tempfile.mkdtemp(prefix="tiny-s3-")))
    os.environ.update(AWS_ENDPOINT_URL=server.url, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret",
                      AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true")
    atexit.register(server.close)
    return server
