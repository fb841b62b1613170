"""A secret in an address is refused before anything is written, and never repeated."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.sources.credentials import check_no_credentials
from data_pipeline.sources.files import read_paths_file
from megagpt.errors import DataError

SECRET = "Zq7wCanary9"
MEGAGPT = Path(sys.executable).with_name("megagpt")
CARRYING = [
    f"s3://AKIA:{SECRET}@bucket/web/*.warc.gz",
    f"https://user:{SECRET}@example.org/a.jsonl",
    f"ftp://:{SECRET}@host/a.txt",
    f"https://bucket.s3.amazonaws.com/a.jsonl?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c/a.jsonl?sv=2024&sig={SECRET}",
    f"https://storage.googleapis.com/b/a.parquet?X-Goog-Signature={SECRET}",
    f"https://example.org/a.jsonl?page=2&TOKEN={SECRET}",
]


@pytest.mark.parametrize("address", CARRYING)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address, tmp_path):
    with pytest.raises(DataError, match=r"entry 2: .* carries a") as error:
        read_paths_file(written(tmp_path / "list.gz", gzip.compress(f"a.txt\n{address}\n{address}\n".encode())))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "address",
    ["web/a:b@c/*.jsonl", "s3://bucket/a@b.jsonl", "ssh://user@host/a.txt", "https://example.org/a.jsonl?page=2&v=1"],
)
def test_other_addresses_are_taken(address):
    check_no_credentials(address, "here")


@pytest.mark.parametrize("how", ["override", "file"])
def test_a_job_with_a_secret_writes_nothing(how, tmp_path):
    said = f"out: {tmp_path / 'job'}\nsources: [{CARRYING[0]!r}]\n"
    words = [written(tmp_path / "job.yaml", said.encode())]
    if how == "override":
        written(tmp_path / "job.yaml", f"out: {tmp_path / 'job'}\nsources: [a.txt]\n".encode())
        words.append(f"sources=['{CARRYING[0]}']")
    done = subprocess.run([MEGAGPT, "data", "run", *words], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "sources.0.path: s3://...@bucket/web/*.warc.gz carries a password" in " ".join(done.stderr.split())
    assert SECRET not in done.stdout + done.stderr
    assert not (tmp_path / "job").exists()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
