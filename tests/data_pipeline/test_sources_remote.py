import gzip
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from data_pipeline.config import Source
from data_pipeline.document import Damage
from data_pipeline.sources import remote
from data_pipeline.sources.files import find_files, open_file
from data_pipeline.sources.record import RawRecord
from data_pipeline.sources.shards import list_shards, read_shard, source_name
from megagpt.errors import DataError

LINES = b"".join(json.dumps({"text": f"Ducks {n} swim."}).encode() + b"\n" for n in range(500))


def texts(source: Source) -> list[str | None]:
    found = [one for shard in list_shards(source, 0) for one in read_shard(shard, source)]
    assert not any(isinstance(one, Damage) for one in found)
    return [one.text for one in found if isinstance(one, RawRecord)]


class Server(ThreadingHTTPServer):
    """Serves files by byte ranges; the next `n_failures` answers are 503, `with_ranges` off: always whole files."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.n_failures = 0
        self.with_ranges = True
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def answer(self, *, with_body: bool) -> None:
        data = self.server.files.get(self.path)
        if self.server.n_failures:
            self.server.n_failures -= 1
            self.send_error(503)
            return
        if data is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range") if self.server.with_ranges else None
        if wanted:
            start, end = map(int, wanted.removeprefix("bytes=").split("-"))
            data = data[start : end + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server({"/a.jsonl.gz": gzip.compress(LINES)}) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0.01, 0.01, 0.01))


def test_memory_and_file_addresses_and_globs_are_read(tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("memory")
    for name in ("b/2.jsonl", "b/1.jsonl.gz", "b/.hidden.jsonl"):
        filesystem.pipe_file(f"/corpus/{name}", gzip.compress(LINES) if name.endswith(".gz") else LINES)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(filesystem.cat_file(f"/corpus/{name}"))
    for root in ("memory://corpus", f"file://{tmp_path}"):
        for path in (root, f"{root}/*/*.jsonl*", f"{root}/b"):
            shards = list_shards(Source(path=path), 0)
            assert [Path(shard.path).name for shard in shards] == ["1.jsonl.gz", "2.jsonl"], path
            assert [shard.size_bytes for shard in shards] == [len(gzip.compress(LINES)), len(LINES)]
            assert len(texts(Source(path=path))) == 1000
    assert find_files("memory://corpus/nowhere/*.jsonl") == []
    assert find_files("memory://nowhere") == []


def test_a_web_server_is_read_in_ranges_and_a_failing_one_again(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(path=f"{server.url}/a.jsonl.gz")
    assert len(texts(source)) == 500
    with open_file(source.path) as file:
        file.read(10)
        server.n_failures = 2
        with caplog.at_level(logging.WARNING):
            raw = file.raw
            raw.seek(100)
            assert raw.read(50) == server.files["/a.jsonl.gz"][100:150]
    assert caplog.text.count("a.jsonl.gz: bytes 100 to 150 cannot be read, next attempt in") == 2


def test_a_server_that_stays_broken_and_a_missing_file_are_errors(server: Server) -> None:
    server.n_failures = 1000
    with pytest.raises(DataError, match=r"a.jsonl.gz: its size cannot be read in 4 attempts"):
        open_file(f"{server.url}/a.jsonl.gz")
    server.n_failures = 0
    with pytest.raises(DataError, match=r"gone.jsonl: cannot be opened"):
        open_file(f"{server.url}/gone.jsonl")


def test_a_server_without_ranges_is_refused_rather_than_misread(server: Server) -> None:
    server.with_ranges = False
    with open_file(f"{server.url}/a.jsonl.gz") as file:
        raw = file.raw
        raw.seek(100)
        with pytest.raises(DataError, match=r"the server sends the whole file for a range of it; download it first"):
            raw.read(50)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "s3://bucket/*.warc.gz",
            r"s3://bucket/\*.warc.gz: s3:// needs a package that is not installed.*pip install s3fs",
        ),
        ("gs://bucket/a.jsonl", "gs:// needs a package that is not installed.*pip install gcsfs"),
        ("nonsense://x/a.jsonl", "nonsense://x/a.jsonl: .*nonsense.* known are .*s3"),
    ],
)
def test_a_protocol_without_its_package_is_an_error_with_the_command(path: str, message: str) -> None:
    protocol = path.partition("://")[0]
    if {"s3": "s3fs", "gs": "gcsfs"}.get(protocol, "") in fsspec.available_protocols():
        pytest.skip("installed here")
    with pytest.raises(DataError, match=message):
        list_shards(Source(path=path), 0)


@pytest.mark.parametrize("name", ["x.paths", "x.paths.gz"])
def test_a_paths_file_names_the_files_in_its_order(tmp_path: Path, name: str) -> None:
    for file in ("b.jsonl", "a.jsonl"):
        (tmp_path / file).write_bytes(LINES)
    listing = f"# a comment\n\n  {tmp_path}/b.jsonl\nmemory://far/c.jsonl.zst\r\n{tmp_path}/a.jsonl\n".encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(listing) if name.endswith(".gz") else listing)
    source = Source(paths_file=path)
    assert [(Path(s.path).name, s.kind, s.size_bytes, s.ordinal) for s in list_shards(source, 3)] == [
        ("b.jsonl", "jsonl", len(LINES), 3),
        ("c.jsonl.zst", "jsonl", 0, 4),
        ("a.jsonl", "jsonl", len(LINES), 5),
    ]
    assert source_name(source) == "x"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n", "the list of paths is empty"),
        (b"/gone/a.jsonl\n", "/gone/a.jsonl: named in a list of paths, but cannot be opened: No such file"),
        (b"s3://b/a.jsonl\ns3://b/a.jsonl\n", "s3://b/a.jsonl is listed twice"),
        (b"\xff", "not UTF-8 at byte 0"),
        (gzip.compress(b"s3://b/a.jsonl")[:-9], "the list of paths cannot be read"),
    ],
)
def test_a_wrong_paths_file_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.paths").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list_shards(Source(paths_file=tmp_path / "x.paths"), 0)


def test_path_and_paths_file_together_and_a_missing_list_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="both path and paths_file are set"):
        list_shards(Source(path="a.jsonl", paths_file=tmp_path / "x.paths"), 0)
    with pytest.raises(DataError, match=r"x.paths: the list of paths cannot be read: No such file"):
        list_shards(Source(paths_file=tmp_path / "x.paths"), 0)


CRAWL = "CC-MAIN-2024-22"
ARCHIVE = f"crawl-data/{CRAWL}/segments/1715971057216.39/warc/{CRAWL}-20240517-00000.warc.gz"


def crawl_source(tmp_path: Path, lines: list[str], **values: str) -> Source:
    (tmp_path / "warc.paths.gz").write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))
    return Source(kind="common_crawl", paths_file=tmp_path / "warc.paths.gz", **{"crawl": CRAWL, **values})


def test_a_crawls_archives_are_prefix_and_line_without_a_request(tmp_path: Path) -> None:
    lines = [ARCHIVE, ARCHIVE.replace("00000.warc", "00001.warc").replace("/warc/", "/wet/").replace(".gz", ".wet.gz")]
    for prefix in ("https://data.commoncrawl.org/", "s3://commoncrawl", "s3://commoncrawl/"):
        shards = list_shards(crawl_source(tmp_path, lines, prefix=prefix), 0)
        assert [shard.path for shard in shards] == [f"{prefix.rstrip('/')}/{line}" for line in lines]
        assert [(shard.kind, shard.source, shard.size_bytes) for shard in shards] == [
            ("warc", CRAWL, 0),
            ("wet", CRAWL, 0),
        ]


def test_a_crawl_in_a_folder_is_read(tmp_path: Path) -> None:
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>Ducks</p>"
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.b/\r\nContent-Length: {len(block)}\r\n\r\n"
    (tmp_path / ARCHIVE).parent.mkdir(parents=True)
    (tmp_path / ARCHIVE).write_bytes(gzip.compress(head.encode() + block + b"\r\n\r\n"))
    source = crawl_source(tmp_path, [ARCHIVE], prefix=str(tmp_path))
    shard = list_shards(source, 0)[0]
    assert shard.size_bytes > 0
    assert [record.html for record in read_shard(shard, source) if isinstance(record, RawRecord)] == [b"<p>Ducks</p>"]


@pytest.mark.parametrize("line", [ARCHIVE.replace("2024-22/", "2024-18/"), "CC-NEWS/a.warc.gz", ARCHIVE[:-3], "a b"])
def test_a_line_of_another_crawl_is_an_error(tmp_path: Path, line: str) -> None:
    with pytest.raises(
        DataError, match=r"warc.paths.gz: 1 of 2 lines are no WARC or WET archive of the crawl CC-MAIN-2024-22"
    ):
        list_shards(crawl_source(tmp_path, [ARCHIVE, line]), 0)


def test_a_crawl_needs_its_name_and_its_list(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'common_crawl': crawl is not set"):
        list_shards(crawl_source(tmp_path, [ARCHIVE], crawl=""), 0)
    with pytest.raises(DataError, match=f"'{CRAWL}': paths_file is not set"):
        list_shards(Source(kind="common_crawl", crawl=CRAWL), 0)
